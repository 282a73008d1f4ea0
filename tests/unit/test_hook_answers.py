"""What the libvirt hook makes of the service's answers. A program stands in for dbus-send.

The real one, on a real bus, is in tests/real_bus.
"""

from __future__ import annotations

import io
import os
import select
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuswitch import hook
from tests.harness.domains import BOMB, DOMAIN, UUID, domain, table, write


@dataclass
class HookHarness:
    """The hook in this process, with a program of ours for dbus-send and a configuration of its own."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    captured: pytest.CaptureFixture[str]

    def answer(self, said: str = "", status: int = 0, first: str = "") -> None:
        """What dbus-send says on stderr, and ends with; or what it does first."""
        program = self.folder / "dbus-send"
        script = f"#!/bin/sh\nprintf '%s\\n' \"$@\" >>'{self.folder}/called'\n{first}\n"
        program.write_text(f"{script}printf %s {shlex.quote(said)} >&2\necho noise\nexit {status}\n")
        program.chmod(0o755)
        self.monkeypatch.setattr(hook, "DBUS_SEND", str(program))

    def manage(self, config: str) -> Path:
        return write(self.folder / "etc", config=config) / "config.toml"

    @property
    def called(self) -> list[str]:
        """All arguments of dbus-send so far."""
        file = self.folder / "called"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, operation: str, reason: str = "-", xml: str = DOMAIN) -> tuple[int, str]:
        """The exit status, and stderr. stdout is always empty."""
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(xml.encode())))
        status = hook.main(["win 10", operation, "begin", reason])
        said = self.captured.readouterr()
        assert said.out == ""
        return status, said.err


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> HookHarness:
    """Nothing is managed, and every call is answered."""
    monkeypatch.setattr(hook, "CONFIGURATION", str(write(tmp_path / "etc")))
    harness = HookHarness(tmp_path, monkeypatch, capfd)
    harness.answer()
    return harness


@pytest.mark.parametrize(
    ("operation", "method", "arguments"),
    [
        ("prepare", "AcquireForVm", [f"string:{UUID}", "array:string:0000:01:00.0,0000:01:00.1"]),
        ("started", "AdoptVm", [f"string:{UUID}", "array:string:0000:01:00.0,0000:01:00.1"]),
        ("reconnect", "AdoptVm", [f"string:{UUID}", "array:string:0000:01:00.0,0000:01:00.1"]),
        ("release", "ReleaseFromVm", [f"string:{UUID}", "string:crashed"]),
    ],
)
def test_each_operation_is_one_call(operation: str, method: str, arguments: list[str], harness: HookHarness) -> None:
    assert harness.run(operation, "crashed") == (0, "")
    assert harness.called[0] == "--system"
    assert harness.called[3:] == [
        "--dest=org.gpuswitch1",
        "/org/gpuswitch1",
        f"org.gpuswitch1.Manager.{method}",
        "string:win 10",
        *arguments,
    ]


@pytest.mark.parametrize("operation", ["prepare", "started", "reconnect", "release"])
def test_nothing_is_asked_for_a_domain_without_pci_devices(operation: str, harness: HookHarness) -> None:
    usb = "<hostdev mode='subsystem' type='usb'><source><address bus='1' device='2'/></source></hostdev>"
    harness.answer("Error org.gpuswitch1.Error.Busy: not asked", 1)
    assert harness.run(operation, xml=domain(usb)) == (0, "")
    assert harness.called == []


def test_a_refusal_is_one_line(harness: HookHarness) -> None:
    harness.answer(
        "Error org.gpuswitch1.Error.Busy: cannot move it: x has it open\n  cannot move it: y has it open\n\n", 1
    )
    said = "gpuswitch: cannot move it: x has it open; cannot move it: y has it open\n"
    assert harness.run("prepare") == (1, said)
    for operation in ("started", "reconnect", "release"):
        assert harness.run(operation) == (0, said)


DOWN = "is not running and could not be started (why); run: systemctl start gpuswitchd"
SILENT = "has not answered (why); run: systemctl status gpuswitchd"


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ("Error org.freedesktop.DBus.Error.ServiceUnknown: why", 1, DOWN),
        ("Error org.freedesktop.DBus.Error.Spawn.ChildExited: why", 1, DOWN),
        ("Error org.freedesktop.DBus.Error.TimedOut: why", 1, DOWN),
        ("Error org.freedesktop.systemd1.UnitMasked: why", 1, DOWN),
        ("noise\nError org.freedesktop.DBus.Error.NoReply: why", 1, SILENT),
        ("Error org.freedesktop.DBus.Error.AccessDenied: why", 1, SILENT),
        ("Error org.freedesktop.DBus.Error.UnknownMethod: why", 1, SILENT),
        ("Error org.gpuswitch1.ErrorLike: why", 1, SILENT),
        ("why", 1, SILENT),
        ("", 3, "has not answered (dbus-send ended with status 3); run: systemctl status gpuswitchd"),
    ],
)
def test_without_an_answer_only_managed_gpus_are_refused(
    said: str, status: int, reason: str, harness: HookHarness
) -> None:
    harness.answer(said, status)
    assert harness.run("prepare") == (0, "")
    harness.manage(table("01:00.1"))
    line = f"gpuswitch: cannot give 0000:01:00.0, 0000:01:00.1 to win 10: gpuswitchd {reason}\n"
    assert harness.run("prepare") == (1, line)
    assert harness.run("reconnect")[0] == 0


def test_without_an_answer_and_without_a_configuration_nothing_is_risked(harness: HookHarness) -> None:
    harness.answer("Error org.freedesktop.DBus.Error.ServiceUnknown: why", 1)
    file = harness.manage("[[gpu]\n")
    status, said = harness.run("prepare")
    assert status == 1
    assert said.startswith(f"gpuswitch: cannot tell whether win 10 has a managed GPU: gpuswitchd {DOWN}; and ")
    assert str(file) in said
    assert said.count("\n") == 1


def test_bad_xml_refuses_only_where_a_gpu_is_managed(harness: HookHarness) -> None:
    assert harness.run("prepare", xml=BOMB) == (0, "")
    harness.manage(table("01:00.0"))
    assert harness.run("prepare", xml=BOMB) == (
        1,
        "gpuswitch: cannot give 0000:01:00.0 to win 10: its XML has a document type\n",
    )
    for operation in ("started", "reconnect", "release"):
        assert harness.run(operation, xml=BOMB) == (0, "gpuswitch: its XML has a document type\n")
    assert harness.called == []


def test_dbus_send_that_is_missing_or_killed(harness: HookHarness) -> None:
    harness.manage(table("01:00.0"))
    harness.answer(first="kill -KILL $$")
    assert harness.run("prepare")[0] == 1
    assert "dbus-send ended with status -9" in harness.run("started")[1]
    harness.monkeypatch.setattr(hook, "DBUS_SEND", str(harness.folder / "nowhere"))
    status, said = harness.run("prepare")
    assert status == 1
    assert "No such file or directory; it comes with D-Bus (dbus-bin)" in said
    assert harness.run("release")[0] == 0


def test_whatever_else_goes_wrong_is_one_line(harness: HookHarness) -> None:
    harness.monkeypatch.setattr(hook, "read_domain", None)
    line = "gpuswitch: cannot look after the GPUs of win 10: TypeError(\"'NoneType' object is not callable\")\n"
    assert harness.run("prepare") == (1, line)
    assert harness.run("reconnect") == (0, line)


def test_a_bus_that_hangs_is_left(harness: HookHarness) -> None:
    harness.answer(first="exec cat")
    with pytest.raises(TimeoutError):
        hook.run([hook.DBUS_SEND], 0.01)


def test_what_ends_with_its_output_kept_open_is_not_waited_for(harness: HookHarness) -> None:
    """Somebody else has its stderr still."""
    heir = harness.folder / "heir"
    harness.answer(first=f"echo no >&2; sleep 600 & echo $! >'{heir}'; exit 3")
    assert hook.run([hook.DBUS_SEND], 30) == (3, "no\n")
    os.kill(int(heir.read_text()), signal.SIGKILL)


KEEPER = "import sys; from gpuswitch import hook; hook.run([sys.executable, '-c', sys.argv[1]], 600)"
KEPT = "import os, signal, sys; print(os.getpid(), file=open({!r}, 'w'), flush=True); signal.pause()"


def test_what_it_runs_ends_when_it_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([sys.executable, "-c", KEEPER, KEPT.format(str(fifo))]) as keeper:
        kept = os.pidfd_open(int(fifo.read_text()))
        keeper.kill()
    assert select.select([kept], [], [], 30)[0] == [kept]
    os.close(kept)
