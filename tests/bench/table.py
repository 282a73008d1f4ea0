"""What was measured, beside what it should be. Nothing here fails: numbers of a busy machine say little."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured thing; `target` is empty where there is none."""

    name: str
    value: str
    target: str = ""


def show(title: str, rows: Iterable[Row]) -> None:
    lines = [("", "measured", "target"), *((row.name, row.value, row.target) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for name, value, target in lines:
        print(f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {target}".rstrip(), flush=True)


def median(seconds: Sequence[float]) -> str:
    return text(statistics.median(seconds))


def percentile(seconds: Sequence[float], part: float) -> str:
    return text(sorted(seconds)[min(int(len(seconds) * part), len(seconds) - 1)])


def text(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.1f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.0f} µs"
    )
