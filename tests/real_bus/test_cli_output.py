"""What becomes of the command's output: pipes that nobody reads, full disks, closed streams, poor terminals."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.service.services import BIN, environment
from tests.real_bus.conftest import Start
from tests.real_bus.test_cli import CONFIG, DISCRETE, on_terminal, words

FULL = "gpuswitchctl: cannot write the output: No space left on device\n"


@pytest.fixture
def environ(private_bus: PrivateBus) -> dict[str, str]:
    """As people have it: what is printed is buffered."""
    everybody = environment(GPUSWITCH_BUS=private_bus.address, TERM="xterm", COLUMNS="200")
    return {key: value for key, value in everybody.items() if key != "PYTHONUNBUFFERED"}


def shell(command: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it as somebody at a shell does; what its pipeline ended with, from left to right, is its last line."""
    line = f"{command}\necho ${{PIPESTATUS[*]}}"
    path = f"{BIN}:{environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line], env=environ | {"PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["gpuswitchctl list", "gpuswitchctl --help", "gpuswitchctl help states"])
async def test_a_pipe_that_nobody_reads_ends_it_quietly(command: str, start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    ended = unread([BIN / "gpuswitchctl", *command.split()[1:]], environ)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b"")


def unread(command: Sequence[str | Path], environ: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run it with a pipe for standard output whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(command, env=environ, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)


async def test_in_a_shell_that_is_141(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    assert unread(["bash", "-c", f"{BIN}/gpuswitchctl list; echo $? >&2"], environ).stderr == b"141\n"


@pytest.mark.parametrize(
    "arguments", ["list", "status", "groups", "config --json", "to-vfio geforce", "--help", "--version", "help states"]
)
async def test_a_full_disk_is_one_sentence(arguments: str, start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    seen = shell(f"gpuswitchctl {arguments} >/dev/full", environ)
    goes_on = "; the switch goes on: gpuswitchctl status geforce shows it\n" if arguments.startswith("to-") else "\n"
    assert (seen.stdout, seen.stderr) == ("8\n", FULL.replace("\n", goes_on))


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "help plan", "plan --help", "--version --json", "__complete ''"]
)
def test_a_full_disk_is_no_success_where_nothing_is_buffered_either(arguments: str, environ: dict[str, str]) -> None:
    seen = shell(f"gpuswitchctl {arguments} >/dev/full", environ | {"PYTHONUNBUFFERED": "1"})
    assert (seen.stdout, seen.stderr) == ("8\n", FULL)


def test_an_error_for_a_full_disk_is_told_all_the_same(environ: dict[str, str], tmp_path: Path) -> None:
    absent = f"unix:path={tmp_path}/none"
    seen = shell(f"gpuswitchctl list --json --bus {absent} >/dev/full", environ)
    assert seen.stdout == "8\n"
    assert seen.stderr.startswith(f"gpuswitchctl: cannot connect to the bus at {absent}: there is no socket ")
    assert seen.stderr.endswith(FULL)
    seen = shell("gpuswitchctl frobnicate --json >/dev/full", environ)
    assert seen.stdout == "8\n"
    assert "there is no command 'frobnicate'" in seen.stderr
    assert seen.stderr.endswith(FULL)


async def test_the_status_is_true_where_nothing_can_be_said(start: Start, environ: dict[str, str]) -> None:
    await start("shared", config=CONFIG)
    for arguments, status in ((f"to-vfio {DISCRETE}", 3), ("show nope", 2), ("list", 0)):
        assert shell(f"gpuswitchctl {arguments} 2>/dev/full >/dev/null", environ).stdout == f"{status}\n"


async def test_closed_streams_are_no_fault(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    for closed in ("<&-", "2>&-", "<&- 2>&-"):
        seen = shell(f"gpuswitchctl to-vfio geforce {closed}", environ)
        assert seen.stdout.splitlines()[-1] == "0"
        assert f"geforce ({DISCRETE}) is on vfio-pci " in seen.stdout
        assert seen.stderr == ""
    seen = shell("gpuswitchctl list >&-", environ)
    assert (seen.stdout, seen.stderr) == ("0\n", "")


@pytest.mark.parametrize(
    ("plain", "redrawn"), [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False), ({"TERM": ""}, False)]
)
async def test_terminals_without_colours_get_none(
    plain: dict[str, str], *, redrawn: bool, start: Start, environ: dict[str, str]
) -> None:
    await start("laptop", config=CONFIG)
    status, switched = on_terminal(environ | plain, "to-vfio", "geforce")
    assert (status, f"geforce ({DISCRETE}) is on vfio-pci now" in words(switched)) == (0, True)
    assert ("\x1b[2K" in switched) is redrawn
    for verb in ("list", "status", "groups", "history"):
        _, shown = on_terminal(environ | plain, verb)
        assert "\x1b" not in shown, verb
    assert "\x1b[3" not in switched


async def test_what_cannot_write_bars_and_dots_gets_letters(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    switch = shell("gpuswitchctl to-vfio geforce --no-wait", environ).stdout.split()[0]
    assert on_terminal(environ, "wait", "geforce")[0] == 0
    # So narrow that the model is shortened; so wide that there is room for bars.
    for columns, arguments in (("82", ["list"]), ("90", ["show", switch])):
        narrow = environ | {"COLUMNS": columns}
        assert not on_terminal(narrow, *arguments)[1].isascii()
        status, shown = on_terminal(narrow | {"PYTHONIOENCODING": "ascii"}, *arguments)
        assert (status, shown.isascii(), "\\u" in shown) == (0, True, False), shown
