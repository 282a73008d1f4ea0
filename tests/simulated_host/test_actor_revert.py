"""Whatever fails at whichever step, the GPU is afterwards as it was before, on every machine and both ways."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import Failed
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno, Operation, Silent
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import THE_SERVICE, Result
from gpuswitch.switch.steps.pci import Bind
from tests.harness.simulated.harness import GENTLE, GPUS, Harness, Settings, settings_of

WRITES: tuple[Operation, ...] = ("load", "keep_awake", "set_power_control", "set_override", "unbind", "probe")
USB = PciAddress.parse("0000:01:00.2")
HOST_MODULES = frozenset({"nvidia", "nvidia_drm", "nvidia_modeset", "nvidia_uvm"})
GROUPS: tuple[Operation, ...] = ("hold_group", "release_group")


async def at_the_start(scenario: str, target: State, directory: Path) -> tuple[Harness, Actor]:
    """A GPU at rest, on the other side of `target`."""
    harness = await Harness.of(scenario, directory, **GENTLE)
    actor = harness.fleet.find(GPUS[scenario])
    if target is State.HOST:
        await harness.moved(actor, State.VFIO)
    return harness, actor


async def fails_harmlessly(harness: Harness, actor: Actor, target: State, sentence: str) -> bool:
    """Switch, and see that a failure leaves no trace; whether it failed."""
    before, restore_state, state = harness.snapshot(), harness.pages, actor.state
    try:
        switch = await harness.switch(actor, target)
    except Failed as refusal:
        reason = str(refusal).removesuffix("; nothing was changed")
    else:
        if switch.result is Result.DONE:
            return False
        assert switch.result is Result.REVERTED
        reason = switch.reason
        assert actor.reason == reason
    assert sentence in reason
    if target is State.HOST:
        before |= {"modules": stay_loaded(before["modules"], harness.snapshot()["modules"])}
    assert (actor.state, harness.snapshot(), harness.pages) == (state, before, restore_state)
    return True


def stay_loaded(before: object, now: object) -> object:
    """Modules that were loaded for the way home: they move nothing, and others may use them by now."""
    assert isinstance(before, frozenset)
    assert isinstance(now, frozenset)
    return before | (now & HOST_MODULES)


@pytest.mark.parametrize("scenario", GPUS)
@pytest.mark.parametrize("operation", WRITES)
@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
async def test_an_errno_at_each_operation(target: State, operation: Operation, scenario: str, tmp_path: Path) -> None:
    harness, actor = await at_the_start(scenario, target, tmp_path)
    failures = 0
    while True:
        harness.host.faults.clear()
        harness.host.faults.add(Errno(errno.EIO), operation=operation, nth=failures + 1)
        if not await fails_harmlessly(harness, actor, target, "Input/output error"):
            break
        failures += 1
    harness.host.faults.clear()
    # What nobody unloaded is loaded still; on the way out vfio-pci sets the power itself.
    unused = {("set_power_control", State.VFIO)} | ({("load", State.HOST)} if scenario in {"apu", "server"} else set())
    assert (failures > 0) is ((operation, target) not in unused)
    await harness.moved(actor, State.HOST)


@pytest.mark.parametrize("operation", GROUPS)
async def test_an_errno_at_the_group(operation: Operation, tmp_path: Path) -> None:
    harness, actor = await at_the_start("apu", State.HOST, tmp_path)
    for nth in (1, 2):
        harness.host.faults.clear()
        harness.host.faults.add(Errno(errno.EIO), operation=operation, nth=nth)
        assert await fails_harmlessly(harness, actor, State.HOST, "Input/output error")


@pytest.mark.parametrize(
    ("target", "operation", "which"),
    [
        # the display leaves with its module, and comes with it
        (State.VFIO, "unbind", (1, 2, 3)),
        (State.VFIO, "probe", (1, 2, 3, 4)),
        (State.HOST, "unbind", (1, 2, 3, 4)),
        (State.HOST, "probe", (2, 3, 4)),
    ],
)
async def test_a_success_that_is_none(
    target: State, operation: Operation, which: tuple[int, ...], tmp_path: Path
) -> None:
    harness, actor = await at_the_start("laptop", target, tmp_path)
    for nth in which:
        harness.host.faults.clear()
        harness.host.faults.add(Silent(), operation=operation, nth=nth)
        assert await fails_harmlessly(harness, actor, target, ", not on ")


async def test_nodes_that_never_come(tmp_path: Path) -> None:
    harness, actor = await at_the_start("laptop", State.HOST, tmp_path)
    harness.host.faults.add(Silent(), operation="nodes", subject="0000:01:00.0")
    sentence = "the device nodes of 0000:01:00.0 are not ready after 15 s"
    assert await fails_harmlessly(harness, actor, State.HOST, sentence)
    await harness.moved(actor, State.HOST)


class TestTheWayBackFails:
    async def test_all_of_it_is_told_and_the_rest_comes_home(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start("laptop", State.VFIO, tmp_path)
        before = harness.snapshot()
        harness.host.faults.add(Errno(errno.EIO), operation="probe", subject=USB, nth=None)
        harness.host.faults.add(Errno(errno.EPERM), operation="probe", subject="0000:01:00.1", nth=2)
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state) == (Result.FAILED, State.FAILED)
        assert "\nthe way back failed too: " in switch.reason
        assert "cannot bind 0000:01:00.2 to xhci_hcd: Input/output error" in switch.reason.partition("too: ")[2]
        assert "cannot bind 0000:01:00.1 to snd_hda_intel: Operation not permitted" in switch.reason
        assert actor.reason == switch.reason
        assert harness.pages == ["0000_01_00_0.json"]
        lost = {USB, PciAddress.parse("0000:01:00.1")}
        assert {a for a, kept in harness.snapshot().items() if kept != before[a]} == lost

    @pytest.mark.parametrize("scenario", ["laptop", "apu"])
    async def test_a_virtual_machine_that_took_it_meanwhile_keeps_it_as_it_is(
        self, scenario: str, tmp_path: Path
    ) -> None:
        """It needs nobody's leave to open what is on vfio-pci."""
        harness, actor = await at_the_start(scenario, State.VFIO, tmp_path)
        before, functions = harness.snapshot(), actor.gpu.functions
        taken: dict[PciAddress, Settings] = {}

        def take(actor: Actor, event: StepEvent) -> None:
            if event.step == Bind(actor.gpu.address, "vfio-pci") and event.status is Status.DONE:
                harness.machine.start_vm("win11", functions)
                taken.update({a: settings_of(harness.machine.devices[a]) for a in functions})
                assert actor.switch is not None
                actor.cancel(actor.switch.id, THE_SERVICE)

        harness.witness.on_step = take
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state) == (Result.FAILED, State.VFIO)
        assert {a: settings_of(harness.machine.devices[a]) for a in functions} == taken
        harness.machine.end("win11")
        await harness.moved(actor, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_a_group_that_was_held_for_an_unbind_that_failed_is_let_go(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start("laptop", State.VFIO, tmp_path)
        harness.host.faults.add(Errno(errno.EIO), operation="probe", subject=actor.gpu.address)
        for nth in (2, 3):
            harness.host.faults.add(Errno(errno.EIO), operation="unbind", subject="0000:01:00.1", nth=nth)
        switch = await harness.switch(actor, State.VFIO)
        assert "the way back failed too: cannot unbind 0000:01:00.1" in switch.reason
        assert [group.opened_by for _, group in harness.machine.groups() if group.opened_by] == []

    async def failed(self, directory: Path) -> tuple[Harness, Actor]:
        harness, actor = await at_the_start("laptop", State.VFIO, directory)
        harness.host.faults.add(Errno(errno.EIO), operation="probe", subject=USB, nth=None)
        await harness.switch(actor, State.VFIO)
        assert actor.state is State.FAILED
        harness.host.faults.clear()
        return harness, actor

    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    async def test_failed_is_left_by_a_switch(self, target: State, tmp_path: Path) -> None:
        harness, actor = await self.failed(tmp_path)
        harness.witness.words.clear()
        await harness.moved(actor, target)
        assert harness.witness.words[0] == "0000:01:00.0 recovering"
        assert actor.reason == ""
        await harness.switch(actor, State.HOST)
        assert harness.pages == []

    async def test_failed_is_left_when_a_look_shows_home(self, tmp_path: Path) -> None:
        harness, actor = await self.failed(tmp_path)
        kernel = harness.host.kernel("somebody")
        await kernel.set_override({USB: "xhci_hcd"})
        await kernel.probe(USB)
        harness.fleet.look()
        assert actor.state is State.HOST
        # what is still owed is paid by the next to-host
        await harness.moved(actor, State.HOST)
        assert harness.pages == []

    async def test_failed_stays_failed_while_nothing_changes(self, tmp_path: Path) -> None:
        harness, actor = await self.failed(tmp_path)
        reason = actor.reason
        harness.fleet.look()
        assert (actor.state, actor.reason) == (State.FAILED, reason)

    async def test_a_switch_from_failed_that_fails_is_failed_again(self, tmp_path: Path) -> None:
        """As before is not well; and how it came to be is not forgotten."""
        harness, actor = await self.failed(tmp_path)
        story = actor.reason
        harness.host.faults.add(Errno(errno.EIO), operation="keep_awake")
        before = harness.snapshot()
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, actor.state) == (Result.FAILED, State.FAILED)
        assert actor.reason == f"{story}\nand since then: {switch.reason}"
        assert harness.snapshot() == before
        assert harness.pages
        await harness.moved(actor, State.HOST)


async def test_somebody_else_moves_it_meanwhile(tmp_path: Path) -> None:
    """All steps worked, and yet it is not where it should be."""
    harness, actor = await at_the_start("laptop", State.VFIO, tmp_path)

    kernel = harness.host.kernel("somebody")
    work: list[asyncio.Task[None]] = []

    def snatch(actor: Actor, event: StepEvent) -> None:
        if event.step == Bind(actor.gpu.address, "vfio-pci") and event.status is Status.RUNNING:
            work.append(asyncio.create_task(kernel.unbind(PciAddress.parse("0000:01:00.1"), "vfio-pci")))

    harness.witness.on_step = snatch
    switch = await harness.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.FAILED, State.FAILED)
    assert switch.reason.startswith("somebody else moved it meanwhile: neither host nor vfio: 0000:01:00.0 is on vfio")
    assert harness.pages
    harness.witness.on_step = None
    await harness.moved(actor, State.HOST)
