"""GPUs in the hands of virtual machines: acquired, opened, let go of, and home again."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Busy, Failed, GpuswitchError, Owned, Timeout
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Release
from gpuswitch.model.states import State
from gpuswitch.switch.record import Requester, Result
from tests.simulated.bed import GENTLE, Bed, config

GPU = PciAddress.parse("0000:01:00.0")
SOUND = PciAddress.parse("0000:01:00.1")
ALL = {PciAddress.parse(f"0000:01:00.{n}") for n in range(4)}
WIN11 = Owner("win11", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")
LINUX = Owner("linux", "0b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")
HOOK = Requester(0, 4711, command="dbus-send")
GROUP = 13


def managed(**rules: object) -> Config:
    own = config("laptop", **rules)
    gpus = tuple(GpuConfig(a, managed=True, rules=own.defaults) for a in (GPU, *SERVER))
    return replace(own, gpus=gpus)


SERVER = tuple(PciAddress.parse(f"0000:{bus}:00.0") for bus in ("11", "21"))


async def made(directory: Path, scenario: str = "laptop", **rules: object) -> Bed:
    return await Bed.made(SCENARIOS[scenario](), directory, managed(**rules))


@pytest.fixture
async def bed(tmp_path: Path) -> Bed:
    return await made(tmp_path)


@pytest.fixture
def actor(bed: Bed) -> Actor:
    return bed.fleet.find("01:00.0")


async def acquire(bed: Bed, owner: Owner = WIN11, addresses: set[PciAddress] = ALL) -> list[str]:
    return [str(a.gpu.address) for a in await bed.fleet.owners.acquire(owner, addresses, HOOK)]


async def running(bed: Bed, owner: Owner = WIN11) -> None:
    """It has the GPU, and its QEMU has it open."""
    await acquire(bed, owner)
    bed.machine.open_group(GROUP, owner.name)
    bed.fleet.owners.adopt(owner, ALL)
    await settled()


async def settled() -> None:
    await asyncio.sleep(1)


async def home(bed: Bed, actor: Actor) -> None:
    await bed.witness.until(lambda: actor.state is State.HOST and not actor.bound)
    await bed.fleet._arbiter.awake.settled_if_possible(actor.gpu.address)


def inhibited(bed: Bed) -> bool:
    return bool(bed.machine.units.inhibitors)


class TestThereAndBack:
    async def test_a_machine_starts_and_ends(self, bed: Bed, actor: Actor) -> None:
        before = bed.snapshot()
        assert await acquire(bed) == ["0000:01:00.0"]
        assert (actor.state, actor.owner, inhibited(bed)) == (State.VFIO, WIN11, True)
        assert actor.switch is not None
        assert actor.switch.requester == replace(HOOK, vm="win11")
        bed.machine.open_group(GROUP, "win11")
        bed.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(10_000)
        assert (actor.state, actor.owner, inhibited(bed)) == (State.VFIO, WIN11, True)
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        await home(bed, actor)
        assert (actor.owner, bed.snapshot(), bed.pages) == (None, before, [])

    async def test_a_lock_that_somebody_ends_is_taken_again(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        bed.machine.units.uninhibit("0000:01:00.0")
        await settled()
        assert (actor.owner, inhibited(bed)) == (WIN11, True)
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        await home(bed, actor)
        assert not inhibited(bed)

    async def test_what_is_not_managed_is_none_of_our_business(self, bed: Bed) -> None:
        before = bed.snapshot()
        assert await acquire(bed, addresses={PciAddress.parse("0000:00:02.0"), PciAddress.parse("0000:77:00.0")}) == []
        assert bed.snapshot() == before

    async def test_a_machine_that_names_a_part_gets_all_and_a_warning(self, bed: Bed, actor: Actor) -> None:
        assert await acquire(bed, addresses={SOUND}) == ["0000:01:00.0"]
        assert actor.state is State.VFIO
        assert "without 0000:01:00.0 and 0000:01:00.2 and 0000:01:00.3" in actor.reason

    async def test_a_gpu_that_is_on_vfio_already_is_handed_over_as_it_is(self, bed: Bed, actor: Actor) -> None:
        await bed.moved(actor, State.VFIO)
        assert not inhibited(bed)
        await acquire(bed)
        assert (actor.owner, inhibited(bed)) == (WIN11, True)

    async def test_several_at_once(self, tmp_path: Path) -> None:
        bed = await made(tmp_path, "server")
        before = bed.snapshot()
        assert await acquire(bed, addresses=set(SERVER)) == [str(a) for a in SERVER]
        assert {bed.fleet.find(str(a)).state for a in SERVER} == {State.VFIO}
        bed.fleet.owners.release(WIN11, "destroyed")
        for address in SERVER:
            await home(bed, bed.fleet.find(str(address)))
        assert bed.snapshot() == before


class TestRefused:
    async def test_while_another_machine_has_it(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        with pytest.raises(Owned, match=r"0000:01:00\.0 belongs to the virtual machine win11: shut that down first"):
            await acquire(bed, LINUX)
        assert actor.owner == WIN11

    async def test_two_in_the_same_second(self, bed: Bed, actor: Actor) -> None:
        first, second = await asyncio.gather(acquire(bed), acquire(bed, LINUX), return_exceptions=True)
        assert first == ["0000:01:00.0"]
        assert isinstance(second, Owned)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)

    async def test_while_a_program_has_it_open(self, bed: Bed, actor: Actor) -> None:
        before = bed.snapshot()
        bed.machine.run("game", uid=1000)
        bed.machine.open_card(GPU, "game")
        with pytest.raises(Busy, match="game"):
            await acquire(bed)
        await settled()
        assert (actor.state, actor.owner) == (State.HOST, None)
        bed.machine.end("game")
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_all_or_none(self, tmp_path: Path) -> None:
        """One of two is in use: the other one is not even touched."""
        bed = await made(tmp_path, "server")
        bed.machine.run("train", uid=1000)
        bed.machine.open_card(SERVER[1], "train")
        with pytest.raises(Busy, match="train"):
            await acquire(bed, addresses=set(SERVER))
        await settled()
        actors = [bed.fleet.find(str(a)) for a in SERVER]
        assert [(a.state, a.owner, len(a.record.recent)) for a in actors] == [(State.HOST, None, 0)] * 2

    async def test_all_or_none_when_one_fails_on_the_way(self, tmp_path: Path) -> None:
        bed = await made(tmp_path, "server")
        before = bed.snapshot()
        bed.host.faults.add(Errno(errno.EINVAL), operation="probe", subject=SERVER[1], nth=1)
        with pytest.raises(Failed, match="could not be handed to the virtual machine win11"):
            await acquire(bed, addresses=set(SERVER))
        for address in SERVER:
            await home(bed, bed.fleet.find(str(address)))
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_to_host_while_it_has_yet_to_open_it(self, bed: Bed, actor: Actor) -> None:
        await acquire(bed)
        with pytest.raises(Owned, match="win11, which is about to open it"):
            await actor.request(State.HOST)

    async def test_to_host_while_its_qemu_has_it_open(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        with pytest.raises(Owned, match=r"win11 \(pid"):
            await actor.request(State.HOST)
        assert (actor.state, actor.owner, inhibited(bed)) == (State.VFIO, WIN11, True)

    async def test_after_its_own_deadline(self, tmp_path: Path) -> None:
        bed = await made(tmp_path, busy="wait", wait_seconds=500.0, acquire_seconds=100.0)
        actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
        bed.machine.run("game", uid=1000)
        bed.machine.open_card(GPU, "game")
        with pytest.raises(Timeout, match=r"0000:01:00\.0 could not be handed to .* win11 within 100 s"):
            await acquire(bed)
        await home(bed, actor)
        bed.machine.end("game")
        await settled()
        assert (bed.snapshot(), bed.pages, actor.owner) == (before, [], None)


class TestTakenBack:
    @pytest.fixture
    async def bed(self, tmp_path: Path) -> Bed:
        bed = await made(tmp_path, busy="wait", wait_seconds=100.0)
        bed.machine.run("game", uid=1000)
        bed.machine.open_card(GPU, "game")
        return bed

    async def waiting(self, bed: Bed, actor: Actor) -> asyncio.Task[list[str]]:
        asking = asyncio.create_task(acquire(bed))
        await bed.witness.until(lambda: actor.state is State.DETACHING)
        await settled()
        assert actor.owner == WIN11
        return asking

    async def test_when_the_caller_leaves(self, bed: Bed, actor: Actor) -> None:
        asking = await self.waiting(bed, actor)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await home(bed, actor)
        assert actor.owner is None
        assert actor.switch is not None
        assert actor.switch.result is Result.CANCELLED

    async def test_when_it_is_released_meanwhile(self, bed: Bed, actor: Actor) -> None:
        asking = await self.waiting(bed, actor)
        bed.fleet.owners.release(WIN11, "failed")
        with pytest.raises(Failed, match="win11 was given up before it had its GPU"):
            await asking
        await home(bed, actor)

    async def test_when_it_is_released_as_it_arrives(self, bed: Bed, actor: Actor) -> None:
        """At every turn of the event loop between the end of the switch and the answer."""
        turns = 0
        while True:
            asking = await self.waiting(bed, actor)
            bed.machine.end("game")
            await bed.witness.until(lambda: actor.state is State.VFIO)
            for _ in range(turns):
                await asyncio.sleep(0)
            if asking.done():
                break
            bed.fleet.owners.release(WIN11, "failed")
            with pytest.raises(Failed, match="win11 was given up before it had its GPU"):
                await asking
            await home(bed, actor)
            bed.machine.run("game", uid=1000)
            bed.machine.open_card(GPU, "game")
            turns += 1
        assert turns > 1

    async def test_a_stranger_does_not_take_it_back(self, bed: Bed, actor: Actor) -> None:
        asking = await self.waiting(bed, actor)
        bed.fleet.owners.release(LINUX, "failed")
        bed.machine.end("game")
        assert await asking == ["0000:01:00.0"]
        assert actor.owner == WIN11

    async def test_when_the_service_stops(self, bed: Bed, actor: Actor) -> None:
        asking = await self.waiting(bed, actor)
        await bed.fleet.stop("the service is stopping")
        with pytest.raises((GpuswitchError, asyncio.CancelledError)):
            await asking
        assert actor.state is State.HOST


class TestTheEnd:
    async def test_a_release_is_not_believed_before_qemu_is_gone(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        bed.fleet.owners.release(WIN11, "destroyed")
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        bed.machine.end("win11")
        await home(bed, actor)

    async def test_qemu_is_gone_and_nobody_says_so(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        bed.machine.end("win11")
        await asyncio.sleep(9)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        await home(bed, actor)

    async def test_a_machine_that_never_starts(self, bed: Bed, actor: Actor) -> None:
        await acquire(bed)
        await asyncio.sleep(119)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        await home(bed, actor)

    async def test_who_opens_it_without_a_word_is_found_when_the_grace_is_over(self, bed: Bed, actor: Actor) -> None:
        await acquire(bed)
        bed.machine.open_group(GROUP, "win11")
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        bed.machine.end("win11")
        await home(bed, actor)

    async def test_twice_and_by_strangers(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        bed.fleet.owners.release(LINUX, "shutdown")
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        bed.fleet.owners.release(WIN11, "shutdown")
        await home(bed, actor)
        bed.fleet.owners.release(WIN11, "shutdown")
        await settled()
        assert actor.state is State.HOST

    @pytest.mark.parametrize(
        ("rules", "reason", "stays"),
        [
            ({"on_release": Release.STAY}, "shutdown", True),
            ({"on_saved": Release.STAY}, "saved", True),
            ({"on_saved": Release.STAY}, "shutdown", False),
            ({"on_release": Release.STAY, "on_migrated": Release.HOST}, "migrated", False),
        ],
    )
    async def test_where_it_goes(self, rules: dict[str, object], reason: str, stays: bool, tmp_path: Path) -> None:
        bed = await made(tmp_path, "laptop", **rules)
        actor = bed.fleet.find("01:00.0")
        await running(bed)
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, reason)
        await bed.witness.until(lambda: actor.owner is None and not actor.state.moving)
        await settled()
        assert actor.state is (State.VFIO if stays else State.HOST)
        assert not inhibited(bed)

    async def test_a_machine_that_starts_again_at_once_gets_it_again(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        await bed.witness.until(lambda: actor.state is State.REATTACHING)
        await acquire(bed)
        assert (actor.state, actor.owner, inhibited(bed)) == (State.VFIO, WIN11, True)
        bed.machine.open_group(GROUP, "win11")
        bed.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner, inhibited(bed)) == (State.VFIO, WIN11, True)

    async def test_another_machine_may_take_it_on_its_way_home(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        await bed.witness.until(lambda: actor.state is State.REATTACHING)
        await acquire(bed, LINUX)
        assert (actor.state, actor.owner) == (State.VFIO, LINUX)
        bed.machine.open_group(GROUP, "linux")
        bed.fleet.owners.adopt(LINUX, ALL)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, LINUX)

    async def test_a_way_home_that_fails_leaves_it_on_vfio_without_an_owner(self, tmp_path: Path) -> None:
        bed = await made(tmp_path, **GENTLE)
        actor = bed.fleet.find("01:00.0")
        await running(bed)
        bed.host.faults.add(Errno(errno.EINVAL), operation="probe", nth=1)
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        await bed.witness.until(lambda: actor.owner is None and actor.state is State.VFIO)
        await settled()
        assert not inhibited(bed)
        await bed.moved(actor, State.HOST)

    async def test_a_way_home_that_hangs_is_wedged_and_owned_by_nobody(self, bed: Bed, actor: Actor) -> None:
        await running(bed)
        hang = bed.host.faults.add(Hang("D", "vfio_unregister_group_dev"), operation="unbind")
        bed.machine.end("win11")
        bed.fleet.owners.release(WIN11, "shutdown")
        await bed.witness.until(lambda: actor.state is State.WEDGED)
        hang.release()
        await bed.witness.until(lambda: actor.state.stable)
