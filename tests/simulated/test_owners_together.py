"""A machine that asks for GPUs and others that share an IOMMU group: none is in the way of another."""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from pathlib import Path

import pytest

from gpuswitch.config.schema import Deadlines, Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Failed, InProgress, NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.switch.record import Requester
from tests.simulated.bed import Bed

FIRST, SECOND = PciAddress.parse("0000:27:00.0"), PciAddress.parse("0000:28:00.0")
CARD, NIC = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:02:00.0")
VM = Owner("train", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")
HOOK = Requester(0, 4711, command="dbus-send")


async def made(directory: Path, scenario: str = "plx", **rules: object) -> Bed:
    """With all of them managed."""
    gpus = (CARD,) if scenario == "shared" else (FIRST, SECOND)
    own = Defaults.model_validate(rules)
    tables = tuple(GpuConfig(gpu, managed=True, rules=own) for gpu in gpus)
    return await Bed.made(SCENARIOS[scenario](), directory, Config(gpus=tables, deadlines=Deadlines(unbind=100)))


def states(bed: Bed) -> list[State]:
    return [actor.state for actor in bed.fleet.actors.values()]


def at_home(actor: Actor) -> bool:
    return actor.state is State.HOST and not actor.bound


async def all_home(bed: Bed) -> None:
    for actor in bed.fleet.actors.values():
        await bed.witness.until(partial(at_home, actor))
        await bed.fleet._arbiter.awake.settled_if_possible(actor.gpu.address)


async def test_a_machine_gets_both_of_a_group_and_gives_them_back(tmp_path: Path) -> None:
    bed = await made(tmp_path)
    before = bed.snapshot()
    assert len(await bed.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)) == 2
    bed.machine.start_vm(VM.name, [FIRST, SECOND])
    bed.fleet.owners.adopt(VM, {FIRST, SECOND})
    await asyncio.sleep(1)
    assert states(bed) == [State.VFIO, State.VFIO]
    bed.machine.end(VM.name)
    bed.fleet.owners.release(VM, "shutdown")
    await all_home(bed)
    assert (bed.snapshot(), bed.pages) == (before, [])


async def test_the_way_home_is_one_after_the_other_and_nobody_complains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each holds the group on its way."""
    bed = await made(tmp_path)
    await bed.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    caplog.clear()
    bed.fleet.owners.release(VM, "failed")
    await all_home(bed)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


async def test_one_of_them_alone_is_refused_for_the_other(tmp_path: Path) -> None:
    bed = await made(tmp_path)
    before = bed.snapshot()
    with pytest.raises(NotViable, match=r"GPU 0000:28:00\.0 .* is in IOMMU group 32 too and stays on nvidia"):
        await bed.fleet.owners.acquire(VM, {FIRST}, HOOK)
    await all_home(bed)
    assert bed.snapshot() == before


async def test_after_a_request_for_both_one_alone_is_refused_again(tmp_path: Path) -> None:
    bed = await made(tmp_path)
    await bed.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    bed.fleet.owners.release(VM, "failed")
    await all_home(bed)
    with pytest.raises(NotViable):
        await bed.fleet.find("27:00.0").request(State.VFIO)


async def test_what_one_machine_asked_for_is_nothing_to_the_next_one(tmp_path: Path) -> None:
    bed = await made(tmp_path, on_release="stay")
    await bed.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    bed.machine.start_vm(VM.name, [FIRST, SECOND])
    bed.fleet.owners.adopt(VM, {FIRST, SECOND})
    await asyncio.sleep(1)
    bed.machine.end(VM.name)
    bed.fleet.owners.release(VM, "shutdown")
    await bed.witness.until(lambda: not any(actor.record.owned for actor in bed.fleet.actors.values()))
    await (await bed.fleet.find("28:00.0").request(State.HOST)).wait()
    bed.fleet.owners.adopt(Owner("other", "another uuid"), {FIRST})
    with pytest.raises(NotViable, match=r"0000:28:00\.0"):
        await bed.fleet.find("27:00.0").plan(State.VFIO)


@pytest.mark.parametrize("function", [FIRST, SECOND], ids=str)
async def test_where_one_fails_both_are_home_again(function: PciAddress, tmp_path: Path) -> None:
    bed = await made(tmp_path)
    before = bed.snapshot()
    bed.host.faults.add(Errno(errno.EINVAL), operation="probe", subject=function)
    with pytest.raises(Failed, match="could not be handed to the virtual machine train"):
        await bed.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    await all_home(bed)
    assert (bed.snapshot(), bed.pages) == (before, [])


async def test_a_neighbour_that_the_machine_asks_for_is_libvirts_to_move(tmp_path: Path) -> None:
    bed = await made(tmp_path, "shared")
    with pytest.raises(NotViable, match=r"network card 0000:02:00\.0"):
        await bed.fleet.owners.acquire(VM, {CARD}, HOOK)
    await bed.fleet.owners.acquire(VM, {CARD, NIC}, HOOK)
    assert states(bed) == [State.VFIO]
    assert bed.machine.devices[NIC].seen().driver_name == "r8169"
    bed.fleet.owners.release(VM, "failed")
    await all_home(bed)


async def test_who_shares_a_group_waits_for_the_other_and_is_told_so(tmp_path: Path) -> None:
    bed = await made(tmp_path)
    await bed.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    hang = bed.host.faults.add(Hang(), operation="unbind")
    bed.fleet.owners.release(VM, "failed")
    await hang.reached.wait()
    waiting = next(actor for actor in bed.fleet.actors.values() if actor.state is State.VFIO)
    moving = next(actor for actor in bed.fleet.actors.values() if actor is not waiting)
    words = f"cannot be switched while {moving.gpu.address} is: they share an IOMMU group"
    with pytest.raises(InProgress, match=words):
        await waiting.request(State.HOST)
    hang.release()
    await all_home(bed)
