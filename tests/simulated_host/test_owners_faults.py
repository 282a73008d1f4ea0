"""GPUs in the hands of virtual machines, while something is wrong with the service or its machine."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from gpuswitch.errors import KernelError, Owned, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno, Fault, Hang
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.holders import Holder, HolderQuery, Scan
from gpuswitch.model.states import State
from tests.harness.simulated.harness import Harness
from tests.simulated_host.test_owners import LINUX, WIN11, acquire, home, inhibited, running, start_harness


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await start_harness(tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


class TestTheWatch:
    """Of gpuswitch itself, or of the machine: who owns the GPU is watched all the same."""

    @pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), ValueError("no such thing")])
    async def test_in_the_watch_of_who_has_it(
        self, error: Exception, harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wait_for_change, times = harness.host.processes.wait_for_change, [0]

        async def failing(holders: Sequence[Holder]) -> None:
            times[0] += 1
            if times[0] <= 3:
                raise error
            await wait_for_change(holders)

        monkeypatch.setattr(harness.host.processes, "wait_for_change", failing)
        await running(harness)
        await asyncio.sleep(1000)
        assert times == [4]
        with pytest.raises(Owned, match="win11"):
            await acquire(harness, LINUX)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)
        assert (actor.owner, inhibited(harness)) == (None, False)

    async def test_where_no_event_would_tell(
        self, harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is looked at again and again, ever more rarely, and a minute after the end at the latest."""
        looks = []
        scan = harness.host.processes.scan

        async def counted(query: HolderQuery) -> Scan:
            looks.append(query)
            return await scan(query)

        async def deaf(_: Sequence[Holder]) -> None:
            raise KernelError("watch", "the holders", errno.EMFILE, "Too many open files")

        monkeypatch.setattr(harness.host.processes, "wait_for_change", deaf)
        await running(harness)
        monkeypatch.setattr(harness.host.processes, "scan", counted)
        await asyncio.sleep(600)
        assert len(looks) < 20
        harness.machine.end("win11")
        await asyncio.sleep(60 + 10 + 1)
        await home(harness, actor)


class TestAskedFor:
    async def test_one_that_recovers_without_a_switch(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        """None that could be cancelled or joined: it is waited for, and not asked for without a pause."""
        await harness.moved(harness.fleet.find("01:00.0"), State.VFIO)
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        hang = again.host.faults.add(Hang(), operation="hold_group")
        again.host.faults.add(Delay(4), operation="release_group")
        with pytest.raises(Wedged):
            await actor.request(State.HOST)
        hang.release()
        await again.witness.until(lambda: actor.state is State.RECOVERING)
        looks, look = 0, again.host.look

        def counted(only: Collection[PciAddress] | None = None) -> HostFacts:
            nonlocal looks
            looks += 1
            return look(only)

        monkeypatch.setattr(again.host, "look", counted)
        assert await acquire(again) == ["0000:01:00.0"]
        assert looks < 20
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)


class TestSleep:
    """The lock of a GPU is held for as long as it is under way, or a machine's; and by nobody for longer."""

    @pytest.mark.parametrize("seconds", [0.5, 4.0, 25.0])
    async def test_a_machine_that_asks_while_the_lock_of_the_last_one_is_let_go(
        self, seconds: float, tmp_path: Path
    ) -> None:
        harness = await start_harness(tmp_path, on_release="stay")
        actor = harness.fleet.find("01:00.0")
        await running(harness)
        harness.host.faults.add(Delay(seconds), operation="release_inhibitor")
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await harness.witness.until(lambda: actor.owner is None)
        await acquire(harness, LINUX)
        await asyncio.sleep(100)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, LINUX, True)

    @pytest.mark.parametrize("fault", [Errno(errno.EIO), Delay(25), Hang()], ids=["fails", "is late", "hangs"])
    async def test_one_that_is_not_had_at_once_is_had_later(self, fault: Fault, harness: Harness, actor: Actor) -> None:
        for nth in (1, 2):
            harness.host.faults.add(fault, operation="inhibit", nth=nth)
        await running(harness)
        await asyncio.sleep(100)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)

    @pytest.mark.parametrize("fault", [Errno(errno.EIO), Delay(25), Hang()], ids=["fails", "is late", "hangs"])
    async def test_one_that_does_not_go_at_once_goes_later(self, fault: Fault, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await running(harness)
        for nth in (1, 2):
            harness.host.faults.add(fault, operation="release_inhibitor", nth=nth)
        harness.machine.end("win11")
        harness.fleet.owners.release(WIN11, "shutdown")
        await home(harness, actor)
        await asyncio.sleep(100)
        assert (actor.owner, harness.snapshot()) == (None, before)

    async def test_it_is_there_before_anything_is_unbound(self, harness: Harness) -> None:
        harness.host.faults.add(Delay(5), operation="inhibit")
        awake = []
        harness.witness.on_step = lambda _, event: (
            awake.append(inhibited(harness)) if event.step.kind == "unbind" else None
        )
        await acquire(harness)
        assert awake
        assert all(awake)
