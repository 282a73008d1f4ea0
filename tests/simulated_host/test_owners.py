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
from tests.harness.simulated.harness import GENTLE, Harness, config

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


async def start_harness(directory: Path, scenario: str = "laptop", **rules: object) -> Harness:
    return await Harness.start(SCENARIOS[scenario](), directory, managed(**rules))


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await start_harness(tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


async def acquire(harness: Harness, owner: Owner = WIN11, addresses: set[PciAddress] = ALL) -> list[str]:
    return [str(a.gpu.address) for a in await harness.fleet.owners.acquire(owner, addresses, HOOK)]


async def running(harness: Harness, owner: Owner = WIN11) -> None:
    """It has the GPU, and its QEMU has it open."""
    await acquire(harness, owner)
    harness.machine.open_group(GROUP, owner.name)
    harness.fleet.owners.adopt(owner, ALL)
    await settled()


async def settled() -> None:
    await asyncio.sleep(1)


async def home(harness: Harness, actor: Actor) -> None:
    await harness.witness.until(lambda: actor.state is State.HOST and not actor.bound)
    await harness.may_sleep(actor)


def inhibited(harness: Harness) -> bool:
    return bool(harness.machine.units.inhibitors)


class TestThereAndBack:
    async def test_a_machine_starts_and_ends(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        assert await acquire(harness) == ["0000:01:00.0"]
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)
        assert actor.switch is not None
        assert actor.switch.requester == replace(HOOK, vm="win11")
        harness.machine.open_group(GROUP, "win11")
        harness.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(10_000)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)
        assert (actor.owner, harness.snapshot(), harness.pages) == (None, before, [])

    async def test_a_lock_that_somebody_ends_is_taken_again(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.machine.units.uninhibit("0000:01:00.0")
        await settled()
        assert (actor.owner, inhibited(harness)) == (WIN11, True)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)
        assert not inhibited(harness)

    async def test_what_is_not_managed_is_none_of_our_business(self, harness: Harness) -> None:
        before = harness.snapshot()
        assert (
            await acquire(harness, addresses={PciAddress.parse("0000:00:02.0"), PciAddress.parse("0000:77:00.0")}) == []
        )
        assert harness.snapshot() == before

    async def test_a_machine_that_names_a_part_gets_all_and_a_warning(self, harness: Harness, actor: Actor) -> None:
        assert await acquire(harness, addresses={SOUND}) == ["0000:01:00.0"]
        assert actor.state is State.VFIO
        assert "without 0000:01:00.0 and 0000:01:00.2 and 0000:01:00.3" in actor.reason

    async def test_a_gpu_that_is_on_vfio_already_is_handed_over_as_it_is(self, harness: Harness, actor: Actor) -> None:
        await harness.moved(actor, State.VFIO)
        assert not inhibited(harness)
        await acquire(harness)
        assert (actor.owner, inhibited(harness)) == (WIN11, True)

    async def test_several_at_once(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, "server")
        before = harness.snapshot()
        assert await acquire(harness, addresses=set(SERVER)) == [str(a) for a in SERVER]
        assert {harness.fleet.find(str(a)).state for a in SERVER} == {State.VFIO}
        harness.fleet.owners.release(WIN11, "destroyed")
        for address in SERVER:
            await home(harness, harness.fleet.find(str(address)))
        assert harness.snapshot() == before


class TestRefused:
    async def test_while_another_machine_has_it(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        with pytest.raises(Owned, match=r"0000:01:00\.0 belongs to the virtual machine win11: shut that down first"):
            await acquire(harness, LINUX)
        assert actor.owner == WIN11

    async def test_two_in_the_same_second(self, harness: Harness, actor: Actor) -> None:
        first, second = await asyncio.gather(acquire(harness), acquire(harness, LINUX), return_exceptions=True)
        assert first == ["0000:01:00.0"]
        assert isinstance(second, Owned)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)

    async def test_while_a_program_has_it_open(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        harness.machine.run("game", uid=1000)
        harness.machine.open_card(GPU, "game")
        with pytest.raises(Busy, match="game"):
            await acquire(harness)
        await settled()
        assert (actor.state, actor.owner) == (State.HOST, None)
        harness.machine.end("game")
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_all_or_none(self, tmp_path: Path) -> None:
        """One of two is in use: the other one is not even touched."""
        harness = await start_harness(tmp_path, "server")
        harness.machine.run("train", uid=1000)
        harness.machine.open_card(SERVER[1], "train")
        with pytest.raises(Busy, match="train"):
            await acquire(harness, addresses=set(SERVER))
        await settled()
        actors = [harness.fleet.find(str(a)) for a in SERVER]
        assert [(a.state, a.owner, len(a.record.recent)) for a in actors] == [(State.HOST, None, 0)] * 2

    async def test_all_or_none_when_one_fails_on_the_way(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, "server")
        before = harness.snapshot()
        harness.host.faults.add(Errno(errno.EINVAL), operation="probe", subject=SERVER[1], nth=1)
        with pytest.raises(Failed, match=rf"^cannot move {SERVER[1]} to vfio \(reverted\): "):
            await acquire(harness, addresses=set(SERVER))
        for address in SERVER:
            await home(harness, harness.fleet.find(str(address)))
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_who_kept_it_all_the_time_is_told_as_a_refusal_tells_it(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, busy="wait", wait_seconds=5.0)
        harness.machine.run("game", uid=1000)
        harness.machine.open_card(GPU, "game")
        with pytest.raises(Busy, match=rf"^cannot move {GPU} to vfio \(reverted\): game \(pid .* has .* open"):
            await acquire(harness)

    async def test_to_host_while_it_has_yet_to_open_it(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        with pytest.raises(Owned, match="win11, which is about to open it"):
            await actor.request(State.HOST)

    async def test_to_host_while_its_qemu_has_it_open(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        with pytest.raises(Owned, match=r"win11 \(pid"):
            await actor.request(State.HOST)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)

    async def test_after_its_own_deadline(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, busy="wait", wait_seconds=500.0, acquire_seconds=100.0)
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        harness.machine.run("game", uid=1000)
        harness.machine.open_card(GPU, "game")
        with pytest.raises(Timeout, match=r"0000:01:00\.0 could not be handed to .* win11 within 100 s"):
            await acquire(harness)
        await home(harness, actor)
        harness.machine.end("game")
        await settled()
        assert (harness.snapshot(), harness.pages, actor.owner) == (before, [], None)


class TestTakenBack:
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        harness = await start_harness(tmp_path, busy="wait", wait_seconds=100.0)
        harness.machine.run("game", uid=1000)
        harness.machine.open_card(GPU, "game")
        return harness

    async def waiting(self, harness: Harness, actor: Actor) -> asyncio.Task[list[str]]:
        asking = asyncio.create_task(acquire(harness))
        await harness.witness.until(lambda: actor.state is State.DETACHING)
        await settled()
        assert actor.owner == WIN11
        return asking

    async def test_when_the_caller_leaves(self, harness: Harness, actor: Actor) -> None:
        asking = await self.waiting(harness, actor)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await home(harness, actor)
        assert actor.owner is None
        assert actor.switch is not None
        assert actor.switch.result is Result.CANCELLED

    async def test_when_it_is_released_meanwhile(self, harness: Harness, actor: Actor) -> None:
        asking = await self.waiting(harness, actor)
        harness.fleet.owners.release(WIN11, "failed")
        with pytest.raises(Failed, match="win11 was given up before it had its GPU"):
            await asking
        await home(harness, actor)

    async def test_when_it_is_released_as_it_arrives(self, harness: Harness, actor: Actor) -> None:
        """At every turn of the event loop between the end of the switch and the answer."""
        turns = 0
        while True:
            asking = await self.waiting(harness, actor)
            harness.machine.end("game")
            await harness.witness.until(lambda: actor.state is State.VFIO)
            for _ in range(turns):
                await asyncio.sleep(0)
            if asking.done():
                break
            harness.fleet.owners.release(WIN11, "failed")
            with pytest.raises(Failed, match="win11 was given up before it had its GPU"):
                await asking
            await home(harness, actor)
            harness.machine.run("game", uid=1000)
            harness.machine.open_card(GPU, "game")
            turns += 1
        assert turns > 1

    async def test_a_stranger_does_not_take_it_back(self, harness: Harness, actor: Actor) -> None:
        asking = await self.waiting(harness, actor)
        harness.fleet.owners.release(LINUX, "failed")
        harness.machine.end("game")
        assert await asking == ["0000:01:00.0"]
        assert actor.owner == WIN11

    async def test_when_the_service_stops(self, harness: Harness, actor: Actor) -> None:
        asking = await self.waiting(harness, actor)
        await harness.fleet.stop("the service is stopping")
        with pytest.raises((GpuswitchError, asyncio.CancelledError)):
            await asking
        assert actor.state is State.HOST


class TestTheEnd:
    async def test_a_release_is_not_believed_before_qemu_is_gone(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.fleet.owners.release(WIN11, "destroyed")
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        harness.machine.end("win11")
        await home(harness, actor)

    async def test_qemu_is_gone_and_nobody_says_so(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.machine.end("win11")
        await asyncio.sleep(9)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        await home(harness, actor)

    async def test_a_machine_that_never_starts(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        await asyncio.sleep(119)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        await home(harness, actor)

    async def test_who_opens_it_without_a_word_is_found_when_the_grace_is_over(
        self, harness: Harness, actor: Actor
    ) -> None:
        await acquire(harness)
        harness.machine.open_group(GROUP, "win11")
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        harness.machine.end("win11")
        await home(harness, actor)

    async def test_twice_and_by_strangers(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.fleet.owners.release(LINUX, "shutdown")
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)
        harness.fleet.owners.release(WIN11, "shutdown")
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
        harness = await start_harness(tmp_path, "laptop", **rules)
        actor = harness.fleet.find("01:00.0")
        await running(harness)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, reason)
        await harness.witness.until(lambda: actor.owner is None and not actor.state.moving)
        await settled()
        assert actor.state is (State.VFIO if stays else State.HOST)
        assert not inhibited(harness)

    async def test_a_machine_that_starts_again_at_once_gets_it_again(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await harness.witness.until(lambda: actor.state is State.REATTACHING)
        await acquire(harness)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)
        harness.machine.open_group(GROUP, "win11")
        harness.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)

    async def test_another_machine_may_take_it_on_its_way_home(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await harness.witness.until(lambda: actor.state is State.REATTACHING)
        await acquire(harness, LINUX)
        assert (actor.state, actor.owner) == (State.VFIO, LINUX)
        harness.machine.open_group(GROUP, "linux")
        harness.fleet.owners.adopt(LINUX, ALL)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, LINUX)

    async def test_a_way_home_that_fails_leaves_it_on_vfio_without_an_owner(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, **GENTLE)
        actor = harness.fleet.find("01:00.0")
        await running(harness)
        harness.host.faults.add(Errno(errno.EINVAL), operation="probe", nth=1)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await harness.witness.until(lambda: actor.owner is None and actor.state is State.VFIO)
        await settled()
        assert not inhibited(harness)
        await harness.moved(actor, State.HOST)

    async def test_a_way_home_that_hangs_is_wedged_and_owned_by_nobody(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        hang = harness.host.faults.add(Hang("D", "vfio_unregister_group_dev"), operation="unbind")
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await harness.witness.until(lambda: actor.state is State.WEDGED)
        hang.release()
        await harness.witness.until(lambda: actor.state.stable)
