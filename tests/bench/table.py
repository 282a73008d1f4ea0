"""What was measured, beside what it should be or was. Nothing here fails: numbers of a busy machine say little."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One measured thing; `target` is empty where there is none."""

    name: str
    value: str
    target: str = ""


class Compared(NamedTuple):
    """One thing measured of two builds."""

    name: str
    this: str
    base: str
    ratio: str


_SHOWN: dict[str, list[dict[str, str]]] = {}


def show(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: names, values, and in the last column what is said of them."""
    print(f"\n{title}", flush=True)
    lines = [("", *head), *rows]
    _SHOWN[title] = [dict(zip(("what", *head), line, strict=True)) for line in lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *values, last in lines:
        cells = (value.rjust(width) for value, width in zip(values, widths[1:-1], strict=True))
        print("  " + "  ".join([name.ljust(widths[0]), *cells, last]).rstrip(), flush=True)


def write_shown(file: Path) -> None:
    """All tables so far as JSON: by title, each row as an object that has a text for each heading."""
    file.write_text(json.dumps(_SHOWN, indent=2, ensure_ascii=False) + "\n")


def median(seconds: Sequence[float]) -> str:
    return text(statistics.median(seconds))


def text(seconds: float) -> str:
    return (
        f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else microseconds(seconds)
    )


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def megabytes(kibibytes: float) -> str:
    return f"{kibibytes / 1024:.1f} MB"


def count(number: float) -> str:
    return f"{number:g}"
