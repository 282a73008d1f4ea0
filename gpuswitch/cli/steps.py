"""Switches while they run: on a terminal the steps at work in place, elsewhere one line a step, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gpuswitch.cli.client import Gpu
from gpuswitch.cli.follow import Display, StepChange, Waiting, at_work, limit_of
from gpuswitch.cli.keys import Question
from gpuswitch.cli.output import as_json_line, clock, duration, line, numbered, on_terminal
from gpuswitch.cli.records import change_record, naming, waiting_record
from gpuswitch.cli.translate import _, mark, recognized, state_word

SHORTEST_BAR = 10
"""Columns of a terminal: a bar that is shorter tells nothing of when a step was."""


def took_words(step: Mapping[str, Any]) -> str:
    """How long a step of a finished switch took; "" where nobody knows, as its end was seen by nobody."""
    return "" if step["status"] == "interrupted" else duration(step["seconds"])


TAKEN_BACK = frozenset({"reverting", "reverted", "revert-failed"})
"""Statuses of a step."""
_BY = {"reset": mark("recovery, by a reset:"), "rescan": mark("recovery, by a removal and a rescan:")}
"""By the kind of the first step (gpuswitch/gpu/strategies.py)."""
_ONWARD = mark("recovery, on to a known-good state:")


def plan_heading(plan: int, kind: str, target: str, *, back: bool) -> str:
    """What stands above the steps of a plan of a switch to `target`, or above those that are taken back; `kind` is that
    of the first of them.
    """
    if back:
        return _("the way back:")
    return _(_BY.get(kind, _ONWARD)) if plan > 1 else _("the way to {target}:", target=target)


class Headings:
    """What stands above steps as they happen. Of the first plan nothing needs to be said until it is taken back."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, int, bool]] = {}

    def above(self, gpu: Gpu, switch: str, change: StepChange) -> str:
        """The line; "" where the step is of the same as the one before."""
        now = switch, change.plan, change.status in TAKEN_BACK
        if self._last.get(gpu.title) == now:
            return ""
        self._last[gpu.title] = now
        if now[1:] == (1, False):
            return ""
        return plan_heading(change.plan, change.kind, "", back=now[2])


def running_words(gpu: Gpu, change: StepChange) -> str:
    """A step at work, for how long it is that, and its limit."""
    title = numbered(change.index, change.count, change.title)
    if limit := limit_of(gpu.properties["Switch"], change):
        title = _("{title} (within {seconds} s)", title=title, seconds=f"{limit:g}")
    return f"{title}: {state_word(change.status)} ({duration(change.seconds)})"


class Ended:
    """Steps that ended, and those that take their time, a line each, and above those of a further plan what that is."""

    def __init__(self) -> None:
        self._headings = Headings()

    def of(self, gpu: Gpu, switch: str, change: StepChange) -> Iterator[str]:
        """Those for this change; none for a step at work."""
        if at_work(change):
            return
        yield from self._heading(gpu, switch, change)
        title = numbered(change.index, change.count, change.title)
        yield f"{title}: {state_word(change.status)} ({duration(change.seconds)})"

    def lasting(self, gpu: Gpu, switch: str, change: StepChange) -> Iterator[str]:
        """Those for a step that is at work for a while."""
        yield from self._heading(gpu, switch, change)
        yield running_words(gpu, change)

    def _heading(self, gpu: Gpu, switch: str, change: StepChange) -> Iterator[str]:
        if heading := self._headings.above(gpu, switch, change):
            yield heading


class Lines:
    """One line for each step that ended, or takes its time, and for whom somebody has to wait; `several`: each names
    its GPU.
    """

    def __init__(self, *, several: bool = False) -> None:
        self._several = several
        self._ended = Ended()

    def joined(self, gpu: Gpu, sentence: str) -> None:  # noqa: ARG002 -- it names the GPU
        line(sentence)

    def step(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        for each in self._ended.of(gpu, switch, change):
            self._say(gpu, each)

    def lasts(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        for each in self._ended.lasting(gpu, switch, change):
            self._say(gpu, each)

    def waits(self, gpu: Gpu, _switch: str, waiting: Waiting) -> None:
        # What does not say how long it is waited for is there in a moment, or fails.
        if waiting.until:
            first, *more = recognized(waiting.what).splitlines()
            self._say(gpu, _("waiting until {time}: {what}", time=clock(waiting.until), what=first))
            for each in more:
                self._say(gpu, f"  {_('and: {what}', what=each)}")

    def _say(self, gpu: Gpu, text: str) -> None:
        line(f"{gpu.title}: {text}" if self._several else text)


class Above(Lines):
    """The same above a question that nobody has answered yet."""

    def __init__(self, question: Question, *, several: bool = False) -> None:
        super().__init__(several=several)
        self._question = question

    def joined(self, gpu: Gpu, sentence: str) -> None:
        with self._question.above():
            super().joined(gpu, sentence)

    def _say(self, gpu: Gpu, text: str) -> None:
        with self._question.above():
            super()._say(gpu, text)


class JsonLines:
    """One JSON object for each event."""

    def joined(self, gpu: Gpu, sentence: str) -> None:
        """Their last event has it, as data."""

    def step(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        as_json_line({"event": "step", **naming(gpu), "id": switch, **change_record(change)})

    def lasts(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        """That it has begun was told at once."""

    def waits(self, gpu: Gpu, switch: str, waiting: Waiting) -> None:
        as_json_line({"event": "waiting", **naming(gpu), "id": switch, **waiting_record(waiting)})


def display(*, as_json: bool, several: bool) -> AbstractContextManager[Display]:
    """What suits standard output; entered while it is used."""
    if as_json:
        return nullcontext(JsonLines())
    if on_terminal(sys.stdout):
        from gpuswitch.cli.terminal import StepsInPlace  # noqa: PLC0415  # brings `rich`, which is slow to start

        return StepsInPlace(several=several)
    return nullcontext(Lines(several=several))
