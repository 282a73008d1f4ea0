"""The demonstration, from the command to its end, as somebody sees it who reads it from a pipe."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.service.services import BIN, contents, environment

DEMO = [str(BIN / "gpuswitchctl"), "demo"]
STEP = r"^\[ *\d+/\d+\]"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demonstration has its temporary files. Its path is short, since sockets lie in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def processes_in(folder: Path) -> list[str]:
    """The command lines of those that run with files in this folder."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        lines.append(line)
    return [line for line in lines if str(folder) in line]


def test_it_plays_to_the_end_and_leaves_nothing(folder: Path) -> None:
    ended = subprocess.run(
        DEMO, env=environment(TMPDIR=str(folder)), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    expected = (
        r"^1\. A laptop\.",
        r"^\$ gpuswitchctl list$",
        r"^IOMMU group 13: GPU 0000:01:00\.0 alone$",
        r"^\$ gpuswitchctl to-vfio geforce$",
        rf"{STEP} unbind 0000:01:00\.1 from snd_hda_intel: done \(.*\)$",
        r"^geforce \(0000:01:00\.0\) is on vfio-pci now, after .*$",
        r"^ +state: vfio since .*$",
        r"^geforce \(0000:01:00\.0\) is on the host now, after .*$",
        r"^ +state: host-nvidia since .*$",
        r"^2\. A server",
        r"^\$ gpuswitchctl to-vfio 11:00\.0 & gpuswitchctl to-vfio 21:00\.0$",
        r"^0000:21:00\.0  -     vfio +- +no +vfio-pci .*$",
        r"^3\. The laptop again",
        rf"{STEP} bind 0000:01:00\.3 to vfio-pci: failed \(.*\)$",
        rf"{STEP} unbind 0000:01:00\.1 from snd_hda_intel: reverted \(.*\)$",
        r"^gpuswitchctl: cannot move .* to vfio \(reverted\): cannot bind 0000:01:00\.3 to vfio-pci: Invalid argument$",
        r"^ +state: host-nvidia since .*$",
    )
    rest = ended.stdout
    for line in expected:
        found = re.search(line, rest, re.MULTILINE)
        assert found, f"{line} is not in what follows:\n{rest}"
        rest = rest[found.end() :]
    for gpu in ("11", "21"):
        assert re.search(rf"^{gpu}:00\.0 \| 0000:{gpu}:00\.0 is on vfio-pci now, after ", ended.stdout, re.MULTILINE)
    assert contents(folder) == processes_in(folder) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_it_leaves_nothing_either(folder: Path, number: int, status: int) -> None:
    with subprocess.Popen(
        DEMO, env=environment(TMPDIR=str(folder)), stdout=subprocess.PIPE, text=True, process_group=0
    ) as demo:
        assert demo.stdout is not None
        while "unbind" not in (line := demo.stdout.readline()):
            assert line
        # ^C and a lost terminal reach the whole group of processes.
        os.killpg(demo.pid, number)
        demo.stdout.read()
        assert demo.wait() == status
    assert contents(folder) == processes_in(folder) == []


def test_on_a_terminal_it_has_colours(folder: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(DEMO, env=environment(TMPDIR=str(folder), TERM="xterm"), stdout=theirs) as demo:
        os.close(theirs)
        said = os.read(ours, 4096)
        while b"\x1b[" not in said:
            said += os.read(ours, 4096)
        demo.send_signal(signal.SIGTERM)
        demo.wait()
    os.close(ours)
    assert contents(folder) == processes_in(folder) == []


def test_without_a_message_bus_it_says_what_to_install(folder: Path) -> None:
    ended = subprocess.run(
        DEMO, env=environment(TMPDIR=str(folder), PATH=str(folder)), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "gpuswitchctl: cannot show switches on simulated machines: "
        "dbus-daemon is missing; install it: apt-get install dbus-daemon\n"
    )
