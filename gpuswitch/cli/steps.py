"""A switch while it runs: on a terminal the step at work in place, elsewhere one line a step, or JSON."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Protocol

from gpuswitch.cli.client import StepChange
from gpuswitch.cli.output import as_json_line, duration, line, numbered, on_terminal


class Display(Protocol):
    """Shows the steps of one switch, in the order of their events."""

    def step(self, change: StepChange) -> None: ...


class Lines:
    """One line for each step that ended."""

    def step(self, change: StepChange) -> None:
        if not change.at_work:
            line(f"{numbered(change)}: {change.status} ({duration(change.seconds)})")


class JsonLines:
    """One JSON object for each event."""

    def __init__(self, switch: str) -> None:
        self._switch = switch

    def step(self, change: StepChange) -> None:
        as_json_line({"event": "step", "id": self._switch, **asdict(change)})


def display(switch: str, *, as_json: bool) -> AbstractContextManager[Display]:
    """What suits standard output; entered while it is used."""
    if as_json:
        return nullcontext(JsonLines(switch))
    if on_terminal(sys.stdout):
        from gpuswitch.cli.terminal import StepsInPlace  # noqa: PLC0415  # brings `rich`, which is slow to start

        return StepsInPlace()
    return nullcontext(Lines())
