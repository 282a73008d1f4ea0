"""What libvirt is not done with stays on vfio, whoever wants it home: see `gpuswitch.switch.shared.books`.

To sleep here is to let the virtual clock run, past whatever would end too early.
"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, Owned
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.libvirt import LIBVIRTD
from gpuswitch.model.policy import Options, Release
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.pci import AwaitLibvirt
from tests.harness.simulated.harness import Harness, is_step
from tests.simulated_host.test_owners import (
    ALL,
    GROUP,
    HOOK,
    SOUND,
    WIN11,
    acquire,
    home,
    inhibited,
    running,
    settled,
    start_harness,
)

PATIENCE = 60.0


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return with_libvirt(await start_harness(tmp_path))


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


def with_libvirt(harness: Harness) -> Harness:
    """Its daemon runs, and clears up as soon as it starts."""
    harness.machine.units.add(LIBVIRTD)
    harness.machine.libvirt.started = lambda: harness.machine.libvirt.cleared_up(WIN11)
    return harness


def enters(harness: Harness) -> None:
    """The machine is in the books."""
    harness.machine.libvirt.enter(WIN11, tuple(sorted(ALL)))


async def started(harness: Harness) -> None:
    """By libvirt."""
    await running(harness)
    enters(harness)


async def ended(harness: Harness) -> None:
    """It was started by libvirt, and its QEMU has ended; libvirt takes its time."""
    await started(harness)
    harness.machine.end("win11")
    await asyncio.sleep(100)


async def left(harness: Harness, actor: Actor) -> None:
    """On vfio, of nobody, and in the books of a machine that has ended."""
    await harness.moved(actor, State.VFIO)
    enters(harness)


def cannot_start(harness: Harness) -> None:
    """No unit can be started."""
    harness.host.faults.add(Errno(errno.EIO), operation="start_unit", nth=None)


def dies(harness: Harness) -> None:
    """The daemon, then QEMU."""
    harness.machine.units.settle(LIBVIRTD, "inactive")
    harness.machine.end("win11")


class TestTheDaemonIsThere:
    async def test_it_may_take_its_time(self, harness: Harness, actor: Actor) -> None:
        await started(harness)
        harness.machine.end("win11")
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.VFIO, WIN11, True)
        assert actor.reason == (
            "the virtual machine win11 is gone, and libvirt is not done with it: 0000:01:00.0 stays on vfio until it is"
        )
        harness.machine.libvirt.cleared_up(WIN11)
        await home(harness, actor)
        assert (actor.owner, actor.reason, harness.machine.libvirt.reset) == (None, "", [])

    async def test_its_word_is_enough(self, harness: Harness, actor: Actor) -> None:
        await ended(harness)
        harness.fleet.owners.release(WIN11, "destroyed")
        await home(harness, actor)

    async def test_why_the_machine_ended_is_heard(self, tmp_path: Path) -> None:
        """The hook is called when the books are cleared: where it goes is not decided before."""
        harness = with_libvirt(await start_harness(tmp_path, on_saved=Release.STAY))
        actor = harness.fleet.find("01:00.0")
        await ended(harness)
        harness.machine.libvirt.cleared_up(WIN11)
        await asyncio.sleep(2)
        harness.fleet.owners.release(WIN11, "saved")
        await settled()
        assert (actor.state, actor.owner) == (State.VFIO, None)

    async def test_it_dies_over_it(self, harness: Harness, actor: Actor) -> None:
        await ended(harness)
        harness.machine.units.settle(LIBVIRTD, "failed")
        await home(harness, actor)
        assert (harness.state(LIBVIRTD), harness.machine.libvirt.reset) == ("active", [])

    async def test_a_machine_that_never_opened_it(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        enters(harness)
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        harness.machine.libvirt.cleared_up(WIN11)
        await home(harness, actor)

    async def test_it_stays_on_vfio_for_good(self, tmp_path: Path) -> None:
        harness = with_libvirt(await start_harness(tmp_path, on_release=Release.STAY))
        actor = harness.fleet.find("01:00.0")
        await ended(harness)
        assert actor.record.owned
        harness.machine.libvirt.cleared_up(WIN11)
        await asyncio.sleep(20)
        assert (actor.state, actor.owner, actor.reason) == (State.VFIO, None, "")

    async def test_where_somebody_moved_a_part_of_it_meanwhile_that_is_still_told(self, tmp_path: Path) -> None:
        harness = with_libvirt(await start_harness(tmp_path, on_release=Release.STAY))
        actor = harness.fleet.find("01:00.0")
        await started(harness)
        harness.machine.end("win11")
        kernel = harness.host.kernel("somebody")
        await kernel.unbind(SOUND, "vfio-pci")
        await kernel.set_override({SOUND: "snd_hda_intel"})
        await kernel.probe(SOUND)
        await asyncio.sleep(100)
        split, waiting = actor.reason.split("; ")
        assert "0000:01:00.1 is on snd_hda_intel" in split
        assert "libvirt is not done with it" in waiting
        harness.machine.libvirt.cleared_up(WIN11)
        await asyncio.sleep(20)
        assert (actor.state, actor.owner, actor.reason) == (State.UNKNOWN, None, split)

    @pytest.mark.parametrize("policy", ["refuse", "wait"])
    async def test_it_comes_late_and_is_slow(self, policy: str, tmp_path: Path) -> None:
        """Only while it is away does patience run out."""
        harness = with_libvirt(await start_harness(tmp_path, busy=policy))
        harness.machine.libvirt.started = lambda: None
        actor = harness.fleet.find("01:00.0")
        cannot_start(harness)
        await started(harness)
        dies(harness)
        await asyncio.sleep(PATIENCE - 10)
        harness.machine.units.settle(LIBVIRTD, "active")
        await asyncio.sleep(1000)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        harness.machine.libvirt.cleared_up(WIN11)
        await home(harness, actor)
        assert harness.machine.libvirt.reset == []

    async def test_who_opens_it_after_the_grace_has_it(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        enters(harness)
        await asyncio.sleep(200)
        assert actor.reason == (
            "the virtual machine win11 has not opened 0000:01:00.0, and libvirt is not done with it: 0000:01:00.0 "
            "stays on vfio until it is"
        )
        harness.machine.open_group(GROUP, "win11")
        harness.fleet.owners.adopt(WIN11, ALL)
        await settled()
        assert (actor.owner, actor.record.awaited, actor.reason) == (WIN11, False, "")
        harness.machine.end("win11")
        harness.machine.libvirt.cleared_up(WIN11)
        await home(harness, actor)


class TestTheDaemonIsGone:
    async def test_it_is_started(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await started(harness)
        dies(harness)
        await home(harness, actor)
        assert (actor.owner, harness.snapshot(), harness.machine.libvirt.reset) == (None, before, [])

    async def test_not_before_the_service_is_ready(self, harness: Harness) -> None:
        await started(harness)
        dies(harness)
        await harness.fleet.stop("the service is stopping")
        harness = await harness.again(restore_deferred=False)
        await asyncio.sleep(1000)
        assert harness.state(LIBVIRTD) == "inactive"
        await harness.fleet.restore_deferred()
        await home(harness, harness.fleet.find("01:00.0"))
        assert harness.state(LIBVIRTD) == "active"

    @pytest.mark.parametrize("policy", ["refuse", "wait"])
    async def test_it_cannot_be_had(self, policy: str, tmp_path: Path) -> None:
        harness = with_libvirt(await start_harness(tmp_path, busy=policy))
        actor = harness.fleet.find("01:00.0")
        cannot_start(harness)
        await started(harness)
        dies(harness)
        await asyncio.sleep(PATIENCE / 2)
        assert (actor.state, actor.owner) == (State.VFIO, WIN11)
        await asyncio.sleep(PATIENCE)
        assert (actor.state, actor.owner, inhibited(harness)) == (State.HOST, None, False)
        assert actor.reason == (
            "0000:01:00.0 is on the host, and libvirt still has the virtual machine win11 in its books: it resets the "
            "GPU by the bus when it clears up after that"
        )
        harness.machine.units.settle(LIBVIRTD, "active")
        await settled()
        assert actor.reason == (
            "libvirt has reset 0000:01:00.0 by the bus while it was on the host, and 0000:01:00.0 and 0000:01:00.1 and "
            "0000:01:00.2 and 0000:01:00.3 lost what the kernel had set up: take its functions off the PCI bus and "
            "rescan, or restart the machine"
        )

    async def test_it_comes_late_and_resets_nothing(self, harness: Harness, actor: Actor) -> None:
        """Also where the service was started anew meanwhile."""
        cannot_start(harness)
        await started(harness)
        dies(harness)
        await asyncio.sleep(2 * PATIENCE)
        await harness.fleet.stop("the service is stopping")
        harness = await harness.again()
        actor = harness.fleet.find("01:00.0")
        await settled()
        assert "still has the virtual machine win11 in its books" in actor.reason
        del harness.machine.libvirt.machines[WIN11]
        harness.machine.units.settle(LIBVIRTD, "active")
        await settled()
        assert actor.reason == ""

    async def test_all_the_time_that_it_was_away_counts(self, harness: Harness, actor: Actor) -> None:
        """A daemon that dies each time it is started is none."""
        harness.machine.libvirt.started = lambda: harness.machine.units.settle(LIBVIRTD, "failed")
        await started(harness)
        dies(harness)
        await asyncio.sleep(2 * PATIENCE)
        assert (actor.state, actor.owner) == (State.HOST, None)

    async def test_it_dies_a_while_after_each_start(self, harness: Harness, actor: Actor) -> None:
        loop, starts = asyncio.get_running_loop(), []

        def starting() -> None:
            starts.append(loop.time())
            loop.call_later(5, harness.machine.units.settle, LIBVIRTD, "failed")

        harness.machine.libvirt.started = starting
        await started(harness)
        dies(harness)
        await asyncio.sleep(10 * PATIENCE)
        assert (actor.state, actor.owner) == (State.HOST, None)
        assert len(starts) < 10

    async def test_there_is_none(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path)
        actor = harness.fleet.find("01:00.0")
        await started(harness)
        harness.machine.end("win11")
        await asyncio.sleep(2 * PATIENCE)
        assert (actor.state, actor.owner) == (State.HOST, None)

    async def test_the_books_cannot_be_read(self, harness: Harness, actor: Actor) -> None:
        await started(harness)
        harness.host.faults.add(Errno(errno.EMFILE), operation="libvirt", nth=None)
        harness.machine.end("win11")
        await asyncio.sleep(10 * PATIENCE)
        assert actor.record.owned
        harness.machine.units.settle(LIBVIRTD, "failed")
        cannot_start(harness)
        await asyncio.sleep(2 * PATIENCE)
        assert (actor.state, actor.owner) == (State.HOST, None)


class TestSomebodyWantsItHome:
    async def test_a_machine_that_is_not_ours_has_ended(self, harness: Harness, actor: Actor) -> None:
        await left(harness, actor)
        for ask in (actor.plan, actor.request):
            with pytest.raises(Owned, match="libvirt has the virtual machine win11 in its books, with"):
                await ask(State.HOST)
        assert actor.state is State.VFIO
        harness.machine.libvirt.cleared_up(WIN11)
        await harness.moved(actor, State.HOST)

    async def test_who_waits_for_the_machine_waits_for_libvirt(self, harness: Harness, actor: Actor) -> None:
        await harness.moved(actor, State.VFIO)
        harness.machine.open_group(GROUP, "win11")
        enters(harness)
        switch = await actor.request(State.HOST, Options(wait_seconds=100.0))
        await asyncio.sleep(10)
        harness.machine.end("win11")
        await asyncio.sleep(10)
        assert actor.state is State.REATTACHING
        assert is_step(harness.witness.at[actor.gpu.address], AwaitLibvirt)
        harness.machine.libvirt.cleared_up(WIN11)
        await switch.wait()
        assert (switch.result, actor.state, harness.machine.libvirt.reset) == (Result.DONE, State.HOST, [])

    @pytest.mark.parametrize("way", ["request", "recover"])
    async def test_it_is_only_half_on_vfio(self, way: str, harness: Harness, actor: Actor) -> None:
        await left(harness, actor)
        await harness.host.kernel("somebody").unbind(SOUND, "vfio-pci")
        await settled()
        if way == "request":
            with pytest.raises(Owned, match=r"rm /run/libvirt/qemu/win11\.xml"):
                await actor.request(State.HOST)
        else:
            await (await actor.recover()).wait()
            assert actor.state is State.VFIO
        harness.machine.libvirt.cleared_up(WIN11)
        assert harness.machine.libvirt.reset == []

    async def test_the_service_dies_while_it_waits(self, harness: Harness, actor: Actor) -> None:
        await left(harness, actor)
        await actor.request(State.HOST, Options(wait_seconds=1000.0))
        await asyncio.sleep(10)
        harness = await harness.crash(actor)
        await settled()
        assert harness.fleet.find("01:00.0").state is State.VFIO
        harness.machine.libvirt.cleared_up(WIN11)
        assert harness.machine.libvirt.reset == []

    async def test_who_waits_can_be_called_back(self, harness: Harness, actor: Actor) -> None:
        await left(harness, actor)
        switch = await actor.request(State.HOST, Options(wait_seconds=1000.0))
        await asyncio.sleep(10)
        begun = asyncio.get_running_loop().time()
        actor.cancel(switch.id, HOOK)
        await switch.wait()
        assert asyncio.get_running_loop().time() - begun < 1
        assert (switch.result, actor.state) == (Result.CANCELLED, State.VFIO)

    async def test_nobody_can_tell(self, harness: Harness, actor: Actor) -> None:
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(errno.EMFILE), operation="libvirt", nth=None)
        with pytest.raises(Failed, match="nobody can tell whether libvirt is done with"):
            await actor.request(State.HOST)
        assert actor.state is State.VFIO

    async def test_not_for_ever(self, harness: Harness, actor: Actor) -> None:
        await left(harness, actor)
        switch = await harness.switch(actor, State.HOST, Options(wait_seconds=100.0))
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert "libvirt has the virtual machine win11 in its books" in switch.reason
