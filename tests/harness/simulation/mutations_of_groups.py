"""Further ones: faults in what is said of a GPU's IOMMU group, and of one without a driver."""

from __future__ import annotations

import pytest

from gpuswitch.gpu import gpu_record
from gpuswitch.switch.planning import guards
from gpuswitch.switch.planning import requirements as needs
from gpuswitch.switch.steps.pci import CheckGroup
from tests.harness.simulation.mutations import A_MACHINE_ASKS, breaks, nothing
from tests.harness.simulation.story import Event, Story

_A_MACHINE_ASKS_FOR_ALL = Event("vm", 0, "asks", 2)


@breaks(8, story=Story("plx", "refuse", (_A_MACHINE_ASKS_FOR_ALL,)))
def what_a_machine_asks_for_is_in_its_own_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_record.GpuRecord, "along", frozenset())


@breaks(7, story=Story("plx", "refuse", (A_MACHINE_ASKS,)))
def what_others_have_is_in_nobodys_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guards, "_neighbours", lambda *_: ())
    patch.setattr(CheckGroup, "verify", nothing)


@breaks(7, story=Story("rmrr", "refuse", (A_MACHINE_ASKS,)))
def what_the_firmware_claims_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guards, "_reserved", lambda *_: ())


@breaks(7, story=Story("reserved", "refuse", (A_MACHINE_ASKS,)))
def on_vfio_is_ready(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guards, "_viability", lambda *_: ())


@breaks(1, story=Story("driverless", "refuse", (Event("program", 0, "opens"), Event("ask", 0, "vfio"))))
def who_draws_where_no_driver_is_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(needs, "boot_framebuffers", lambda *_: ())
