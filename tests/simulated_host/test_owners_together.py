"""A machine that asks for GPUs and others that share an IOMMU group: none is in the way of another."""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from pathlib import Path

import pytest

from gpuswitch.config.kinds import checked_table
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
from tests.harness.simulated.harness import Harness

FIRST, SECOND = PciAddress.parse("0000:27:00.0"), PciAddress.parse("0000:28:00.0")
CARD, NIC = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:02:00.0")
VM = Owner("train", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")
HOOK = Requester(0, 4711, command="dbus-send")


async def start_harness(directory: Path, scenario: str = "plx", **rules: object) -> Harness:
    """With all of them managed."""
    gpus = (CARD,) if scenario == "shared" else (FIRST, SECOND)
    own = checked_table(Defaults, rules)
    tables = tuple(GpuConfig(gpu, managed=True, rules=own) for gpu in gpus)
    return await Harness.start(SCENARIOS[scenario](), directory, Config(gpus=tables, deadlines=Deadlines(unbind=100)))


def states(harness: Harness) -> list[State]:
    return [actor.state for actor in harness.fleet.actors.values()]


def at_home(actor: Actor) -> bool:
    return actor.state is State.HOST and not actor.bound


async def all_home(harness: Harness) -> None:
    for actor in harness.fleet.actors.values():
        await harness.witness.until(partial(at_home, actor))
        await harness.fleet._arbiter.awake.settled_if_possible(actor.gpu.address)


async def test_a_machine_gets_both_of_a_group_and_gives_them_back(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path)
    before = harness.snapshot()
    assert len(await harness.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)) == 2
    harness.machine.start_vm(VM.name, [FIRST, SECOND])
    harness.fleet.owners.adopt(VM, {FIRST, SECOND})
    await asyncio.sleep(1)
    assert states(harness) == [State.VFIO, State.VFIO]
    harness.machine.end(VM.name)
    harness.fleet.owners.release(VM, "shutdown")
    await all_home(harness)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_the_way_home_is_one_after_the_other_and_nobody_complains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each holds the group on its way."""
    harness = await start_harness(tmp_path)
    await harness.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    caplog.clear()
    harness.fleet.owners.release(VM, "failed")
    await all_home(harness)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


async def test_one_of_them_alone_is_refused_for_the_other(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path)
    before = harness.snapshot()
    with pytest.raises(NotViable, match=r"GPU 0000:28:00\.0 .* is in IOMMU group 32 too and stays on nvidia"):
        await harness.fleet.owners.acquire(VM, {FIRST}, HOOK)
    await all_home(harness)
    assert harness.snapshot() == before


async def test_after_a_request_for_both_one_alone_is_refused_again(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path)
    await harness.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    harness.fleet.owners.release(VM, "failed")
    await all_home(harness)
    with pytest.raises(NotViable):
        await harness.fleet.find("27:00.0").request(State.VFIO)


async def test_what_one_machine_asked_for_is_nothing_to_the_next_one(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path, on_release="stay")
    await harness.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    harness.machine.start_vm(VM.name, [FIRST, SECOND])
    harness.fleet.owners.adopt(VM, {FIRST, SECOND})
    await asyncio.sleep(1)
    harness.machine.end(VM.name)
    harness.fleet.owners.release(VM, "shutdown")
    await harness.witness.until(lambda: not any(actor.record.owned for actor in harness.fleet.actors.values()))
    await (await harness.fleet.find("28:00.0").request(State.HOST)).wait()
    harness.fleet.owners.adopt(Owner("other", "another uuid"), {FIRST})
    with pytest.raises(NotViable, match=r"0000:28:00\.0"):
        await harness.fleet.find("27:00.0").plan(State.VFIO)


@pytest.mark.parametrize("function", [FIRST, SECOND], ids=str)
async def test_where_one_fails_both_are_home_again(function: PciAddress, tmp_path: Path) -> None:
    harness = await start_harness(tmp_path)
    before = harness.snapshot()
    harness.host.faults.add(Errno(errno.EINVAL), operation="probe", subject=function)
    with pytest.raises(Failed, match=rf"^cannot move {function} to vfio \(reverted\): "):
        await harness.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    await all_home(harness)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_a_neighbour_that_the_machine_asks_for_is_libvirts_to_move(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path, "shared")
    with pytest.raises(NotViable, match=r"network card 0000:02:00\.0"):
        await harness.fleet.owners.acquire(VM, {CARD}, HOOK)
    await harness.fleet.owners.acquire(VM, {CARD, NIC}, HOOK)
    assert states(harness) == [State.VFIO]
    assert harness.machine.devices[NIC].seen().driver_name == "r8169"
    harness.fleet.owners.release(VM, "failed")
    await all_home(harness)


async def test_who_shares_a_group_waits_for_the_other_and_is_told_so(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path)
    await harness.fleet.owners.acquire(VM, {FIRST, SECOND}, HOOK)
    hang = harness.host.faults.add(Hang(), operation="unbind")
    harness.fleet.owners.release(VM, "failed")
    await hang.reached.wait()
    waiting = next(actor for actor in harness.fleet.actors.values() if actor.state is State.VFIO)
    moving = next(actor for actor in harness.fleet.actors.values() if actor is not waiting)
    words = f"cannot be switched while {moving.gpu.address} is: they share an IOMMU group"
    with pytest.raises(InProgress, match=words):
        await waiting.request(State.HOST)
    hang.release()
    await all_home(harness)
