"""The initrd is made anew by the system's own program: seconds on a quick machine, and minutes on others."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from gpuswitch.cli.output import clean, in_foreground, on_terminal
from gpuswitch.cli.translate import _

LONGEST_SECONDS = 1800.0
"""For all kernels together. Ten of them take minutes each on a slow disk."""
_END_SECONDS = 10.0
"""How long the program may take to put its things away when it is told to end."""
_LAST_LINES = 5
"""Of what it has said, those that tell why it failed."""


class MakingError(Exception):
    """It was not made; the text says why."""


def make_initrd(commands: Sequence[str], seconds: float = LONGEST_SECONDS) -> None:
    """Run these commands, one after the other. On a terminal, what they say stands on one line, with a clock.

    Raises:
        MakingError: one has failed, or takes too long, and was ended.
        KeyboardInterrupt: ^C; it was ended.
    """
    deadline = time.monotonic() + seconds
    for command in commands:
        _run(command, deadline)


def _run(command: str, deadline: float) -> None:
    begun = time.monotonic()
    show = _shown if on_terminal(sys.stderr) else _not_shown
    try:
        # In a session of its own: ^C is ours, and it is ended with all that it has begun.
        program = subprocess.Popen(
            command.split(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise MakingError(f"{command}: {error.strerror}") from error
    try:
        said = _followed(program, deadline, lambda last: show(last or command, time.monotonic() - begun))
        status = program.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired as late:
        raise MakingError(
            _("{command}: not done within {seconds} s", command=command, seconds=f"{late.timeout:g}")
        ) from None
    finally:
        show("", 0.0)
        _end(program)
    if status:
        raise MakingError("\n".join([_("{command}: status {status}", command=command, status=status), *said]))


def _followed(program: subprocess.Popen[bytes], deadline: float, tell: Callable[[str], None]) -> list[str]:
    """Read what it says until it has said all; gives the last lines.

    Raises:
        subprocess.TimeoutExpired: the deadline has come.
    """
    assert program.stdout is not None  # noqa: S101 -- it is a pipe
    reader, begun = program.stdout.fileno(), time.monotonic()
    lines, rest = [""], b""
    while True:
        tell(lines[-1])
        left = deadline - time.monotonic()
        if left <= 0:
            raise subprocess.TimeoutExpired(program.args, round(time.monotonic() - begun))
        if not select.select([reader], [], [], min(left, 1.0))[0]:
            continue
        if not (part := os.read(reader, 1 << 16)):
            return [each for each in lines if each][-_LAST_LINES:]
        *whole, rest = (rest + part).split(b"\n")
        lines = [*lines, *(each.decode(errors="replace").strip() for each in whole if each.strip())][-_LAST_LINES:]


def _end(program: subprocess.Popen[bytes]) -> None:
    """It, and all that it has begun."""
    if program.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGTERM)
        try:
            program.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    if program.stdout is not None:
        program.stdout.close()


def _shown(text: str, seconds: float) -> None:
    """One line, drawn in place; "" takes it away. Not in the background."""
    if not in_foreground(sys.stderr):
        return
    columns = max(os.get_terminal_size(sys.stderr.fileno()).columns - 10, 20)
    told = f"{clean(text)[:columns]}  {seconds:.0f} s" if text else ""
    print(f"\r\x1b[K{told}", end="", file=sys.stderr, flush=True)


def _not_shown(_text: str, _seconds: float) -> None:
    pass
