"""Where in a file something stands, so that an editor can go there. tomllib keeps no places: what it reads has none.

They are found by reading the beginning of the file anew, with more and fewer lines. Only where something is wrong.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
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
"""Of a file of more, no line is told: one list over all of it would have each of its beginnings read, for seconds."""


def line_of(text: str, location: Location) -> int:
    """The line (from 1) in the text of a file where this key or item begins; of one that is not there, the table where
    it would be. 0: that cannot be told.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > _MOST_LINES:
        return 0
    whole = _read(lines)
    location = location[: _depth(whole, location)]
    if not location:
        return 0
    end = _first_with(lines, location)
    # It begins behind all that could be read without it.
    start = next(number for number in range(end - 1, -1, -1) if _read(lines[:number]) is not None) + 1
    otherwise = end if isinstance(location[-1], int) else start
    return next((number for number in range(start, end) if _has(_closed(lines[:number]), location)), otherwise)


def _first_with(lines: Sequence[str], location: Location) -> int:
    """How many lines there have to be for it to be among them, whole."""
    without, within = 0, len(lines)
    while within - without > 1:
        middle = (without + within) // 2
        # Not between the first and the last line of a value.
        number, found = next(_readable(lines, middle, without), (without, None))
        if _has(found, location):
            within = number
        else:
            without = middle
    return within


def _readable(lines: Sequence[str], most: int, least: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The beginnings of a file that can be read, the longest first: of `most` lines, and of more than `least`."""
    for number in range(most, least, -1):
        if (found := _read(lines[:number])) is not None:
            yield number, found


def _closed(lines: Sequence[str]) -> dict[str, Any] | None:
    """What these lines say where they end within a list."""
    return _read([*lines, "]"])


def _read(lines: Sequence[str]) -> dict[str, Any] | None:
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
