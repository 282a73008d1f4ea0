"""Signals that end the command: what is to be put away is put away.

^C while a switch is followed is heard where nothing can get lost by it, as somebody may want to follow it on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class _Interrupts:
    """SIGINT, as one process has it."""

    def __init__(self) -> None:
        self._holding = False
        self._arrived = False
        self.descriptor: int | None = None
        """While SIGINT is held: it can be read once one has come.

        One that comes right before a program begins to wait in the kernel does not end that waiting.
        """

    @contextmanager
    def held(self) -> Iterator[None]:
        """SIGINT raises KeyboardInterrupt within `let_in` only, or at the end."""
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as of a job in the background
            yield
            return
        self.descriptor, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._receive)
        self._holding = True
        try:
            yield
            self._holding = False
            self._raise_arrived()
        finally:
            self._holding = self._arrived = False
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(before)
            os.close(theirs)
            os.close(self.descriptor)
            self.descriptor = None

    def heard(self) -> None:
        """What made `descriptor` readable is known."""
        if self.descriptor is not None:
            with suppress(BlockingIOError):
                os.read(self.descriptor, 512)

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """Here, and at once what came before."""
        held, self._holding = self._holding, False
        try:
            self._raise_arrived()
            yield
        finally:
            self._holding = held

    def _receive(self, number: int, frame: object) -> None:  # noqa: ARG002 -- as signal.signal() calls it
        self._arrived = True
        if not self._holding:
            self._raise_arrived()

    def _raise_arrived(self) -> None:
        if self._arrived:
            self._arrived = False
            raise KeyboardInterrupt


def end_by(number: int, _frame: object = None) -> NoReturn:
    """End as a shell expects it of a program that this signal has ended, and put everything away before."""
    raise SystemExit(128 + number)


@contextmanager
def ending_in_order(*numbers: int) -> Iterator[None]:
    """These signals end the command in order (`end_by`)."""
    before = {number: signal.signal(number, end_by) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_in_order(put_away: Callable[[], None], take_up: Callable[[], None]) -> Iterator[None]:
    """^Z stops the command once this is put away; it is taken up when the command goes on (termios(3), SUSP)."""

    def stop(_number: int, _frame: object) -> None:
        put_away()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here it goes on.
        signal.signal(signal.SIGTSTP, stop)
        take_up()

    before = signal.getsignal(signal.SIGTSTP)
    if before is signal.SIG_IGN:  # as of a shell without job control: ^Z stops nobody
        yield
        return
    signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


@contextmanager
def not_stopped() -> Iterator[None]:
    """^Z waits meanwhile: what is done then writes as well, and a write in the midst of a write is an error."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


INTERRUPTS = _Interrupts()
"""A process has one handler of it."""
