"""Makes a story that breaks an invariant as short as it can be, and still break it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from tests.harness.simulation.play import played
from tests.harness.simulation.story import Event, Story

_TRIES = 400
"""A story that is no shorter after so many is short enough."""


def shrunk(story: Story, kind: str, *, play: Callable[[Story], set[str]] | None = None) -> Story:
    """The shortest story found that breaks an invariant in this way (`Violation.kind`), as this one does.

    `play` tells the ways in which a story breaks one.
    """
    breaks = play or _broken
    tries = 0
    again = True
    while again:
        again = False
        for shorter in _shorter(story):
            tries += 1
            if tries > _TRIES:
                return story
            if kind in breaks(shorter):
                story, again = shorter, True
                break
    return story


def _broken(story: Story) -> set[str]:
    return {violation.kind for violation in played(story).violations}


def _shorter(story: Story) -> Iterator[Story]:
    """Half of it, without one event, with simpler ones, under simpler rules."""
    events = story.events
    size = len(events) // 2
    while size:
        for start in range(0, len(events), size):
            yield story._replace(events=events[:start] + events[start + size :])
        size //= 2
    if story.rules != "refuse":
        yield story._replace(rules="refuse")
    for index, event in enumerate(events):
        for simpler in _simpler(event):
            yield story._replace(events=(*events[:index], simpler, *events[index + 1 :]))


def _simpler(event: Event) -> Iterator[Event]:
    if event.seconds:
        yield event._replace(seconds=0.0)
    if event.turns:
        yield event._replace(turns=0)
    if event.what == "ask" and event.number:
        yield event._replace(number=0)


def written(story: Story) -> str:
    """On one line, for `python -m tests.harness.simulation --story`."""
    return json.dumps([story.machine_name, story.rules, [list(event) for event in story.events]])


def read(text: str) -> Story:
    """What `written` wrote.

    Raises:
        ValueError: it did not.
    """
    try:
        machine_name, rules, events = json.loads(text)
        return Story(str(machine_name), str(rules), tuple(Event(*event) for event in events))
    except TypeError as error:
        raise ValueError(f"this is no story: {error}") from error
