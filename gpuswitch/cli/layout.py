"""Tables and pairs, made to fit: a terminal has so many columns, a pipe has no end.

Nothing that a person would copy is broken: addresses, names, commands. What is long is shortened from the middle, or
left out, in the order that a table names; and where even that is too wide, each row becomes a block of lines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gpuswitch.cli.output import LIST, can_write, cells, clean, in_colour, width, wrapped, write
from gpuswitch.cli.translate import _, marks, state_word

_GAP = "  "
_INDENT = "    "
"""Of what stands below a row."""
SHORTEST = 12
"""Columns of what was shortened: below that nothing can be told from it."""
_MODEL = re.compile(r".*\[([^][]+)\](?: \(rev [^)]*\))?")
"""What a maker calls it, its chip, and in brackets what it is sold as (pci.ids); as lspci has it, with a revision."""
LABELS = (
    *marks("gpu", "pid", "command", "user", "unit", "session", "has open", "to free it"),
    *marks("name", "state", "owner", "managed", "driver", "group", "with", "model"),
    *marks("when", "id", "target", "result", "took", "asked by", "reason"),
    *marks("key", "value", "set by", "after", "status", "step"),
)
"""What headings are called before a value: some languages write nouns with a capital there, and not all in capitals."""
_NO_BRIEF: Mapping[str, Callable[[str], str]] = {}
_STATES = {
    "vfio": "35",
    "detaching": "33",
    "reattaching": "33",
    "recovering": "33",
    "failed": "1;31",
    "wedged": "1;31",
    "absent": "2",
}


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    elastic: Collection[str] = (),
    left_out: Sequence[str] = (),
    brief: Mapping[str, Callable[[str], str]] = _NO_BRIEF,
    below: Sequence[str] = (),
) -> None:
    """Print aligned columns under their headings, which are translated here; an empty cell shows a dash.

    Too wide, the last of the columns `below`, which are the last ones, is put below its row, or left out where it is
    empty; then cells become `brief`, those of the columns `left_out` are left out that are empty, and then the others,
    one after the other. Where that does not do, the next of the columns `below` is put there, too, with its name, and
    in the end the `elastic` ones are shortened before others are left out than those that are empty. Which say
    something is told.
    """
    texts = [[clean(cell) or "-" for cell in row] for row in rows]
    columns, colour = width(sys.stdout), in_colour(sys.stdout)
    for text in fitted(
        headings, texts, columns, elastic=elastic, left_out=left_out, brief=brief, below=below, colour=colour
    ):
        write(text)


def fitted(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int,
    *,
    elastic: Collection[str] = (),
    left_out: Sequence[str] = (),
    brief: Mapping[str, Callable[[str], str]] = _NO_BRIEF,
    below: Sequence[str] = (),
    colour: bool = False,
) -> list[str]:
    """The lines of a table that is not wider than so many columns (0: as wide as it is)."""
    titles = [_title(heading) for heading in headings]
    labels = [_label(heading) for heading in headings]
    table = [titles, *rows]
    hangs = bool(below and columns and _too_much(table, columns) > 0)
    fit, hung = None, 0
    for hung in range(1, len(below) + 1) if hangs else [0]:
        names = headings[: len(headings) - hung]
        shown = [row[: len(names)] for row in table]
        stretch = elastic if hung in {0, len(below)} else ()
        if fit := fitting(names, shown, columns, elastic=stretch, left_out=left_out, brief=brief):
            break
    if fit is None:
        return list(_blocks(labels, rows, columns, colour=colour))
    lines = _lines(fit.rows, colour=colour)
    if hung:
        cells_below = [_below(labels, row, hung) for row in rows]
        heading = [titles[-1]] if any(row[-1] != "-" for row in rows) else []
        lines = [
            each
            for text, cells_of in zip(lines, [heading, *cells_below], strict=True)
            for each in (text, *(line for cell in cells_of for line in _hung_below(cell, columns)))
        ]
    return [*lines, *said_to_be_left_out(fit, columns, colour=colour)]


def _title(heading: str) -> str:
    """In this language; what stands in brackets behind it, such as a time zone, is none of it."""
    name, bracket, more = heading.partition(" (")
    return f"{_(name)}{bracket}{more}"


def _label(heading: str) -> str:
    """The same before a value."""
    name, bracket, more = heading.partition(" (")
    return f"{_(name.lower())}{bracket}{more}"


def _below(labels: Sequence[str], row: Sequence[str], count: int) -> list[str]:
    """So many of the last cells of a row, without those that are empty. What stands below rows needs no name; of what
    stands there for want of room, that is told.
    """
    *others, last = zip(labels[-count:], row[-count:], strict=True)
    return [
        *(f"{name}: {cell}" for name, cell in others if cell != "-"),
        *([last[1]] if last[1] != "-" else []),
    ]


class Fit(NamedTuple):
    """Rows that fit, and the headings of the columns for which there was no room, but of those that are empty."""

    rows: list[list[str]]
    left_out: list[str]


def said_to_be_left_out(fit: Fit, columns: int, *, colour: bool = False) -> list[str]:
    """What a person is told who does not see all that there is, in lines."""
    if not fit.left_out:
        return []
    named = ", ".join(map(_, fit.left_out))
    text = _("no room for {headings}: shown on a wider terminal, and by --json", headings=named)
    return remark(text, columns, colour=colour)


def remark(text: str, columns: int, *, colour: bool) -> list[str]:
    """The lines of what stands below a table and is none of it: dim where there may be colours."""
    lines = wrapped(text, columns, indent=_INDENT)
    return [f"\x1b[2m{each}\x1b[0m" for each in lines] if colour else lines


def _hung_below(cell: str, columns: int) -> list[str]:
    """A cell that stands below its row."""
    return [f"{_INDENT}{each}" for each in wrapped(cell, max(columns - len(_INDENT), 1))]


def fitting(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int,
    *,
    elastic: Collection[str] = (),
    left_out: Sequence[str] = (),
    brief: Mapping[str, Callable[[str], str]] = _NO_BRIEF,
) -> Fit | None:
    """The rows as far as so many columns have room for them, as `table` has it; None: they have none. `names` are those
    of the cells of a row.
    """
    # Nobody misses what says nothing.
    said = {name: {row[place] for row in rows} - {name, _(name), "-", ""} for place, name in enumerate(names)}
    here = [name for name in left_out if name in names]
    empty = [name for name in here if not said[name]]
    others = [name for name in here if said[name]]
    whole = [list(row) for row in rows]
    short = [[brief.get(name, str)(cell) for name, cell in zip(names, row, strict=True)] for row in rows]
    gone: list[str] = []
    for cells_of, more, elastic_now in ((whole, [""], ()), (short, ["", *empty], ()), (short, ["", *others], elastic)):
        for name in more:
            gone += [name] if name else []
            kept = [place for place, each in enumerate(names) if each not in gone]
            shown = [[row[place] for place in kept] for row in cells_of]
            stretch = [at for at, place in enumerate(kept) if names[place] in elastic_now]
            if not columns or _shrink(shown, stretch, columns):
                return Fit(shown, [each for each in gone if said[each]])
    return None


def fits(headings: Sequence[str], rows: Sequence[Sequence[str]], columns: int) -> bool:
    """Whether a table of all these columns, as `table` has it, is not wider than that (0: nothing is too wide)."""
    texts = [[clean(cell) or "-" for cell in row] for row in rows]
    return not columns or _too_much([[_title(heading) for heading in headings], *texts], columns) <= 0


def model_in_brief(text: str) -> str:
    """What it is sold as, where its maker's list says that: `NVIDIA Corporation GA104 [GeForce RTX 3070]`."""
    found = _MODEL.fullmatch(text)
    return found[1] if found else text


def _too_much(rows: Sequence[Sequence[str]], columns: int) -> int:
    """How many columns too wide they are."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    return sum(widths) + len(_GAP) * (len(widths) - 1) - columns


def _shrink(rows: list[list[str]], stretch: Sequence[int], columns: int) -> bool:
    """Shorten what may be, until all fits; whether it does."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    too_much = _too_much(rows, columns)
    for place in stretch:
        less = min(max(too_much, 0), max(widths[place] - SHORTEST, 0))
        if less:
            for row in rows:
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
    return _painted(r"(?<=  )({words})(?=  |$)", text)


def _painted(where: str, text: str) -> str:
    """With the states in their colours that stand there; {words} are those."""
    colours = {state_word(state): colour for state, colour in _STATES.items()}
    words = "|".join(map(re.escape, colours))
    return re.sub(where.format(words=words), lambda found: f"\x1b[{colours[found[0]]}m{found[0]}\x1b[0m", text)


def _blocks(labels: Sequence[str], rows: Sequence[Sequence[str]], columns: int, *, colour: bool) -> Iterator[str]:
    """A block of lines for each row: `HEADING: value`."""
    for number, row in enumerate(rows):
        if number:
            yield ""
        named = [(name, value) for name, value in zip(labels, row, strict=True) if value != "-"]
        for text in paired(named, columns):
            yield _painted(r"(?<= )({words})$", text) if colour else text


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines whose columns stand below each other."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    return [
        _GAP.join(f"{cell}{' ' * (wide - cells(cell))}" for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def pairs(items: Iterable[tuple[str, str]]) -> None:
    """Print labels and what belongs to them; a label that is empty continues the one above."""
    for text in paired([(clean(label), clean(text)) for label, text in items], width(sys.stdout)):
        write(text)


def hung(lead: str, text: str, *, paint: str = "") -> None:
    """Print a text whose further lines, where a terminal needs some, stand below its beginning, after `lead`; that in a
    colour, by its number (ECMA-48, SGR), where there may be some.
    """
    if text.startswith(LIST):
        lead, text = f"{lead}{LIST}", text.removeprefix(LIST)
    indent = cells(lead)
    columns = width(sys.stdout)
    shown = f"\x1b[{paint}m{lead}\x1b[0m" if paint and in_colour(sys.stdout) else lead
    for number, each in enumerate(wrapped(clean(text), columns - indent) if columns else [clean(text)]):
        write(f"{' ' * indent if number else shown}{each}")


def paired(items: Sequence[tuple[str, str]], columns: int) -> Iterator[str]:
    """The lines of labels and what belongs to them, not wider than so many columns where words allow it."""
    wide = max((cells(label) for label, _ in items), default=0)
    for label, text in items:
        hanging = f"{LIST}{LIST}" if text.startswith(LIST) else ""
        first, *more = wrapped(text, max(columns - wide - 2, 1) if columns else 0, indent=hanging)
        yield f"{' ' * (wide - cells(label))}{label}{':' if label else ' '} {first}".rstrip()
        yield from (f"{' ' * (wide + 2)}{each}" for each in more)


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
    while head and cells("".join(head)) > left - cells("".join(tail)):
        head.pop()
    return f"{''.join(head).rstrip()}{mark}{''.join(tail).lstrip()}"
