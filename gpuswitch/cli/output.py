"""Output: everything that is printed goes through here, so nothing from the bus reaches a terminal raw.

The look of a terminal is `terminal.py`'s.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TextIO

from gpuswitch.cli.client import StepChange


def clean(text: object) -> str:
    """The text on one line, with all that could move a cursor, set a colour or turn the writing direction escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def on_terminal(stream: TextIO) -> bool:
    """Whether lines on it can be redrawn and coloured."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def line(text: str) -> None:
    """Print one line, now: whoever reads a pipe wants to see a switch while it runs."""
    print(clean(text), flush=True)


def problem(text: str) -> None:
    """Say on standard error what went wrong; further lines of `text` are further reasons."""
    first, *more = map(clean, text.splitlines())
    print(f"gpuswitchctl: {first}", *(f"  {each}" for each in more), sep="\n", file=sys.stderr, flush=True)


def warning(text: str) -> None:
    """Say on standard error what somebody should look after, though nothing went wrong now."""
    print(f"gpuswitchctl: warning: {clean(text)}", file=sys.stderr, flush=True)


def as_json(value: object) -> None:
    print(json.dumps(value, indent=2), flush=True)


def as_json_line(value: object) -> None:
    print(json.dumps(value), flush=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns under their headings; an empty cell shows a dash."""
    cells = [[clean(cell) or "-" for cell in row] for row in rows]
    if on_terminal(sys.stdout):
        from gpuswitch.cli.terminal import print_table  # noqa: PLC0415  # brings `rich`, which is slow to start

        print_table(headings, cells)
    else:
        print(*aligned([headings, *cells]), sep="\n")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def pairs(items: Iterable[tuple[str, str]]) -> None:
    """Print labels and what belongs to them; a label that is empty continues the one above."""
    items = [(clean(label), clean(text)) for label, text in items]
    width = max(len(label) for label, _ in items)
    for label, text in items:
        print(f"{label:>{width}}{':' if label else ' '} {text}")


def moment(seconds: float) -> str:
    """Seconds since the epoch as local time, to the second."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def duration(seconds: float) -> str:
    """Seconds as people say them: `12 ms`, `1.24 s`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.00995 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def numbered(change: StepChange) -> str:
    """`[ 3/12] unbind 0000:01:00.1 from snd_hda_intel`."""
    count = str(change.count)
    return f"[{change.index:>{len(count)}}/{count}] {clean(change.title)}"
