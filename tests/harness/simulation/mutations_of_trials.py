"""Faults put into what brings a GPU home whose trial is over (see `mutations.py`)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gpuswitch.fleet import trials
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.switch.journal.journal import Entry, Journal
from tests.harness.simulation.mutations import A_MACHINE_ASKS, breaks
from tests.harness.simulation.story import Event, Story

_TRIED = Event("trial", 0, "", 1)
_LATER = Event("storm", 0, "", 2, seconds=6.0)


async def _never(*_: object) -> None:
    await asyncio.Event().wait()


@breaks(5, story=Story("pair", "refuse", (_TRIED, _LATER)))
def a_trial_is_never_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimulatedHost, "until", _never)


@breaks(5, story=Story("pair", "refuse", (_TRIED, _LATER, Event("kill"))))
def the_next_service_knows_nothing_of_a_trial(patch: pytest.MonkeyPatch) -> None:
    load = Journal.load

    def forgetful(self: Journal, gpu: PciAddress) -> Entry:
        return replace(load(self, gpu), trial=None)

    patch.setattr(Journal, "load", forgetful)


_A_MACHINE_TAKES_IT = Event("vm", 0, "grabs", 3, seconds=6.0)
_AND_ENDS = Event("vm", 0, "ends", 3, seconds=50.0)


@breaks(5, story=Story("pair", "refuse", (_TRIED, _A_MACHINE_TAKES_IT, _AND_ENDS)))
def a_trial_that_ends_while_somebody_has_the_gpu_is_dropped(patch: pytest.MonkeyPatch) -> None:
    async def dropped(self: Any, _: object) -> None:
        self.actor.record.note("")
        self.actor.record.keep()

    patch.setattr(trials._Watch, "_until_it_may_work", dropped)


@breaks(5, story=Story("pair", "refuse", (_TRIED, _A_MACHINE_TAKES_IT, A_MACHINE_ASKS, _AND_ENDS)))
def a_machine_that_is_refused_ends_a_trial(patch: pytest.MonkeyPatch) -> None:
    own = GpuRecord.own

    def claimed(self: GpuRecord, owner: Owner | None, *, again: bool = False) -> None:
        self.keep()
        own(self, owner, again=again)

    patch.setattr(GpuRecord, "own", claimed)
