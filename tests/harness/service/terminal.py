"""A person at a terminal of their own, in front of a program."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

INTERRUPT = "\x03"
END = "\x04"


class Terminal:
    """`command` runs on it, and what is typed as ^C is a signal there. `columns`: how wide it is."""

    def __init__(self, command: Sequence[str | Path], environ: Mapping[str, str], columns: int = 200) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        # It has to be the terminal of its session, or nobody would be sent a signal.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], env=environ, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.raw = ""
        """All that was written there until now."""
        self._read_until = 0

    @property
    def shown(self) -> str:
        """The same without what colours it and moves on it."""
        return words(self.raw)

    def until(self, text: str) -> None:
        """Wait until these words come, after those that were waited for before."""
        while (found := self.shown.find(text, self._read_until)) < 0:
            assert self._read(), f"{text!r} never came:\n{self.shown}"
        self._read_until = found + len(text)

    def modes(self) -> list[int | list[bytes | int]]:
        """How it is set: line by line or key by key, with or without an echo (termios(3))."""
        return termios.tcgetattr(self._ours)

    def press(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        """Its exit status, when it is over and all is read."""
        while self._read():
            pass
        return self.process.wait()

    def _read(self) -> bool:
        """Whether there is more; Linux tells the other side's end as an error (EIO)."""
        try:
            data = os.read(self._ours, 4096)
        except OSError:
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def words(shown: str) -> str:
    """What a terminal shows, without what colours it and moves on it."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
