"""A device that comes back from a machine in no state to be used: what is tried, what is told, and when again."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.devices import Trouble
from gpuswitch.host.simulated.faults import Call, Errno
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.pci import HoldGroup
from tests.harness.simulated.harness import GENTLE, Harness

GPU = PciAddress.parse("0000:01:00.0")
SOUND = PciAddress.parse("0000:01:00.1")
ACCELERATOR = PciAddress.parse("0000:05:00.0")
GROUP = 13


async def on_vfio(directory: Path, trouble: Trouble | None, **rules: object) -> tuple[Harness, Actor]:
    harness = await Harness.of("plain", directory, **rules)
    actor = harness.fleet.find("01:00.0")
    await harness.moved(actor, State.VFIO)
    harness.machine.devices[GPU].trouble = trouble
    actor.record.recent.clear()
    return harness, actor


def somebody_opens(harness: Harness, group: int) -> None:
    """As soon as a way back lets go of this group."""

    def opened(_: Actor, event: StepEvent) -> None:
        held = isinstance(event.step, HoldGroup) and event.status is Status.REVERTED
        if held and not harness.machine.group(group).taken:
            harness.machine.open_group(group, "somebody")

    harness.witness.on_step = opened


def done(actor: Actor) -> list[str]:
    """What was done to the device besides moving it, in order."""
    titles = [step.title for switch in actor.record.recent for step in switch.steps if step.kind in {"reset", "rescan"}]
    return list(dict.fromkeys(title.split()[0] for title in titles))


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [(None, []), (Trouble.HUNG, ["reset"]), (Trouble.LOST, ["reset", "remove", "find"])],
    ids=str,
)
async def test_what_helps_is_done_and_told(trouble: Trouble | None, expected: list[str], tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, trouble)
    switch = await harness.switch(actor, State.HOST)
    assert (switch.result, actor.state, actor.reason) == (Result.DONE, State.HOST, "")
    assert done(actor) == expected
    assert switch.recovery is bool(expected)
    assert harness.pages == []


async def test_what_the_kernel_said_is_told(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, Trouble.UNKNOWN, **GENTLE)
    harness.machine.log.append((GPU, "something of yesterday"))
    switch = await harness.switch(actor, State.HOST)
    assert switch.result is Result.REVERTED
    assert switch.reason == (
        "cannot load nvidia: No such device; the kernel says: probe with driver nvidia failed with error -22"
    )


async def test_lost_registers_are_seen_before_anything_is_moved(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, Trouble.LOST, **GENTLE)
    switch = await harness.switch(actor, State.HOST)
    assert switch.result is Result.REVERTED
    assert switch.reason == "0000:01:00.0 lost what the kernel had set up: no driver could work with that"
    assert not any(step.kind in {"unbind", "probe", "override"} for step in switch.steps)


async def test_where_nobody_can_read_them_the_driver_finds_out(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, None)
    harness.host.faults.add(Errno(errno.EIO), operation="lost")
    assert (await harness.switch(actor, State.HOST)).result is Result.DONE


async def test_where_nothing_helps_it_stays_on_vfio_and_says_so(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, Trouble.UNKNOWN)
    before = harness.snapshot()
    switch = await harness.switch(actor, State.HOST)
    assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
    assert done(actor) == ["reset", "remove", "find"]
    for words in ("cannot get it on the host after a reset", "after a removal and a rescan", "the kernel says"):
        assert words in switch.reason
    assert switch.reason.endswith("it is on vfio-pci now")
    assert actor.record.stays_out == actor.reason == switch.reason
    assert harness.snapshot() == before
    assert harness.pages == ["0000_01_00_0.json"]


@pytest.mark.parametrize("rule", ["reset_on_failure", "rescan_on_failure"])
async def test_each_can_be_forbidden(rule: str, tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, Trouble.UNKNOWN, **{rule: False})
    switch = await harness.switch(actor, State.HOST)
    assert switch.result is Result.REVERTED
    assert done(actor) == (["remove", "find"] if rule == "reset_on_failure" else ["reset"])
    tried = "a removal and a rescan" if rule == "reset_on_failure" else "a reset"
    assert f"\ncannot get it on the host after {tried}: " in switch.reason


async def test_nobody_loses_what_he_has_open(tmp_path: Path) -> None:
    """A machine opens it in the very moment between one way and the next."""
    harness, actor = await on_vfio(tmp_path, Trouble.HUNG)

    somebody_opens(harness, GROUP)
    switch = await harness.switch(actor, State.HOST)
    assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
    assert done(actor) == []


async def test_no_machine_can_take_it_meanwhile(tmp_path: Path) -> None:
    harness, actor = await on_vfio(tmp_path, Trouble.HUNG)
    refused = 0

    def take(_: Actor, event: StepEvent) -> None:
        nonlocal refused
        if event.step.kind == "reset":
            with pytest.raises(KernelError, match="busy"):
                harness.machine.open_group(GROUP, "somebody")
            refused += 1

    harness.witness.on_step = take
    assert (await harness.switch(actor, State.HOST)).result is Result.DONE
    assert refused


async def reload(harness: Harness) -> None:
    """Somebody loads the module of the driver anew."""
    await harness.machine.modules.unload("amdgpu", Call("unload", "amdgpu"))
    await harness.machine.modules.load("amdgpu", Call("load", "amdgpu"))


class TestOnceMore:
    async def out(self, directory: Path) -> tuple[Harness, Actor]:
        harness = await Harness.of("instinct", directory)
        actor = harness.fleet.find("05:00.0")
        await harness.moved(actor, State.VFIO)
        harness.machine.devices[ACCELERATOR].trouble = Trouble.UNKNOWN
        actor.record.recent.clear()
        await harness.switch(actor, State.HOST)
        assert actor.record.stays_out
        return harness, actor

    async def test_nothing_is_tried_by_the_clock(self, tmp_path: Path) -> None:
        _, actor = await self.out(tmp_path)
        await asyncio.sleep(36000)
        assert (actor.state, len(actor.record.recent)) == (State.VFIO, 1)

    async def test_after_its_module_was_loaded_anew(self, tmp_path: Path) -> None:
        harness, actor = await self.out(tmp_path)
        harness.machine.devices[ACCELERATOR].trouble = None
        await reload(harness)
        await harness.witness.until(lambda: actor.state is State.HOST)
        assert (actor.record.stays_out, actor.reason, harness.pages) == ("", "", [])

    async def test_once_for_each_time(self, tmp_path: Path) -> None:
        harness, actor = await self.out(tmp_path)
        for times in (2, 3, 4):
            await reload(harness)
            await asyncio.sleep(3600)
            assert len(actor.record.recent) == times
        assert actor.record.stays_out

    async def test_not_more_often_than_makes_sense(self, tmp_path: Path) -> None:
        harness, actor = await self.out(tmp_path)
        for _ in range(300):
            await reload(harness)
            await asyncio.sleep(1)
        assert 5 < len(actor.record.recent) < 15

    async def test_after_another_user_of_it_is_gone(self, tmp_path: Path) -> None:
        harness, actor = await self.out(tmp_path)
        await (await actor.recover()).wait()
        harness.machine.devices[ACCELERATOR].trouble = None
        group = harness.machine.devices[ACCELERATOR].shape.iommu_group
        assert group is not None
        harness.machine.open_group(group, "somebody")
        again = await harness.again()
        actor = again.fleet.find("05:00.0")
        assert actor.record.stays_out
        await asyncio.sleep(600)
        assert actor.state is State.VFIO
        again.machine.close_group(group, "somebody")
        await again.witness.until(lambda: actor.state is State.HOST)

    async def test_after_a_start_of_the_service(self, tmp_path: Path) -> None:
        harness, _ = await self.out(tmp_path)
        harness.machine.devices[ACCELERATOR].trouble = None
        again = await harness.again()
        assert again.fleet.find("05:00.0").state is State.HOST
        assert again.pages == []

    async def test_a_start_that_helps_nothing_says_the_same(self, tmp_path: Path) -> None:
        harness, _ = await self.out(tmp_path)
        again = await harness.again()
        found = again.fleet.find("05:00.0")
        assert (found.state, len(found.record.recent)) == (State.VFIO, 1)
        assert found.reason == found.record.stays_out
        assert "the kernel says" in found.reason

    async def test_what_a_machine_has_is_nobody_elses(self, tmp_path: Path) -> None:
        harness, actor = await self.out(tmp_path)
        actor.own(Owner("win11", "11111111-1111-1111-1111-111111111111"))
        assert actor.record.stays_out == ""
        await reload(harness)
        await asyncio.sleep(3600)
        assert (actor.state, len(actor.record.recent)) == (State.VFIO, 1)
