"""What a terminal gets instead of plain lines. Imported for a terminal only: `rich` takes longer than all the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gpuswitch.cli.client import StepChange
from gpuswitch.cli.output import clean, duration, numbered

_STATE_STYLES = {
    "vfio": "magenta",
    "detaching": "yellow",
    "reattaching": "yellow",
    "recovering": "yellow",
    "failed": "bold red",
    "wedged": "bold red",
    "absent": "dim",
}
_SHORTEST = 1 / 40
"""Of the whole width: a bar as long as that can be seen, however short the step was."""
_STEP_STYLES = {"done": "green", "failed": "bold red", "reverted": "yellow", "revert-failed": "bold red"}


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns that fold where the terminal is narrow; states are coloured."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        grid.add_column(heading, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell, _STATE_STYLES.get(cell, "")) for cell in row))
    Console().print(grid)


def print_timeline(entry: Mapping[str, Any]) -> None:
    """One bar for each step of a finished switch, placed in time; what was taken back or failed has another colour."""
    console = Console()
    grid = Table(box=None, pad_edge=False, expand=True, show_header=False)
    grid.add_column(justify="right")
    grid.add_column(max_width=console.width * 2 // 5, overflow="fold")
    grid.add_column(ratio=1, min_width=10)
    grid.add_column(overflow="fold")
    grid.add_column(justify="right", no_wrap=True)
    whole = max(entry["finished"] - entry["started"], 1e-6)
    for step in entry["steps"]:
        begin = min(step["started"] - entry["started"], whole * (1 - _SHORTEST))
        end = begin + max(step["seconds"], whole * _SHORTEST)
        status = clean(step["status"])
        style = _STEP_STYLES.get(status, "")
        bar = Bar(whole, begin, end, color=style.removeprefix("bold ") or "default")
        took = duration(step["seconds"])
        grid.add_row(str(step["index"]), Text(clean(step["title"])), bar, Text(status, style), Text(took, "dim"))
    console.print(grid)


class StepsInPlace:
    """The step at work with a running clock, redrawn in place; its line stays when it ended."""

    def __init__(self) -> None:
        self._console = Console()
        self._at_work: tuple[StepChange, float] | None = None
        self._live = Live(self, console=self._console, transient=True, refresh_per_second=10)

    def __enter__(self) -> StepsInPlace:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, change: StepChange) -> None:
        if change.at_work:
            self._at_work = (change, time.monotonic())
            return
        self._at_work = None
        status = (clean(change.status), _STEP_STYLES.get(change.status, ""))
        self._console.print(Text.assemble(f"{numbered(change)}  ", status, (f"  {duration(change.seconds)}", "dim")))

    def __rich__(self) -> Text:
        """The line that is redrawn; called from a thread of `rich`."""
        if (at_work := self._at_work) is None:
            return Text("")
        change, since = at_work
        status, elapsed = (clean(change.status), "cyan"), (f"  {time.monotonic() - since:.1f} s", "dim")
        return Text.assemble(f"{numbered(change)}  ", status, elapsed, no_wrap=True, overflow="ellipsis")
