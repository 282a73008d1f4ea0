"""Tables and pairs, made to fit: a terminal has so many columns, a pipe has no end.

Nothing that a person would copy is broken: addresses, names, commands. What is long is shortened from the middle, or
left out, in the order that a table names; and where even that is too wide, each row becomes a block of lines.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from unicodedata import east_asian_width

from gpuswitch.cli.output import can_write, clean, in_colour, on_terminal, write

_GAP = "  "
_SHORTEST = 12
"""Columns of what was shortened: below that nothing can be told from it."""
_STATES = {
    "vfio": "35",
    "detaching": "33",
    "reattaching": "33",
    "recovering": "33",
    "failed": "1;31",
    "wedged": "1;31",
    "absent": "2",
}
_COMMANDS = re.compile(r"\b(?:gpuswitchctl|systemctl|kill|loginctl|usermod|echo|virsh|modprobe)\b[^;,]*")
"""What stands here is to be copied: it is not broken, whatever the width."""
_KEPT = "\0"


def width() -> int:
    """Columns of the terminal on standard output; 0: it is none, and nothing needs to fit."""
    if not on_terminal(sys.stdout):
        return 0
    try:
        return int(os.environ.get("COLUMNS", "")) or os.get_terminal_size(sys.stdout.fileno()).columns
    except (ValueError, OSError):
        return 80


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    elastic: Collection[str] = (),
    left_out: Sequence[str] = (),
) -> None:
    """Print aligned columns under their headings; an empty cell shows a dash.

    Too wide, the `elastic` columns are shortened, and then the columns `left_out` are, one after the other.
    """
    cells = [[clean(cell) or "-" for cell in row] for row in rows]
    for text in fitted(headings, cells, width(), elastic=elastic, left_out=left_out, colour=in_colour(sys.stdout)):
        write(text)


def fitted(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int,
    *,
    elastic: Collection[str] = (),
    left_out: Sequence[str] = (),
    colour: bool = False,
) -> list[str]:
    """The lines of a table that is not wider than so many columns (0: as wide as it is)."""
    kept = list(range(len(headings)))
    for gone in ("", *left_out):
        kept = [number for number in kept if headings[number] != gone]
        shown = [[row[number] for number in kept] for row in (headings, *rows)]
        stretch = [place for place, number in enumerate(kept) if headings[number] in elastic]
        if not columns or _shrink(shown, stretch, columns):
            return _lines(shown, colour=colour)
    return list(_blocks(headings, rows, columns, colour=colour))


def _shrink(rows: list[list[str]], stretch: Sequence[int], columns: int) -> bool:
    """Shorten what may be, until all fits; whether it does."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    too_much = sum(widths) + len(_GAP) * (len(widths) - 1) - columns
    for place in stretch:
        less = min(max(too_much, 0), max(widths[place] - _SHORTEST, 0))
        if less:
            for row in rows[1:]:
                row[place] = shortened(row[place], widths[place] - less)
            too_much -= widths[place] - max(cells(row[place]) for row in rows)
    return too_much <= 0


def _lines(rows: Sequence[Sequence[str]], *, colour: bool) -> list[str]:
    heading, *others = aligned(rows)
    if not colour:
        return [heading, *others]
    return [f"\x1b[1m{heading}\x1b[0m", *(_coloured(text) for text in others)]


def _coloured(text: str) -> str:
    """With the states in it in their colours."""
    return re.sub(r"(?<=  )(\w+)(?=  |$)", lambda found: _paint(found[1]), text)


def _paint(word: str) -> str:
    return f"\x1b[{_STATES[word]}m{word}\x1b[0m" if word in _STATES else word


def _blocks(headings: Sequence[str], rows: Sequence[Sequence[str]], columns: int, *, colour: bool) -> Iterator[str]:
    """A block of lines for each row: `HEADING: value`."""
    for number, row in enumerate(rows):
        if number:
            yield ""
        named = [(name.lower(), value) for name, value in zip(headings, row, strict=True) if value != "-"]
        for text in paired(named, columns):
            yield re.sub(r"\w+$", lambda found: _paint(found[0]), text) if colour else text


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines whose columns stand below each other."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    return [
        _GAP.join(f"{cell}{' ' * (wide - cells(cell))}" for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def pairs(items: Iterable[tuple[str, str]]) -> None:
    """Print labels and what belongs to them; a label that is empty continues the one above."""
    for text in paired([(clean(label), clean(text)) for label, text in items], width()):
        write(text)


def paired(items: Sequence[tuple[str, str]], columns: int) -> Iterator[str]:
    """The lines of labels and what belongs to them, not wider than so many columns where words allow it."""
    wide = max(cells(label) for label, _ in items)
    for label, text in items:
        first, *more = wrapped(text, columns - wide - 2) if columns else [text]
        yield f"{' ' * (wide - cells(label))}{label}{':' if label else ' '} {first}".rstrip()
        yield from (f"{' ' * (wide + 2)}{each}" for each in more)


def wrapped(text: str, columns: int) -> list[str]:
    """The text in lines of so many columns: broken between words, and not within a command."""
    words = _COMMANDS.sub(
        lambda found: found[0].rstrip().replace(" ", _KEPT) + found[0][len(found[0].rstrip()) :], text
    )
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and cells(longer) > columns:
            lines.append(word)
        else:
            lines[-1] = longer
    return [each.replace(_KEPT, " ") for each in lines]


def shortened(text: str, columns: int) -> str:
    """The text in so many columns, without its middle where it is longer."""
    if cells(text) <= columns:
        return text
    mark = "…" if can_write("…") else "..."
    head, tail = list(text), list[str]()
    left = columns - cells(mark)
    tail_columns = left // 2
    while head and cells("".join(tail)) + cells(head[-1]) <= tail_columns:
        tail.insert(0, head.pop())
    while cells("".join(head)) > left - cells("".join(tail)):
        head.pop()
    return f"{''.join(head).rstrip()}{mark}{''.join(tail).lstrip()}"


def cells(text: str) -> int:
    """Columns that a text takes on a terminal: two for each of the wide characters of the Far East (UAX #11)."""
    if text.isascii():
        return len(text)
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)
