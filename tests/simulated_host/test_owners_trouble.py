"""GPUs in the hands of virtual machines, when things happen in an order that nobody wished for."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import Busy, Failed, Owned
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno
from gpuswitch.model.holders import HolderQuery, Scan
from gpuswitch.model.policy import Release
from gpuswitch.model.states import State
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Requester, Result
from gpuswitch.switch.steps.holders import CheckHolders
from gpuswitch.switch.steps.pci import Bind
from tests.harness.simulated.harness import GENTLE, Harness
from tests.simulated_host.test_owners import (
    ALL,
    GPU,
    GROUP,
    LINUX,
    SERVER,
    SOUND,
    WIN11,
    acquire,
    home,
    inhibited,
    running,
    settled,
    start_harness,
)

ALICE = Requester(1000, 1)


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await start_harness(tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


class TestAtOnceAgain:
    @pytest.mark.parametrize("turns", range(8))
    async def test_at_any_moment_of_the_way_home(self, turns: int, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "destroyed")
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await acquire(harness) == ["0000:01:00.0"]
        harness.machine.open_group(GROUP, "win11")
        harness.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)

    @pytest.mark.parametrize("owner", [WIN11, LINUX], ids=str)
    async def test_while_the_way_home_is_being_prepared(self, owner: object, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.host.faults.add(Delay(0.03), operation="capture", nth=None)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "destroyed")
        await asyncio.sleep(0.01)
        machine = WIN11 if owner is WIN11 else LINUX
        assert await acquire(harness, machine) == ["0000:01:00.0"]
        assert (actor.state, actor.owner) == (State.VFIO, machine)

    async def test_it_waits_for_the_qemu_that_is_still_at_its_end(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.fleet.owners.release(WIN11, "destroyed")
        asking = asyncio.create_task(acquire(harness))
        await asyncio.sleep(5)
        assert not asking.done()
        harness.machine.end("win11")
        assert await asking == ["0000:01:00.0"]
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)

    async def test_who_has_it_without_us_is_named(self, harness: Harness, actor: Actor) -> None:
        await harness.moved(actor, State.VFIO)
        harness.machine.open_group(GROUP, "by hand")
        with pytest.raises(Owned, match="by hand"):
            await acquire(harness)
        harness.machine.end("by hand")
        await settled()
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, None, False)


class TestTwoRequestsOfOneMachine:
    @pytest.mark.parametrize("late", [False, True])
    async def test_the_end_of_the_first_is_not_the_end_of_the_second(self, late: bool, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, busy="wait", wait_seconds=100.0)
        actor = harness.fleet.find("01:00.0")
        harness.machine.run("game", uid=1000)
        harness.machine.open_card(GPU, "game")
        first = asyncio.create_task(acquire(harness))
        await settled()
        second = asyncio.create_task(acquire(harness))
        await settled()
        if late:
            harness.machine.end("game")
            await harness.witness.until_step(actor.gpu, CheckHolders)
        first.cancel()
        await asyncio.wait([first])
        harness.machine.end("game")
        assert await second == ["0000:01:00.0"]
        await asyncio.sleep(60)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)

    async def test_a_refused_start_with_one_more_gpu_leaves_the_first_to_its_qemu(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, "server")
        one, other = (harness.fleet.find(str(a)) for a in SERVER)
        await acquire(harness, addresses={SERVER[0]})
        group = one.gpu.groups(one.record.facts)[0]
        harness.machine.open_group(group, "win11")
        harness.fleet.owners.adopt(WIN11, {SERVER[0]})
        await settled()
        harness.fleet.owners.release(WIN11, "destroyed")
        harness.machine.run("train", uid=1000)
        harness.machine.open_card(SERVER[1], "train")
        with pytest.raises(Busy, match="train"):
            await acquire(harness, addresses=set(SERVER))
        await settled()
        assert (one.state, one.owner, inhibited(harness)) == (State.VFIO, WIN11, True)
        assert (other.state, other.owner) == (State.HOST, None)
        harness.machine.end("win11")
        await home(harness, one)


class TestRefusedHalfWay:
    async def test_a_claim_that_cannot_be_written_leaves_the_gpu_to_whose_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        harness = await start_harness(tmp_path, "server")
        one = harness.fleet.find(str(SERVER[0]))
        await acquire(harness, addresses={SERVER[0]})
        harness.machine.open_group(one.gpu.groups(one.record.facts)[0], "win11")
        harness.fleet.owners.adopt(WIN11, {SERVER[0]})
        await settled()
        harness.fleet.owners.release(WIN11, "shutdown")
        written: list[str] = []

        def replaced(_store: DirectoryStore, name: str, _content: bytes) -> None:
            written.append(name)
            if len(written) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as full:
            full.setattr(DirectoryStore, "replace", replaced)
            with pytest.raises(Failed, match="No space left on device"):
                await acquire(harness, LINUX, addresses=set(SERVER))
        assert one.owner == WIN11
        harness.machine.end("win11")
        await home(harness, one)

    async def test_what_was_away_for_somebody_else_is_at_once_nobodys_again(self, tmp_path: Path) -> None:
        """A machine that nobody told of has it open, and may have it for days."""
        harness = await start_harness(tmp_path, "server")
        one, other = (harness.fleet.find(str(a)) for a in SERVER)
        await harness.moved(one, State.VFIO)
        harness.machine.open_group(one.gpu.groups(one.record.facts)[0], "linux")
        harness.machine.run("train", uid=1000)
        harness.machine.open_card(SERVER[1], "train")
        with pytest.raises(Busy, match="train"):
            await acquire(harness, addresses=set(SERVER))
        await settled()
        assert [(a.state, a.owner) for a in (one, other)] == [(State.VFIO, None), (State.HOST, None)]


class TestAskedForMeanwhile:
    async def test_one_that_could_not_come_home_yet_and_is_looked_at_just_then(
        self, harness: Harness, actor: Actor
    ) -> None:
        """The first machine is done with it; its next try to bring it home looks while another asks for it."""
        await running(harness)
        harness.host.faults.add(Errno(errno.EBUSY), operation="hold_group")
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await harness.witness.until(lambda: "is done with" in actor.reason)
        harness.host.faults.add(Delay(5), operation="scan", subject=GPU)
        await settled()
        await acquire(harness, LINUX)
        await asyncio.sleep(20)
        assert (actor.state, actor.owner) == (State.VFIO, LINUX)


class TestTheWayHome:
    async def test_what_takes_long_for_another_gpu_of_the_driver_is_waited_for(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, "server")
        await acquire(harness, addresses=set(SERVER))
        harness.host.faults.add(Delay(25.0), operation="probe", subject=SERVER[0])
        harness.fleet.owners.release(WIN11, "shutdown")
        for address in SERVER:
            await home(harness, harness.fleet.find(str(address)))

    async def test_a_kernel_that_is_slow_once_is_asked_again(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        harness.host.faults.add(Delay(6.0), operation="capture")
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)

    async def test_what_no_look_shows_is_not_asked_for_without_a_pause(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        harness.machine.group(GROUP).opened_by = "a descriptor on its way"
        looks = 0
        scan = harness.host.processes.scan

        async def counted(query: HolderQuery) -> Scan:
            nonlocal looks
            looks += 1
            return await scan(query)

        harness.host.processes.scan = counted  # type: ignore[method-assign] # to count
        harness.fleet.owners.release(WIN11, "failed")
        await asyncio.sleep(600)
        assert 0 < looks < 60
        assert actor.state is State.VFIO
        harness.machine.group(GROUP).opened_by = None
        await home(harness, actor)

    @pytest.mark.parametrize("nth", [1, None])
    async def test_the_machine_may_sleep_again_wherever_it_ends(self, nth: int | None, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, **GENTLE)
        actor = harness.fleet.find("01:00.0")
        await running(harness)
        harness.machine.end("win11")
        harness.host.faults.add(Errno(errno.EIO), operation="probe", subject=SOUND, nth=nth)
        harness.fleet.owners.release(WIN11, "shutdown")
        await asyncio.sleep(1000)
        assert actor.state is (State.VFIO if nth else State.FAILED)
        assert (actor.owner, inhibited(harness)) == (None, False)

    async def test_somebody_else_brought_it_home(self, harness: Harness, actor: Actor) -> None:
        """PipeWire has its sound card open there, and is not the machine."""
        await acquire(harness)
        kernel = harness.host.kernel("somebody")
        for function in sorted(ALL):
            driver = actor.record.restore_state.functions[function].driver
            await kernel.unbind(function, "vfio-pci")
            await kernel.set_override({function: driver.name if driver else "none"})
            if driver is not None:
                await kernel.load(driver.module or driver.name)
                await kernel.probe(function)
        harness.fleet.look()
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.HOST, None, False)
        assert await acquire(harness, LINUX) == ["0000:01:00.0"]

    async def test_a_persons_switch_is_not_undone_by_a_machine_that_joined_it(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, busy="wait", wait_seconds=100.0)
        actor = harness.fleet.find("01:00.0")
        harness.machine.run("game", uid=1000)
        harness.machine.open_card(GPU, "game")
        switch = await actor.request(State.VFIO, requester=ALICE)
        asking = asyncio.create_task(acquire(harness))
        await settled()
        asking.cancel()
        await settled()
        harness.machine.end("game")
        await switch.wait()
        await asyncio.sleep(1000)
        assert (switch.result, actor.state, actor.owner) == (Result.DONE, State.VFIO, None)
        assert not inhibited(harness)


class TestNobodyElse:
    async def test_to_host_after_a_restart_while_the_machine_is_about_to_open_it(self, harness: Harness) -> None:
        await acquire(harness)
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        with pytest.raises(Owned, match="about to open it"):
            await actor.request(State.HOST, requester=ALICE)
        again.machine.open_group(GROUP, "win11")
        again.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(1000)
        assert actor.state is State.VFIO

    async def test_a_recovery_does_not_take_it_either(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        with pytest.raises(Owned, match="about to open it"):
            await actor.recover()

    async def test_where_it_stays_it_stays_for_the_next(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, on_release=Release.STAY)
        actor = harness.fleet.find("01:00.0")
        await running(harness)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await settled()
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, None, False)
        await running(harness, LINUX)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, LINUX, True)


class TestRestart:
    async def test_a_machine_that_runs_is_found_again(self, harness: Harness, actor: Actor) -> None:
        await running(harness)
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        assert (actor.state, actor.owner, inhibited(again)) == (State.VFIO, WIN11, True)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner, inhibited(again)) == (State.VFIO, WIN11, True)
        again.machine.end("win11")
        await home(again, actor)

    async def test_one_that_ended_meanwhile_is_forgotten(self, harness: Harness) -> None:
        before = harness.snapshot()
        await running(harness)
        harness.machine.end("win11")
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        await home(again, actor)
        assert (again.snapshot(), again.pages) == (before, [])

    async def test_one_whose_request_died_with_the_service_has_nothing(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        asking = asyncio.create_task(acquire(harness))
        await harness.witness.until_step(actor.gpu, Bind)
        again = await harness.crash(actor)
        actor = again.fleet.find("01:00.0")
        assert (actor.state, actor.owner) == (State.HOST, None)
        await home(again, actor)
        assert (again.snapshot(), again.pages) == (before, [])
        asking.cancel()

    async def test_a_machine_from_before_the_service_is_adopted(self, harness: Harness, actor: Actor) -> None:
        """It was started with the GPU on vfio-pci already; libvirt tells of it when it comes back."""
        await harness.moved(actor, State.VFIO)
        harness.machine.open_group(GROUP, "win11")
        harness.fleet.owners.adopt(WIN11, ALL)
        await settled()
        assert (actor.owner, inhibited(harness)) == (WIN11, True)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)

    async def test_a_machine_that_runs_without_our_gpu_is_only_told_of(
        self, harness: Harness, actor: Actor, caplog: pytest.LogCaptureFixture
    ) -> None:
        harness.fleet.owners.adopt(WIN11, ALL)
        await settled()
        assert (actor.state, actor.owner) == (State.HOST, None)
        assert "the virtual machine win11 runs with 0000:01:00.0, which is host" in caplog.text
