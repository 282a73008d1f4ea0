"""The ladder: other ways to a known-good state where the way back failed too, or a crash left none."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, GpuswitchError, NotViable, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Result
from tests.simulated.bed import GENTLE, Bed

GPU = PciAddress.parse("0000:01:00.0")
SOUND = PciAddress.parse("0000:01:00.1")
EIO = errno.EIO


async def made(directory: Path, **rules: object) -> tuple[Bed, Actor]:
    bed = await Bed.of("plain", directory, **rules)
    return bed, bed.fleet.find("01:00.0")


async def stranded(bed: Bed, actor: Actor) -> None:
    """The sound function fails in every direction, so there is no known-good state."""
    bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
    switch = await bed.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.FAILED, State.FAILED)
    bed.host.faults.clear()


def rough(actor: Actor) -> set[str]:
    """What was done to it besides moving it."""
    return {step.kind for switch in actor.record.recent for step in switch.steps} & {"reset", "rescan"}


class TestAfterAFailedWayBack:
    async def test_the_way_on_is_tried_once_more(self, tmp_path: Path) -> None:
        """A function that came to vfio-pci and cannot leave it; by then the other one can come, too."""
        bed, actor = await made(tmp_path)
        bed.host.faults.add(Errno(EIO), operation="probe", subject=GPU, nth=1)
        bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=2)
        switch = await bed.switch(actor, State.VFIO)
        assert (switch.result, actor.state) == (Result.DONE, State.VFIO)
        assert "the way back failed too" in switch.reason
        assert "0000:01:00.0 recovered: vfio" in bed.witness.words
        before = bed.witness.home
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() | before == bed.snapshot()

    async def test_it_ends_as_failed_with_the_whole_story(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        await stranded(bed, actor)
        assert actor.switch is not None
        for words in ("the way back failed too", "cannot get it on vfio", "Input/output error"):
            assert words in actor.switch.reason
        assert actor.reason == actor.switch.reason
        assert "0000:01:00.0 recovered: failed" in bed.witness.words

    @pytest.mark.parametrize("rules", [GENTLE, {}], ids=["not allowed", "on a host driver"])
    async def test_nothing_rough_is_done_unless_it_is_allowed(self, rules: dict[str, object], tmp_path: Path) -> None:
        """By itself not while a host driver has one of its functions."""
        bed, actor = await made(tmp_path, **rules)
        await stranded(bed, actor)
        await (await actor.recover()).wait()
        assert rough(actor) == set()

    async def test_a_rescan_brings_it_home_where_that_is_allowed(self, tmp_path: Path) -> None:
        """Only a device that was off the bus takes its driver again."""
        bed, actor = await made(tmp_path, rescan_on_failure=True)
        before = bed.snapshot()
        bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        bed.witness.on_step = lambda _, event: bed.host.faults.clear() if event.step.kind == "rescan" else None
        switch = await bed.switch(actor, State.VFIO)
        assert rough(actor) == {"rescan"}
        assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])


class TestRecover:
    async def test_brings_home_what_failed(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        before = bed.snapshot()
        await stranded(bed, actor)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, switch.target, actor.state, actor.reason) == (
            Result.DONE,
            State.HOST,
            State.HOST,
            "",
        )
        assert (bed.snapshot(), bed.pages) == (before, [])
        assert bed.witness.words.count("0000:01:00.0 recovered: home") == 1

    async def test_takes_vfio_where_the_host_cannot_be_had(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path, **GENTLE)
        await stranded(bed, actor)
        bed.host.faults.add(Errno(EIO), operation="load", nth=None)
        bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=1)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert "cannot get it on the host" in switch.reason
        assert switch.reason.endswith("it is on vfio-pci now")

    async def test_what_is_well_needs_none(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        for state in (State.HOST, State.VFIO):
            await bed.moved(actor, state)
            switch = await actor.recover()
            assert (switch.result, switch.target, switch.count) == (Result.DONE, state, 0)

    async def test_two_are_one(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        await stranded(bed, actor)
        first = await actor.recover()
        assert await actor.recover() is first
        await first.wait()

    async def test_what_somebody_left_half_way_comes_home(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        await bed.moved(actor, State.VFIO)
        await bed.host.kernel("somebody").unbind(SOUND, "vfio-pci")
        bed.fleet.look()
        assert actor.state is State.UNKNOWN
        assert "0000:01:00.0 drifted from vfio to unknown" in bed.witness.words
        await (await actor.recover()).wait()
        assert (actor.state, bed.pages) == (State.HOST, [])

    async def test_is_refused_while_it_is_wedged_or_gone(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        hang = bed.host.faults.add(Hang("D"), operation="unbind", subject=SOUND)
        await (await actor.request(State.VFIO)).wait()
        with pytest.raises(Wedged):
            await actor.recover()
        hang.release()
        await bed.witness.until(lambda: actor.state is State.HOST)
        await bed.machine.unplug("0000:01:00")
        bed.fleet.look()
        with pytest.raises(NotViable, match="not on the PCI bus"):
            await actor.recover()

    async def test_a_hang_in_it_is_wedged_and_nothing_is_stacked_on_it(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path, reset_on_failure=True)
        await stranded(bed, actor)
        actor.record.recent.clear()
        hang = bed.host.faults.add(Hang("D"), operation="probe", subject=SOUND, nth=1)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        hang.release()
        await bed.witness.until(lambda: actor.state not in {State.WEDGED, State.RECOVERING})
        assert "reset" not in rough(actor)


class TestAcrossAStart:
    async def test_failed_stays_failed_with_its_story(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        await stranded(bed, actor)
        story = actor.reason
        bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        again = await bed.again()
        found = again.fleet.find("01:00.0")
        assert found.state is State.FAILED
        assert found.reason.startswith(story)
        bed.host.faults.clear()
        await (await found.recover()).wait()
        assert (found.state, again.pages) == (State.HOST, [])

    async def test_one_that_is_well_by_then_is_not(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        await stranded(bed, actor)
        kernel = bed.host.kernel("somebody")
        for function, driver in ((GPU, "nvidia"), (SOUND, "snd_hda_intel")):
            await kernel.set_override({function: driver})
            await kernel.probe(function)
        for function in actor.gpu.functions:
            if bed.machine.devices[function].binding is None:
                await kernel.set_override({function: None})
                await kernel.probe(function)
        again = await bed.again()
        found = again.fleet.find("01:00.0")
        await again.witness.until(lambda: found.state is State.HOST and not found.bound)

    async def test_a_stop_in_the_middle_leaves_the_rest_to_the_next_start(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path)
        before = bed.snapshot()
        await stranded(bed, actor)
        switch = await actor.recover()
        await bed.witness.until(lambda: bool(switch.steps))
        await bed.fleet.stop("the service is stopping")
        assert switch.result is Result.FAILED
        assert "recovered when the service starts again" in switch.reason
        again = await bed.again()
        found = again.fleet.find("01:00.0")
        assert (found.state, again.snapshot(), again.pages) == (State.HOST, before, [])
        assert next(each.id for each in found.record.recent) == switch.id


async def test_no_recovery_waits_for_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bed, actor = await made(tmp_path)
    await stranded(bed, actor)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        for what in ("replace", "reserve", "remove"):
            disk.setattr(DirectoryStore, what, full)
        with pytest.raises(GpuswitchError, match="No space left on device"):
            await actor.request(State.VFIO)
        await (await actor.recover()).wait()
        assert actor.state is State.HOST
        await asyncio.sleep(1000)
        assert bed.pages
    # Nothing tells that there is room again.
    await asyncio.sleep(60)
    assert bed.pages == []


async def test_what_starts_again_by_itself_does_not_keep_it_from_a_rescan(tmp_path: Path) -> None:
    """The way back that failed has started nvidia-persistenced, which opened what is there of the GPU."""
    bed = await Bed.of("laptop", tmp_path, rescan_on_failure=True)
    actor, before = bed.fleet.find("01:00.0"), bed.snapshot()
    bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
    switch = await bed.switch(actor, State.VFIO)
    assert "rescan" in rough(actor)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    bed.host.faults.clear()
    assert (bed.snapshot(), bed.pages) == (before, [])


@pytest.mark.parametrize(("busy", "state"), [(None, State.FAILED), (Busy.TERMINATE, State.VFIO)])
async def test_the_options_of_the_call_hold_for_every_way(busy: Busy | None, state: State, tmp_path: Path) -> None:
    """It cannot get home, and a program has it open: that one is ended only where the call says so."""
    bed, actor = await made(tmp_path, **GENTLE)
    await stranded(bed, actor)
    bed.machine.run("game", uid=1000)
    bed.machine.open_card(GPU, "game")
    bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=1)
    await (await actor.recover(Options(busy=busy))).wait()
    assert actor.state is state
    assert (bed.machine.processes.named("game") is None) == (busy is Busy.TERMINATE)


class TestBeforeTheServiceIsReady:
    async def left(self, bed: Bed, actor: Actor) -> None:
        """The service dies in the middle of a way to vfio-pci, and the sound function does not come home."""
        await actor.request(State.VFIO)
        await bed.witness.until(lambda: bool(actor.switch and actor.switch.step.startswith(f"bind {GPU}")))
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        await asyncio.wait([actor.runner.task])
        await bed.host.kernel(str(actor.gpu.address)).returned()
        await bed.host.close()
        bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)

    async def test_nobody_is_waited_for(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path, busy="wait", wait_seconds=3000.0)
        await self.left(bed, actor)
        began = asyncio.get_running_loop().time()
        again = await Bed.made(SimulatedHost(bed.machine), tmp_path, bed.fleet.config, restore_deferred=False)
        assert asyncio.get_running_loop().time() - began < 100
        assert again.fleet.find("01:00.0").state is State.FAILED

    async def test_the_ways_that_are_left_are_tried_afterwards(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path, reset_on_failure=False, rescan_on_failure=True)
        before = bed.witness.home
        await self.left(bed, actor)
        again = await Bed.made(SimulatedHost(bed.machine), tmp_path, bed.fleet.config)
        actor = again.fleet.find("01:00.0")
        assert (actor.state, rough(actor)) == (State.HOST, {"rescan"})
        assert again.snapshot() | before == again.snapshot()

    async def test_a_gpu_that_was_off_the_bus_when_the_service_died_is_found_again(self, tmp_path: Path) -> None:
        bed, actor = await made(tmp_path, rescan_on_failure=True)
        bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        hang = bed.host.faults.add(Hang(), operation="rescan")
        await actor.request(State.VFIO)
        await hang.reached.wait()
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        bed.host.faults.clear()
        hang.release()
        again = await Bed.made(SimulatedHost(bed.machine), tmp_path, bed.fleet.config)
        assert (again.fleet.find("01:00.0").state, again.pages) == (State.HOST, [])

    async def test_what_a_dead_service_had_sent_is_over_before_anything_is_believed(self, tmp_path: Path) -> None:
        """Its worker unloads a module that is still there when the next service looks."""
        bed, actor = await made(tmp_path)
        before = bed.snapshot()
        bed.host.faults.add(Delay(5.0), operation="unload")
        await actor.request(State.VFIO)
        await bed.witness.until(lambda: bool(actor.switch and actor.switch.step.startswith("unload")))
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        await asyncio.wait([actor.runner.task])
        again = await Bed.made(SimulatedHost(bed.machine), tmp_path, bed.fleet.config)
        assert (again.fleet.find("01:00.0").state, again.pages) == (State.HOST, [])
        assert again.snapshot() == before


async def test_a_recovery_that_waits_for_its_turn_does_not_stand_still(tmp_path: Path) -> None:
    """Another GPU of the driver waits for people; the watchdog has no reason to end all of it."""
    bed = await Bed.of("server", tmp_path, busy="wait", wait_seconds=3000.0, **GENTLE)
    first, second = (bed.fleet.find(f"{bus}:00.0") for bus in ("11", "21"))
    for actor in bed.fleet.actors.values():
        if actor not in {first, second} and actor.record.host_driver == "nvidia":
            await bed.moved(actor, State.VFIO)
    bed.host.faults.add(Errno(EIO), operation="probe", subject=first.gpu.address, nth=None)
    failed = await bed.switch(first, State.VFIO)
    bed.host.faults.clear()
    assert failed.result is Result.FAILED
    bed.machine.run("train", uid=1000)
    bed.machine.open_card(second.gpu.address, "train")
    await second.request(State.VFIO)
    recovery = await first.recover()
    for _ in range(10):
        await asyncio.sleep(100)
        assert bed.fleet.stalled() == []
    bed.machine.end("train")
    await recovery.wait()
    assert recovery.result is Result.DONE


async def test_a_journal_that_cannot_be_written_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a step that has to owe something before it does it."""
    words = "cannot write the journal (No space left on device)"

    def record_restore(*_: object) -> None:
        raise Failed(words)

    bed = await Bed.of("plain", tmp_path, busy="terminate")
    actor = bed.fleet.find("01:00.0")
    bed.machine.units.add(Unit("render.service"))
    bed.machine.run("render", unit=Unit("render.service"))
    bed.machine.open_card(GPU, "render")
    monkeypatch.setattr(actor.record, "record_restore", record_restore)
    switch = await bed.switch(actor, State.VFIO)
    assert (switch.result, switch.reason) == (Result.REVERTED, words)
    assert (actor.state, bed.state(Unit("render.service"))) == (State.HOST, "active")
