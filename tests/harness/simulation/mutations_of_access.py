"""Faults put into what lets a user open a GPU's nodes of vfio, and takes that back (see `mutations.py`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuswitch.fleet.access import VfioAccess
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.journal.journal import Entry, Journal
from gpuswitch.switch.steps.access import TakeAccessBack
from tests.harness.simulation.mutations import breaks, nothing
from tests.harness.simulation.story import Event, Story

_A_COMMAND_RUNS, _AND_ENDS = Event("vm", 0, "runs", 1), Event("vm", 0, "ends", 1, seconds=50.0)
_STAYS = Story("pair", "stay", (_A_COMMAND_RUNS, _AND_ENDS))


async def _taken(*_: object) -> bool:
    return True


@breaks(7, story=_STAYS)
def who_had_a_command_may_open_the_gpu_afterwards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VfioAccess, "take_back", _taken)
    patch.setattr(TakeAccessBack, "apply", nothing)


@breaks(7, story=Story("pair", "stay", (_A_COMMAND_RUNS, Event("kill", seconds=6.0), _AND_ENDS)))
def the_next_service_does_not_know_who_may_open_the_gpu(patch: pytest.MonkeyPatch) -> None:
    load = Journal.load

    def forgetful(self: Journal, gpu: PciAddress) -> Entry:
        entry = load(self, gpu)
        return replace(entry, restore_state=replace(entry.restore_state, access=()))

    patch.setattr(Journal, "load", forgetful)


@breaks(7, story=_STAYS)
def nobody_is_let_open_what_is_handed_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VfioAccess, "give", nothing)
