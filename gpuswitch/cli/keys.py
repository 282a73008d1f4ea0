"""Single keys from the terminal, and questions that one of them answers. Whatever happens, the terminal is as it was
afterwards, also while the command is stopped (^Z).
"""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from select import select

from gpuswitch.cli.interrupts import ending_in_order, not_stopped, stopping_in_order
from gpuswitch.cli.output import cells, wrapped
from gpuswitch.cli.parser import terminal_columns

_ESCAPE = "\x1b"
END = "\x04"
"""^D."""
_LONGEST_KEY = 64
"""More than any key of a terminal sends: an arrow is several characters, the last of which is a letter."""


@contextmanager
def single_keys(redraw: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Keys come one by one, unseen, from this descriptor. `redraw` is called when the command goes on after a stop."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def as_it_was() -> None:
        with suppress(termios.error):  # it has hung up
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

    def one_by_one() -> None:
        tty.setcbreak(descriptor, termios.TCSADRAIN)

    def again() -> None:
        one_by_one()
        redraw()

    with ending_in_order(signal.SIGTERM, signal.SIGHUP), stopping_in_order(as_it_was, again):
        try:
            one_by_one()
            yield descriptor
        finally:
            as_it_was()


def pressed(descriptor: int) -> str:
    """The key that was pressed, in lower case; "" for one that is several characters, such as an arrow.

    Raises:
        KeyboardInterrupt: there is no terminal any more, which is as ^C.
    """
    try:
        typed = os.read(descriptor, 1).decode(errors="replace")
        if typed == _ESCAPE:
            # The rest of the same key; what was typed after other keys waits for its turn.
            if select([descriptor], [], [], 0)[0]:
                os.read(descriptor, _LONGEST_KEY)
            return ""
    except OSError:  # EIO: the terminal has gone
        raise KeyboardInterrupt from None
    if not typed:
        raise KeyboardInterrupt
    return typed.lower()


class Question:
    """A question on standard error that stays below whatever is told while nobody has answered."""

    def __init__(self, text: str) -> None:
        self._text = text

    def _lines(self) -> list[str]:
        """Broken between words where it is longer than the terminal is wide; the cursor stands behind a space."""
        columns, text = terminal_columns(sys.stderr), self._text.rstrip()
        *lines, last = wrapped(text, max(columns - 1, 1) if columns else 0)
        return [*lines, last + self._text[len(text) :]]

    @not_stopped()
    def show(self) -> None:
        print("\n".join(self._lines()), end="", file=sys.stderr, flush=True)

    @not_stopped()
    def hide(self) -> None:
        """Take it away, with the cursor at the beginning of its place."""
        columns, lines = terminal_columns(sys.stderr), self._lines()
        # A line that fills the last column has not begun the next.
        longer = sum(max(cells(each) - 1, 0) // columns for each in lines) if columns else 0
        above = len(lines) - 1 + longer
        up = f"{_ESCAPE}[{above}A" if above else ""
        print(f"\r{up}{_ESCAPE}[J", end="", file=sys.stderr, flush=True)

    @not_stopped()
    def answered(self, said: str) -> None:
        """Leave it there, with its answer."""
        print(said, file=sys.stderr, flush=True)

    @contextmanager
    def above(self) -> Iterator[None]:
        """What is printed within stands above it."""
        with not_stopped():
            self.hide()
            try:
                yield
            finally:
                self.show()
