"""Faults put into what follows a process that has GPUs (see `mutations.py`)."""

from __future__ import annotations

import asyncio

import pytest

from gpuswitch.fleet.ownership import Ownership
from tests.harness.simulation.mutations import breaks
from tests.harness.simulation.story import Event, Story

_IT_RUNS = Event("vm", 0, "runs", 1)
_LATER = Event("storm", 0, "", 2, seconds=60.0)
_IT_ENDS = Event("vm", 0, "ends", 1, seconds=60.0)


async def _at_once(*_: object) -> None:
    """It has ended, as far as this can tell."""


async def _never(*_: object) -> None:
    await asyncio.Event().wait()


@breaks(7, story=Story("pair", "refuse", (_IT_RUNS, _LATER)))
def a_process_that_has_not_opened_it_has_it_no_more(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ownership, "_until_ended", _at_once)


@breaks(7, story=Story("pair", "refuse", (_IT_RUNS, _LATER, _IT_ENDS, _LATER)))
def the_end_of_a_process_is_not_heard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ownership, "_until_ended", _never)
