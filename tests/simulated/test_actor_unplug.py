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
from tests.simulated.bed import Bed

SLOT = "0000:01:00"
COMPANION = PciAddress.parse("0000:01:00.1")


@pytest.fixture
async def bed(tmp_path: Path) -> Bed:
    return await Bed.of("plain", tmp_path)


async def becomes(bed: Bed, actor: Actor, state: State) -> None:
    """Wait until the uevents have reached the fleet."""
    await bed.witness.until(lambda: actor.state is state)


def pull(bed: Bed) -> None:
    """The card is gone all of a sudden, and the fleet knows."""
    for address in [a for a in bed.machine.devices if a.slot_name == SLOT]:
        del bed.machine.devices[address]
    bed.machine._facts = None
    bed.fleet.look()


class TestAtRest:
    async def test_absent_and_back(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        before = bed.snapshot()
        await bed.machine.unplug(SLOT)
        await becomes(bed, actor, State.ABSENT)
        with pytest.raises(NotViable, match=r"function 0000:01:00\.0 is not on the PCI bus"):
            await actor.request(State.VFIO)
        bed.replug(SLOT)
        await becomes(bed, actor, State.HOST)
        assert bed.fleet.find("01:00.0") is actor
        assert (actor.reason, bed.snapshot()) == ("", before)
        await bed.moved(actor, State.VFIO)
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_on_vfio_the_debts_go_with_the_device(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        await bed.machine.unplug(SLOT)
        await becomes(bed, actor, State.ABSENT)
        assert bed.pages == []
        bed.replug(SLOT)
        await becomes(bed, actor, State.HOST)
        assert bed.snapshot() == before

    async def test_a_companion_alone(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        device = bed.machine.devices.pop(COMPANION)
        bed.machine._facts = None
        bed.fleet.look()
        assert str(actor.state) == "unknown"
        assert "0000:01:00.1 is not on the PCI bus" in actor.reason
        with pytest.raises(NotViable, match=r"function 0000:01:00\.1 is not on the PCI bus"):
            await actor.request(State.HOST)
        bed.machine.devices[COMPANION] = device
        bed.machine._facts = None
        bed.fleet.look()
        assert actor.state is State.VFIO

    async def test_a_member_that_stays_is_owed_what_it_was(self, tmp_path: Path) -> None:
        gpu = GpuConfig(
            PciAddress.parse("0000:11:00.0"),
            managed=True,
            members=(PciAddress.parse("0000:21:00.0"),),
        )
        bed = await Bed.made(SCENARIOS["server"](), tmp_path, Config(gpus=(gpu,)))
        actor = bed.fleet.find("11:00.0")
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        await bed.machine.unplug("0000:11:00")
        await becomes(bed, actor, State.ABSENT)
        assert bed.pages == ["0000_11_00_0.json"]
        bed.replug("0000:11:00")
        await becomes(bed, actor, State.UNKNOWN)
        await bed.moved(actor, State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])


class TestMeanwhile:
    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    @pytest.mark.parametrize("index", range(1, 16))
    async def test_a_card_that_is_pulled_at_each_step(self, index: int, target: State, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        before = bed.snapshot()
        if target is State.HOST:
            await bed.moved(actor, State.VFIO)
        work: list[asyncio.Task[None]] = []

        def pull_then(_: Actor, event: StepEvent) -> None:
            if event.index == index and not work:
                work.append(asyncio.create_task(bed.machine.unplug(SLOT)))

        bed.witness.on_step = pull_then
        switch = await actor.request(target)
        await switch.wait()
        await asyncio.gather(*work)
        await becomes(bed, actor, State.ABSENT)
        assert str(switch.result) in {"done", "failed"}
        assert bed.pages == []
        bed.witness.on_step = None
        bed.replug(SLOT)
        await becomes(bed, actor, State.HOST)
        assert bed.snapshot() == before

    async def test_pulled_while_it_is_wedged(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        hang = bed.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        await (await actor.request(State.VFIO)).wait()
        pulling = asyncio.create_task(bed.machine.unplug(SLOT))
        await becomes(bed, actor, State.WEDGED)
        hang.release()
        await pulling
        await bed.witness.until(lambda: actor.state is State.ABSENT)
        assert bed.pages == []


class TestWhileItIsDecided:
    """Between the first look and the first step, while the worker reads."""

    async def requested(self, bed: Bed, actor: Actor) -> tuple[asyncio.Task[Switch], Hang]:
        hang = bed.host.faults.add(Hang(), operation="capture", subject="0000:01:00.3")
        asked = asyncio.create_task(actor.request(State.VFIO))
        await hang.reached.wait()
        return asked, hang

    async def test_a_card_is_pulled(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        asked, hang = await self.requested(bed, actor)
        pull(bed)
        assert actor.state is State.ABSENT
        hang.release()
        with pytest.raises(Failed, match=r"nothing was changed"):
            await asked
        assert (actor.state, bed.pages) == (State.ABSENT, [])

    async def test_a_card_is_pulled_and_the_kernel_does_not_return(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        asked, hang = await self.requested(bed, actor)
        pull(bed)
        assert actor.state is State.ABSENT
        with pytest.raises(Wedged):
            await asked
        assert str(actor.state) == "wedged"
        hang.release()
        await bed.witness.until(lambda: actor.state is State.ABSENT)

    @pytest.mark.parametrize("seen", [True, False])
    async def test_somebody_moves_it_to_vfio(self, seen: bool, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        asked, hang = await self.requested(bed, actor)
        kernel = bed.host.kernel("somebody")
        await kernel.load("vfio_pci")
        for f in actor.gpu.present(actor.record.facts)[:3]:
            await kernel.unbind(f.address, str(f.driver_name))
            await kernel.set_override({f.address: "vfio-pci"})
            await kernel.probe(f.address)
        if seen:
            bed.fleet.look()
        before = bed.snapshot()
        hang.release()
        with pytest.raises(Failed, match=r"somebody else moved 0000:01:00\.0 at the same moment; nothing was changed"):
            await asked
        assert (bed.snapshot(), bed.pages, actor.state) == (before, [], State.UNKNOWN)

    async def test_a_neighbour_comes(self, bed: Bed) -> None:
        """What the guards allowed is not so any more."""
        actor = bed.fleet.find("01:00.0")
        asked, hang = await self.requested(bed, actor)
        device = bed.machine.devices[PciAddress.parse("0000:02:00.0")]
        device.shape = replace(device.shape, iommu_group=13)
        device.changed()
        bed.machine._facts = None
        hang.release()
        with pytest.raises(Failed, match="nothing was changed"):
            await asked
        assert bed.pages == []

    async def test_it_leaves_the_fleet_only_when_that_is_over(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        asked, hang = await self.requested(bed, actor)
        gpu = GpuConfig(PciAddress.parse("0000:00:02.0"), managed=True, members=(actor.gpu.address,))
        bed.fleet.reconfigure(Config(gpus=(gpu,)))
        assert bed.fleet.find("01:00.0") is actor
        hang.release()
        await (await asked).wait()
        assert actor.state is State.VFIO
