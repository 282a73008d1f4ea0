"""What others do at the wrong moment: cards are pulled and put back, drivers change while a switch is decided."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Failed, NotViable, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import Switch
from tests.harness.simulated.harness import Harness

SLOT = "0000:01:00"
COMPANION = PciAddress.parse("0000:01:00.1")


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await Harness.of("plain", tmp_path)


async def becomes(harness: Harness, actor: Actor, state: State) -> None:
    """Wait until the uevents have reached the fleet, and what such a GPU shares with others is given back."""
    await harness.witness.until(lambda: actor.state is state)
    if (restoring := harness.fleet._restoring.get(actor.gpu.address)) is not None:
        await restoring


def pull(harness: Harness) -> None:
    """The card is gone all of a sudden, and the fleet knows."""
    for address in [a for a in harness.machine.devices if a.slot_name == SLOT]:
        del harness.machine.devices[address]
    harness.machine._facts = None
    harness.fleet.look()


class TestAtRest:
    async def test_absent_and_back(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        await harness.machine.unplug(SLOT)
        await becomes(harness, actor, State.ABSENT)
        with pytest.raises(NotViable, match=r"function 0000:01:00\.0 is not on the PCI bus"):
            await actor.request(State.VFIO)
        harness.replug(SLOT)
        await becomes(harness, actor, State.HOST)
        assert harness.fleet.find("01:00.0") is actor
        assert (actor.reason, harness.snapshot()) == ("", before)
        await harness.moved(actor, State.VFIO)
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_on_vfio_the_debts_go_with_the_device(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        await harness.machine.unplug(SLOT)
        await becomes(harness, actor, State.ABSENT)
        assert harness.pages == []
        harness.replug(SLOT)
        await becomes(harness, actor, State.HOST)
        assert harness.snapshot() == before

    async def test_a_companion_alone(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        device = harness.machine.devices.pop(COMPANION)
        harness.machine._facts = None
        harness.fleet.look()
        assert str(actor.state) == "unknown"
        assert "0000:01:00.1 is not on the PCI bus" in actor.reason
        with pytest.raises(NotViable, match=r"function 0000:01:00\.1 is not on the PCI bus"):
            await actor.request(State.HOST)
        harness.machine.devices[COMPANION] = device
        harness.machine._facts = None
        harness.fleet.look()
        assert actor.state is State.VFIO

    async def test_a_member_that_stays_is_owed_what_it_was(self, tmp_path: Path) -> None:
        gpu = GpuConfig(
            PciAddress.parse("0000:11:00.0"),
            managed=True,
            members=(PciAddress.parse("0000:21:00.0"),),
        )
        harness = await Harness.start(SCENARIOS["server"](), tmp_path, Config(gpus=(gpu,)))
        actor = harness.fleet.find("11:00.0")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        await harness.machine.unplug("0000:11:00")
        await becomes(harness, actor, State.ABSENT)
        assert harness.pages == ["0000_11_00_0.json"]
        harness.replug("0000:11:00")
        await becomes(harness, actor, State.UNKNOWN)
        await harness.moved(actor, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestMeanwhile:
    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    @pytest.mark.parametrize("index", range(1, 16))
    async def test_a_card_that_is_pulled_at_each_step(self, index: int, target: State, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        if target is State.HOST:
            await harness.moved(actor, State.VFIO)
        work: list[asyncio.Task[None]] = []

        def pull_then(_: Actor, event: StepEvent) -> None:
            if event.index == index and not work:
                work.append(asyncio.create_task(harness.machine.unplug(SLOT)))

        harness.witness.on_step = pull_then
        switch = await actor.request(target)
        await switch.wait()
        await asyncio.gather(*work)
        await becomes(harness, actor, State.ABSENT)
        assert str(switch.result) in {"done", "failed"}
        assert harness.pages == []
        harness.witness.on_step = None
        harness.replug(SLOT)
        await becomes(harness, actor, State.HOST)
        assert harness.snapshot() == before

    async def test_pulled_while_it_is_wedged(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        await (await actor.request(State.VFIO)).wait()
        pulling = asyncio.create_task(harness.machine.unplug(SLOT))
        await becomes(harness, actor, State.WEDGED)
        hang.release()
        await pulling
        await becomes(harness, actor, State.ABSENT)
        assert harness.pages == []


class TestWhileItIsDecided:
    """Between the first look and the first step, while the worker reads."""

    async def requested(self, harness: Harness, actor: Actor) -> tuple[asyncio.Task[Switch], Hang]:
        hang = harness.host.faults.add(Hang(), operation="capture", subject="0000:01:00.3")
        asked = asyncio.create_task(actor.request(State.VFIO))
        await hang.reached.wait()
        return asked, hang

    async def test_a_card_is_pulled(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        asked, hang = await self.requested(harness, actor)
        pull(harness)
        assert actor.state is State.ABSENT
        hang.release()
        with pytest.raises(Failed, match=r"nothing was changed"):
            await asked
        assert (actor.state, harness.pages) == (State.ABSENT, [])

    async def test_a_card_is_pulled_and_the_kernel_does_not_return(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        asked, hang = await self.requested(harness, actor)
        pull(harness)
        assert actor.state is State.ABSENT
        with pytest.raises(Wedged):
            await asked
        assert str(actor.state) == "wedged"
        hang.release()
        await harness.witness.until(lambda: actor.state is State.ABSENT)

    @pytest.mark.parametrize("seen", [True, False])
    async def test_somebody_moves_it_to_vfio(self, seen: bool, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        asked, hang = await self.requested(harness, actor)
        kernel = harness.host.kernel("somebody")
        await kernel.load("vfio_pci")
        for f in actor.gpu.present(actor.record.facts)[:3]:
            await kernel.unbind(f.address, str(f.driver_name))
            await kernel.set_override({f.address: "vfio-pci"})
            await kernel.probe(f.address)
        if seen:
            harness.fleet.look()
        before = harness.snapshot() | {"inhibitors": frozenset()}
        hang.release()
        with pytest.raises(Failed, match=r"somebody else moved 0000:01:00\.0 at the same moment; nothing was changed"):
            await asked
        assert (harness.snapshot(), harness.pages, actor.state) == (before, [], State.UNKNOWN)

    async def test_a_neighbour_comes(self, harness: Harness) -> None:
        """What the guards allowed is not so any more."""
        actor = harness.fleet.find("01:00.0")
        asked, hang = await self.requested(harness, actor)
        device = harness.machine.devices[PciAddress.parse("0000:02:00.0")]
        device.shape = replace(device.shape, iommu_group=13)
        device.changed()
        harness.machine._facts = None
        hang.release()
        with pytest.raises(Failed, match="nothing was changed"):
            await asked
        assert harness.pages == []

    async def test_it_leaves_the_fleet_only_when_that_is_over(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        asked, hang = await self.requested(harness, actor)
        gpu = GpuConfig(PciAddress.parse("0000:00:02.0"), managed=True, members=(actor.gpu.address,))
        harness.fleet.reconfigure(Config(gpus=(gpu,)))
        assert harness.fleet.find("01:00.0") is actor
        hang.release()
        await (await asked).wait()
        assert actor.state is State.VFIO
