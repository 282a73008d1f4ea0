"""SIGHUP asks for a reload, from the first moment on: its default action would end a service that starts."""

from __future__ import annotations

import signal


class Hangups:
    """Those that nobody could do anything about yet."""

    def __init__(self) -> None:
        self._arrived = False

    def hold(self) -> None:
        """Until another handler takes its place. Not by SIG_IGN, which programs that are started would inherit."""
        signal.signal(signal.SIGHUP, lambda _number, _frame: self.note())

    def note(self) -> None:
        """One has come."""
        self._arrived = True

    def taken(self) -> bool:
        """Whether one had come since this was last asked."""
        arrived, self._arrived = self._arrived, False
        return arrived


HANGUPS = Hangups()
"""A process has one handler of it."""
