"""Where in a file something stands, so that an editor can go there. tomllib keeps no places: what it reads has none.

They are found by reading the beginning of the file anew, with more and fewer lines. Only where something is wrong.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpuswitch.errors import ConfigError

Location = tuple[str | int, ...]
"""Where a key stands: `("gpu", 0, "name")`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong. `text` is the whole sentence.

    What cannot be used has `what`, the end of the sentence, and the `key` that it is about; within a file also `file`,
    and `line` and `column` (from 1; 0: not known).
    """

    text: str
    file: str = ""
    line: int = 0
    column: int = 0
    key: str = ""
    what: str = ""

    @classmethod
    def within(cls, file: str, what: str, *, line: int = 0, column: int = 0, key: str = "") -> Fault:
        """In a file."""
        place = ":".join([file, *(str(number) for number in (line, column) if number)])
        return cls(_sentence(place, key, what), file, line, column, key, what)

    @classmethod
    def of(cls, origin: str, what: str, *, key: str = "") -> Fault:
        """Of what is no file, but has a name to a person."""
        return cls(_sentence(origin, key, what), key=key, what=what)


def _sentence(place: str, key: str, what: str) -> str:
    return ": ".join(filter(None, (f"cannot use {place}", key, what)))


class ConfigFaultsError(ConfigError):
    """All that is wrong with a configuration: a line for each."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(fault.text for fault in faults))
        self.faults = faults


_MOST_LINES = 500
_MOST_CHARACTERS = 50_000
"""Of a file of more, no line is told: one list over all of it would have each of its beginnings read, for seconds."""


class Places:
    """Of the text of one file. Each beginning of it is read once, however many places are asked for."""

    def __init__(self, text: str) -> None:
        self._lines = text.replace("\r\n", "\n").split("\n")
        self._told = len(self._lines) <= _MOST_LINES and len(text) <= _MOST_CHARACTERS
        self._beginnings: dict[int, dict[str, Any] | None] = {}
        self._closed_ones: dict[int, dict[str, Any] | None] = {}

    def first_unread(self) -> int:
        """The line (from 1) from which on the file can be read with none of its beginnings. 0: that cannot be told."""
        if not self._told:
            return 0
        return next((n + 1 for n in range(len(self._lines) - 1, -1, -1) if self._read(n) is not None), 0)

    def line_of(self, location: Location) -> int:
        """The line (from 1) where this key or item begins; of one that is not there, the table where it would be. 0:
        that cannot be told.
        """
        if not self._told:
            return 0
        location = location[: _depth(self._read(len(self._lines)), location)]
        if not location:
            return 0
        end = self._first_with(location)
        # It begins behind all that could be read without it.
        start = next(number for number in range(end - 1, -1, -1) if self._read(number) is not None) + 1
        otherwise = end if isinstance(location[-1], int) else start
        return next((number for number in range(start, end) if _has(self._closed(number), location)), otherwise)

    def _first_with(self, location: Location) -> int:
        """How many lines there have to be for it to be among them, whole."""
        without, within = 0, len(self._lines)
        while within - without > 1:
            middle = (without + within) // 2
            # Not between the first and the last line of a value.
            number = next((n for n in range(middle, without, -1) if self._read(n) is not None), without)
            if number > without and _has(self._read(number), location):
                within = number
            else:
                without = middle
        return within

    def _read(self, number: int) -> dict[str, Any] | None:
        """What so many lines say; None: they end within something."""
        if number not in self._beginnings:
            self._beginnings[number] = _values(self._lines[:number])
        return self._beginnings[number]

    def _closed(self, number: int) -> dict[str, Any] | None:
        """The same where they end within a list."""
        if number not in self._closed_ones:
            self._closed_ones[number] = _values([*self._lines[:number], "]"])
        return self._closed_ones[number]


def _values(lines: Sequence[str]) -> dict[str, Any] | None:
    try:
        return tomllib.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return None


def _has(values: Any, location: Location) -> bool:
    return _depth(values, location) == len(location)


def _depth(values: Any, location: Location) -> int:
    """How many parts of the location are there."""
    for depth, part in enumerate(location):
        try:
            values = values[part]
        except (LookupError, TypeError):
            return depth
    return len(location)
