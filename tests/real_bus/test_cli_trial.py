"""`gpuswitchctl trial` as people run it: counted down on a terminal, and said in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from tests.real_bus.conftest import CTL, Ctl, Start
from tests.real_bus.test_cli import CALLED, CONFIG, DISCRETE, field, words

WIDE = {"COLUMNS": "200"}
COUNTS = "press h for back now, k to keep it"
CLOCK = r"\d\d:\d\d:\d\d"


@dataclass
class Terminal:
    """What a command did on a terminal of its own: its exit status, what it showed, and how the terminal was set."""

    status: int
    shown: str
    before: list[Any]
    after: list[Any]

    @property
    def lines(self) -> list[str]:
        """What stands there in the end; what was drawn over is gone."""
        return [line.rpartition("\r")[2] for line in words(self.shown).replace("\r\n", "\n").strip().split("\n")]

    @property
    def said(self) -> str:
        """The same on one line: sentences are broken between words."""
        return " ".join(" ".join(self.lines).split())


def at_terminal(
    environ: dict[str, str],
    *arguments: str,
    when: str = COUNTS,
    then: Callable[[int, int], object] | None = None,
) -> Terminal:
    """Run gpuswitchctl there. When it shows `when`, `then` is called, with our end of the terminal and its pid."""
    ours, theirs = pty.openpty()
    before, shown = termios.tcgetattr(ours), b""
    with ExitStack() as until_the_end:
        process = until_the_end.enter_context(
            subprocess.Popen([CTL, *arguments], env=environ | WIDE, stdin=theirs, stdout=theirs, stderr=theirs)
        )
        until_the_end.callback(process.kill)
        ended = os.pidfd_open(process.pid)
        until_the_end.callback(os.close, ended)
        while ours in select.select([ours, ended], [], [])[0]:
            shown += os.read(ours, 4096)
            if then is not None and when in shown.decode(errors="ignore"):
                then(ours, process.pid)
                then = None
        process.wait()
    after = termios.tcgetattr(ours)
    os.close(theirs)
    os.close(ours)
    return Terminal(process.returncode, shown.decode(), before, after)


def hung_up(environ: dict[str, str], arguments: list[str], when: str) -> tuple[int, bytes]:
    """Run it on a terminal that hangs up once it shows `when`, deaf to that: its exit status, and its error output."""
    ours, theirs = pty.openpty()
    deaf = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", CTL, *arguments]
    with subprocess.Popen(deaf, env=environ | WIDE, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        seen = b""
        while when.encode() not in seen:
            seen += os.read(ours, 4096)
        os.close(ours)
        _, said = process.communicate()
        return process.returncode, said


def typing(keys: bytes) -> Callable[[int, int], object]:
    return lambda terminal, _: os.write(terminal, keys)


def sending(number: signal.Signals) -> Callable[[int, int], object]:
    return lambda _, pid: os.kill(pid, number)


@pytest.mark.parametrize(
    ("arguments", "faults", "shown"),
    [(["trial", "geforce"], [], COUNTS), (["to-vfio", "geforce"], ["unbind=hang"], "unbind")],
    ids=["trial", "to-vfio"],
)
async def test_a_terminal_that_hangs_up_ends_it_quietly_also_where_it_is_deaf_to_that(
    arguments: list[str], faults: list[str], shown: str, start: Start, environ: dict[str, str], ctl: Ctl
) -> None:
    await start("laptop", *faults, config=CONFIG)
    assert hung_up(environ, arguments, shown) == (-signal.SIGPIPE, b"")
    assert field(ctl, "state") == ("detaching" if faults else "vfio")


async def test_in_a_pipe_it_says_when_it_goes_home_and_ends(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    run = ctl("trial", "geforce", "--seconds", "600")
    assert (run.returncode, run.stderr) == (0, "")
    *_, there, stopped, when = run.stdout.splitlines()
    assert stopped == "  stopped until it is home: nvidia-persistenced.service"
    assert there.startswith(f"{CALLED} is on vfio-pci now, after ")
    assert re.fullmatch(
        rf"{re.escape(CALLED)} goes home by itself at {CLOCK}; to keep it on vfio: gpuswitchctl to-vfio geforce", when
    )
    assert re.search(
        r"^ *trial ends: .*; to keep it on vfio: gpuswitchctl to-vfio geforce$",
        ctl("status", "geforce").stdout,
        re.M,
    )
    assert ctl("to-vfio", "geforce").returncode == 0
    assert field(ctl, "trial_ends") is None
    assert "trial ends" not in ctl("status", "geforce").stdout


def moment(text: str) -> float:
    """Seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


async def test_as_json_it_is_the_moment(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    run = ctl("trial", "geforce", "--json")
    *_, result, last = map(json.loads, run.stdout.splitlines())
    assert (run.returncode, result["event"], result["result"]) == (0, "result", "done")
    assert (last["event"], last["gpu"]) == ("trial", DISCRETE)
    assert moment(last["trial_ends"]) == pytest.approx(moment(result["finished"]) + 60, abs=1)
    [_, gpu] = json.loads(ctl("list", "--json").stdout)["gpus"]
    assert gpu["trial_ends"] == last["trial_ends"]


async def test_on_a_terminal_it_is_counted_down_until_it_is_home(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", "--seconds", "2")
    assert (run.status, run.after) == (0, run.before)
    assert "home in 2 s; press h" in run.shown
    assert "home in 1 s; press h" in run.shown
    assert re.fullmatch(rf"{re.escape(CALLED)} is on the host now, after .*", run.lines[-1])
    assert any("bind 0000:01:00.0 to nvidia" in line or "load nvidia" in line for line in run.lines)
    assert COUNTS not in "\n".join(run.lines)


async def test_one_key_brings_it_home(start: Start, environ: dict[str, str], ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", then=typing(b"xH"))
    assert (run.status, run.after) == (0, run.before)
    assert re.fullmatch(rf"{re.escape(CALLED)} is on the host now, after .*", run.lines[-1])
    assert field(ctl, "state") == "host"


async def test_another_keeps_it(start: Start, environ: dict[str, str], ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", then=typing(b"k"))
    assert (run.status, run.after) == (0, run.before)
    assert run.lines[-1] == f"{CALLED} stays on vfio: gpuswitchctl to-host geforce brings it home"
    assert (field(ctl, "state"), field(ctl, "trial_ends")) == ("vfio", None)


async def test_what_is_in_the_way_at_its_end_is_said_and_it_can_be_kept(
    start: Start, environ: dict[str, str], ctl: Ctl
) -> None:
    await start("laptop", "hold_group=EBUSY", config=CONFIG)
    over = "home when possible"
    run = at_terminal(environ, "trial", "geforce", "--seconds", "1", when=over, then=typing(b"hk"))
    assert (run.status, run.after) == (0, run.before)
    said = run.said
    why = f"{DISCRETE} is in use: something has /dev/vfio/13 open, most likely a virtual machine: shut it down first"
    assert f"gpuswitchctl: the trial is over, and {DISCRETE} stays where it is for now: {why}" in said
    assert f"gpuswitchctl: cannot bring {CALLED} home now: {why}" in said
    assert run.lines[-1] == f"{CALLED} stays on vfio: gpuswitchctl to-host geforce brings it home"
    assert (field(ctl, "state"), field(ctl, "trial_ends"), field(ctl, "reason")) == ("vfio", None, "")


async def test_whoever_else_keeps_it_ends_the_countdown(start: Start, environ: dict[str, str], ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", then=lambda *_: ctl("to-vfio", "geforce"))
    assert (run.status, run.after) == (0, run.before)
    assert run.lines[-1] == f"{CALLED} stays on vfio: gpuswitchctl to-host geforce brings it home"


async def test_an_interrupt_says_what_will_happen(start: Start, environ: dict[str, str], ctl: Ctl) -> None:
    await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", then=sending(signal.SIGINT))
    assert (run.status, run.after) == (130, run.before)
    assert re.fullmatch(
        rf"gpuswitchctl: interrupted; {re.escape(CALLED)} goes home by itself at {CLOCK}; "
        rf"to keep it on vfio: gpuswitchctl to-vfio geforce",
        run.lines[-1],
    )
    assert moment(field(ctl, "trial_ends")) > time.time()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_whatever_ends_it_leaves_the_terminal_as_it_was(
    start: Start, environ: dict[str, str], number: signal.Signals
) -> None:
    await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", then=sending(number))
    assert (run.status, run.after) == (128 + number, run.before)


async def test_a_service_that_goes_is_told_with_what_stays_true(start: Start, environ: dict[str, str]) -> None:
    service = await start("laptop", config=CONFIG)
    run = at_terminal(environ, "trial", "geforce", then=lambda *_: os.kill(service.process.pid, signal.SIGKILL))
    assert (run.status, run.after) == (5, run.before)
    assert re.search(rf"; once it runs, {re.escape(CALLED)} goes home by itself at {CLOCK}; ", run.said)


async def test_a_refusal_moves_nothing(start: Start, ctl: Ctl) -> None:
    await start("shared", config=CONFIG)
    run = ctl("trial", DISCRETE)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith(f"gpuswitchctl: cannot try {CALLED} on vfio: ")
    assert field(ctl, "trial_ends") is None


@pytest.mark.parametrize("seconds", ["0", "0.5", "86401", "nan", "inf", "soon", "-3"])
def test_no_such_length(ctl: Ctl, seconds: str) -> None:
    run = ctl("trial", f"--seconds={seconds}")
    assert run.returncode == 2
    assert f"{seconds!r} is not a number of seconds from 1 to 86400" in run.stderr
