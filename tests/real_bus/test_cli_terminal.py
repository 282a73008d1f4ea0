"""What a person at a terminal is asked and shown while a switch waits, or before it ends what they work with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.cli.output import clock
from tests.harness.service.services import ANY_PORT, GPU, ROOT
from tests.harness.service.terminal import END, INTERRUPT, Terminal
from tests.real_bus.conftest import CTL, Start

CARD = "0000:01:00.0"
CALLED = f"geforce ({CARD})"
"""In sentences."""
HELD = f"""
{ANY_PORT}[defaults]
allow_boot_display = true
[[gpu]]
address = "{CARD}"
name = "geforce"
"""
"""Of a machine with a desktop on its only GPU, which nobody ends."""
NAMED = f'{ANY_PORT}[[gpu]]\naddress = "{CARD}"\nname = "geforce"\n'
DESKTOP = f'{HELD}stop_units = ["display-manager.service"]\n'
WAITING = ["to-vfio", "geforce", "--wait", "600"]
QUESTION = "[c/L] "


def card(environ: dict[str, str]) -> Any:
    """As `status` has it."""
    [found] = json.loads(run(environ, "status", CARD, "--json").stdout)["gpus"]
    return found


def run(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command to its end, its output in pipes."""
    return subprocess.run([CTL, *arguments], env=environ, capture_output=True, text=True, check=False)


def following(environ: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """A switch that waits for the desktop, its output in pipes."""
    return subprocess.Popen(
        [CTL, *WAITING, *more], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def waiting(environ: dict[str, str], *arguments: str, below_shell: bool = False) -> Iterator[Terminal]:
    """A terminal on which a switch waits for the desktop to be closed; below a shell, it can be stopped."""
    below = [sys.executable, "-c", SHELL] if below_shell else []
    with Terminal([*below, CTL, *(arguments or WAITING)], environ) as terminal:
        terminal.until("s left): ")
        yield terminal


def assert_as_it_was(terminal: Terminal) -> None:
    """What was changed of the terminal was changed back: the cursor is not hidden."""
    assert terminal.raw.count("\x1b[?25l") == terminal.raw.count("\x1b[?25h") > 0


def assert_taken_away(terminal: Terminal) -> None:
    """The question that nobody answered: nothing stands above what came of it."""
    assert [after[:4] for after in terminal.raw.split(QUESTION)[1:]] == ["\r\x1b[J"] * terminal.raw.count(QUESTION)


async def test_it_says_for_whom_it_waits_and_how_long_still(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.until("(pid ")
        assert re.search(r"wait until nobody has it open  running  [\d.]+ s", terminal.shown)
        assert re.search(r"waiting \((600|59\d) s left\): (Xorg|kwin_x11) \(pid ", terminal.shown)
        told = card(environ)["switch"]
        assert "Xorg (pid " in told["waiting_for"]
        assert told["step_started"] < told["waiting_until"]


async def test_interrupted_it_asks_and_the_switch_may_go_on(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    for answer in ("l", "\n", END):
        with waiting(environ) as terminal:
            terminal.press(INTERRUPT)
            terminal.until(QUESTION)
            terminal.press(answer)
            assert terminal.ended() == 130
            assert_as_it_was(terminal)
        assert "gpuswitchctl cancel geforce takes it back" in terminal.shown
        assert card(environ)["state"] == "detaching"


async def test_beside_the_question_stands_until_when_it_waits(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.until("Xorg (pid ")
        terminal.press(INTERRUPT)
        terminal.until(clock(datetime.fromisoformat(card(environ)["switch"]["waiting_until"]).timestamp()))
        terminal.until("Xorg (pid ")
        terminal.until(QUESTION)
        terminal.press("l")
        assert terminal.ended() == 130


async def test_interrupted_it_asks_and_the_switch_may_be_taken_back(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        # No Enter: other keys would print on the line of the question.
        terminal.press("c")
        terminal.until("wait until nobody has it open  reverted")
        assert terminal.ended() == 1
        assert_as_it_was(terminal)
    assert f"of {CALLED} to vfio is cancelled: the GPU is as it was before" in terminal.shown
    assert card(environ)["state"] == "host"


async def test_what_happens_meanwhile_stands_above_the_question(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", "unbind=1s", config=NAMED)
    with Terminal([CTL, "to-vfio", "geforce"], environ) as terminal:
        terminal.until("unbind ")
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        terminal.until(": done (")
        terminal.until(QUESTION)
        terminal.press("l")
        assert terminal.ended() == 130
    # Each time it is taken away before anything else is written, and answered at last.
    after = [rest.partition("\n")[0] for rest in terminal.raw.split(QUESTION)[1:]]
    assert len(after) > 1
    assert all(each.startswith("\r\x1b[J") for each in after[:-1])
    assert after[-1] == "l\r"


SHELL = """
import os, signal, sys, termios
command = os.fork()
if command == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(command, os.WUNTRACED)
assert os.WIFSTOPPED(status), status
mode = termios.tcgetattr(0)[3]
print("line by line" if mode & termios.ICANON and mode & termios.ECHO else "key by key", flush=True)
os.kill(command, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
"""
"""Does what a shell with job control does, but for the modes of the terminal, which not all of them put right."""
STOP = "\x1a"


async def test_stopped_at_the_question_it_leaves_the_terminal_as_it_was(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ, below_shell=True) as terminal:
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        terminal.press(STOP)
        terminal.until("line by line")
        terminal.until(QUESTION)
        terminal.press("c")
        assert terminal.ended() == 1
        assert_as_it_was(terminal)


async def test_stopped_while_it_shows_steps_it_gives_the_cursor_back(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ, below_shell=True) as terminal:
        terminal.press(STOP)
        terminal.until("line by line")
        stopped = terminal.raw.partition("line by line")[0]
        assert stopped.count("\x1b[?25l") == stopped.count("\x1b[?25h") > 0
        terminal.until("s left): ")
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        terminal.press("c")
        assert terminal.ended() == 1
        assert_as_it_was(terminal)


BACKGROUND = """
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
command = os.fork()
if command == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
sys.stdin.readline()
os.tcsetpgrp(0, command)
_, status = os.waitpid(command, os.WUNTRACED)
os.tcsetpgrp(0, os.getpgrp())
assert os.WIFSTOPPED(status), status
print("it is stopped", flush=True)
os.kill(command, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
"""
"""A shell with job control: `... &`, `fg` when a line is typed, and after ^Z `bg`."""
IN_THE_BACKGROUND = """
import os, sys
command = os.fork()
if command == 0:
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(command, os.WUNTRACED)
assert not os.WIFSTOPPED(status), status
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""`... &` alone."""
MOVES = re.compile(r"\x1b\[(\d*[A-HJKSTf]|\?25l)")
"""What moves the cursor, erases, or hides it."""


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


@pytest.mark.parametrize("by_key", [True, False])
async def test_in_the_background_it_tells_in_lines_and_leaves_the_terminal_to_others(
    start: Start, environ: dict[str, str], *, by_key: bool
) -> None:
    service = await start("single", config=HELD)
    with Terminal([sys.executable, "-c", BACKGROUND, CTL, *WAITING], environ) as terminal:
        terminal.until(": done (")
        terminal.until("waiting until ")
        terminal.until("Xorg (pid ")
        assert not MOVES.search(terminal.raw)
        terminal.press("\n")
        terminal.until("s left): ")
        if by_key:
            terminal.press(STOP)
        else:
            os.kill(child_of(terminal.process.pid), signal.SIGSTOP)
        terminal.until("it is stopped")
        # It has begun to go on when it tells of this.
        await service.call(f"{ROOT}/gpu/0000_01_00_0", f"{GPU}.Cancel", "s", card(environ)["switch"]["id"])
        terminal.until("wait until nobody has it open: reverted")
        assert terminal.ended() == 1
        assert not MOVES.search(terminal.raw.rpartition("it is stopped")[2])
        assert_as_it_was(terminal)


async def test_a_trial_in_the_background_is_not_counted_down(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=NAMED)
    with Terminal([sys.executable, "-c", IN_THE_BACKGROUND, CTL, "trial", "geforce"], environ) as terminal:
        terminal.until("goes home by itself at ")
        assert terminal.ended() == 0
        assert not MOVES.search(terminal.raw)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_ended_at_the_question_it_leaves_the_terminal_as_it_was(
    number: signal.Signals, start: Start, environ: dict[str, str]
) -> None:
    await start("single", config=HELD)
    with waiting(environ) as terminal:
        before = terminal.modes()
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        assert terminal.modes() != before
        terminal.process.send_signal(number)
        assert terminal.process.wait() == 128 + number
        assert terminal.modes() == before


async def test_interrupted_twice_it_goes_at_once(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        terminal.press(INTERRUPT)
        assert terminal.ended() == 130
        assert_as_it_was(terminal)
    assert "gpuswitchctl cancel geforce takes it back" in terminal.shown
    assert card(environ)["state"] == "detaching"


async def test_ended_by_somebody_it_leaves_the_terminal_as_it_was(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ended() == 143
        assert_as_it_was(terminal)
    assert card(environ)["state"] == "detaching"


async def test_a_service_that_dies_leaves_the_terminal_as_it_was(start: Start, environ: dict[str, str]) -> None:
    service = await start("single", config=HELD)
    with waiting(environ) as terminal:
        service.process.kill()
        assert terminal.ended() == 5
        assert_as_it_was(terminal)
    assert "the service went away before it answered" in terminal.shown


async def test_a_service_that_dies_while_it_is_asked(start: Start, environ: dict[str, str]) -> None:
    service = await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        service.process.kill()
        await service.process.wait()
        assert terminal.ended() == 5
        assert_as_it_was(terminal)
    assert_taken_away(terminal)
    assert "the service went away" in terminal.shown


async def test_the_question_goes_away_when_the_switch_is_over(start: Start, environ: dict[str, str]) -> None:
    service = await start("single", config=HELD)
    with waiting(environ) as terminal:
        terminal.press(INTERRUPT)
        terminal.until(QUESTION)
        terminal.press("w")
        terminal.press("\x1b[C")
        await service.call(f"{ROOT}/gpu/0000_01_00_0", f"{GPU}.Cancel", "s", card(environ)["switch"]["id"])
        assert terminal.ended() == 1
        assert_as_it_was(terminal)
    assert_taken_away(terminal)
    assert f"cannot move {CALLED} to vfio (cancelled): cancelled by " in terminal.shown


async def test_whoever_follows_it_again_sees_at_once_for_whom_it_waits(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    assert run(environ, *WAITING, "--no-wait").returncode == 0
    with waiting(environ) as first:
        first.press(f"{INTERRUPT}l")
        assert first.ended() == 130
    with waiting(environ) as again:
        again.until("(pid ")
        assert "wait until nobody has it open  running" in again.shown


async def test_in_a_pipe_it_says_for_whom_and_names_the_way_back(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with following(environ) as process:
        assert process.stdout is not None
        said = ""
        while "waiting until " not in said:
            said = process.stdout.readline()
            assert said
        assert re.fullmatch(r"waiting until \d\d:\d\d:\d\d: .*Xorg \(pid .*\n", said)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == (
        "gpuswitchctl: interrupted; the switch, once begun, goes on: gpuswitchctl status geforce shows it, "
        "gpuswitchctl to-vfio geforce --wait 600 follows it again, gpuswitchctl cancel geforce takes it back\n"
    )
    assert card(environ)["state"] == "detaching"


async def test_programs_hear_for_whom_it_waits(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=HELD)
    with following(environ, "--json") as process:
        assert process.stdout is not None
        event: dict[str, Any] = {}
        while event.get("event") != "waiting" or event["until"] is None:
            event = json.loads(process.stdout.readline())
        process.kill()
    switch = card(environ)["switch"]
    assert event.pop("at").endswith("Z")
    assert event == {
        "version": 1,
        "event": "waiting",
        "gpu": CARD,
        "name": "geforce",
        "id": switch["id"],
        "for": switch["waiting_for"],
        "since": switch["step_started"],
        "until": switch["waiting_until"],
    }


async def test_who_is_in_the_way_is_the_same_refusal_at_once_and_after_waiting(
    start: Start, environ: dict[str, str]
) -> None:
    await start("single", config=HELD)
    for how in (["--busy", "refuse"], ["--wait", "1"]):
        refused = run(environ, "to-vfio", "geforce", *how)
        assert refused.returncode == 3
        assert "Xorg (pid " in refused.stderr
        assert run(environ, "to-vfio", "geforce", *how, "--json").returncode == 3
    assert card(environ)["state"] == "host"


# Before a desktop or a session ends

GO_ON = "Go on? [y/N] "


NO = "gpuswitchctl: cannot go on: you said no; nothing was changed\r\n"
NOTHING_SAID = "gpuswitchctl: cannot go on: the input ended without an answer; nothing was changed\r\n"


@pytest.mark.parametrize(("answer", "said"), [("n\n", NO), ("\n", NO), ("nonsense\n", NO), (END, NOTHING_SAID)])
async def test_a_desktop_is_not_ended_for_whoever_does_not_say_yes(
    answer: str, said: str, start: Start, environ: dict[str, str]
) -> None:
    await start("single", config=DESKTOP)
    with Terminal([CTL, "to-vfio", "geforce"], environ) as terminal:
        terminal.until(f"to move {CALLED} to vfio ends what runs on this screen:")
        terminal.until("ended: session 2 of alice (kwin_x11)")
        terminal.until("stopped until it is home: display-manager.service")
        terminal.until(GO_ON)
        terminal.press(answer)
        assert terminal.ended() == 1
    assert terminal.shown.endswith(said)
    assert card(environ)["switch"] is None


async def test_a_desktop_is_not_ended_for_whoever_interrupts(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=DESKTOP)
    with Terminal([CTL, "to-vfio", "geforce"], environ) as terminal:
        terminal.until(GO_ON)
        terminal.press(INTERRUPT)
        assert terminal.ended() == 130
    assert "Traceback" not in terminal.shown
    assert card(environ)["switch"] is None


async def test_a_desktop_is_ended_for_whoever_says_yes(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=DESKTOP)
    with Terminal([CTL, "to-vfio", "geforce"], environ) as terminal:
        terminal.until(GO_ON)
        terminal.press("Yes\n")
        assert terminal.ended() == 0
    done, _comma, afterwards = terminal.shown.partition(f"{CALLED} is on vfio-pci now")
    assert done
    assert "stopped until it is home: display-manager.service" in afterwards


@pytest.mark.parametrize("typed", ["to-vfio geforce", "trial geforce --seconds 60", "run -- true"])
async def test_all_that_is_ended_is_named(typed: str, start: Start, environ: dict[str, str]) -> None:
    """Programs of a session with it, and the display manager that is stopped since it has the GPU open."""
    await start("single", config=HELD)
    verb, *more = typed.split()
    with Terminal([CTL, verb, "--busy", "terminate", *more], environ) as terminal:
        terminal.until("ended: session 2 of alice (kwin_x11)")
        terminal.until("stopped until it is home: display-manager.service (Xorg)")
        terminal.until(GO_ON)
        terminal.press("n\n")
        assert terminal.ended() == 1
    assert card(environ)["switch"] is None


async def test_nobody_is_asked_with_yes(start: Start, environ: dict[str, str]) -> None:
    await start("single", config=DESKTOP)
    with Terminal([CTL, "to-vfio", "geforce", "--yes"], environ) as terminal:
        assert terminal.ended() == 0
    assert GO_ON not in terminal.shown


@pytest.mark.parametrize("elsewhere", ["</dev/null", "2>/dev/null", "--json", "--json | cat"])
async def test_nobody_is_asked_who_could_not_answer_or_see_it(
    elsewhere: str, start: Start, environ: dict[str, str]
) -> None:
    await start("single", config=DESKTOP)
    with Terminal(["bash", "-c", f"{CTL} to-vfio geforce {elsewhere}"], environ) as terminal:
        assert terminal.ended() == 0
    assert GO_ON not in terminal.shown
    assert card(environ)["state"] == "vfio"


@pytest.mark.parametrize("elsewhere", [">/dev/null", "| cat"])
async def test_whoever_sits_there_is_asked_wherever_the_output_goes(
    elsewhere: str, start: Start, environ: dict[str, str]
) -> None:
    await start("single", config=DESKTOP)
    with Terminal(["bash", "-o", "pipefail", "-c", f"{CTL} to-vfio geforce {elsewhere}"], environ) as terminal:
        terminal.until("ends what runs on this screen:")
        terminal.until("stopped until it is home: display-manager.service")
        terminal.until(GO_ON)
        terminal.press("n\n")
        assert terminal.ended() == 1
    assert card(environ)["switch"] is None


async def test_nobody_is_asked_where_no_desktop_ends(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=HELD)
    with Terminal([CTL, "to-vfio", "geforce"], environ) as terminal:
        assert terminal.ended() == 0
    assert GO_ON not in terminal.shown
