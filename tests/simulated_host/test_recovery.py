"""Recovery: other ways to a known-good state where the way back failed too, or a crash left none.

To sleep here is to let the virtual clock run.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, GpuswitchError, NotViable, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.remedies import remedies
from gpuswitch.host.simulated.faults import Delay, Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Result, plans_of
from gpuswitch.switch.steps.host import UnloadModules
from gpuswitch.switch.steps.pci import Bind
from tests.harness.simulated.harness import GENTLE, Harness

GPU = PciAddress.parse("0000:01:00.0")
SOUND = PciAddress.parse("0000:01:00.1")
EIO = errno.EIO


async def start_harness(directory: Path, **rules: object) -> tuple[Harness, Actor]:
    harness = await Harness.of("plain", directory, **rules)
    return harness, harness.fleet.find("01:00.0")


async def stranded(harness: Harness, actor: Actor) -> None:
    """The sound function fails in every direction, so there is no known-good state."""
    harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
    switch = await harness.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.FAILED, State.FAILED)
    harness.host.faults.clear()


def destructive(actor: Actor) -> set[str]:
    """What was done to it besides moving it."""
    return {step.kind for switch in actor.record.recent for step in switch.steps} & {"reset", "rescan"}


class TestAfterAFailedWayBack:
    async def test_the_way_on_is_tried_once_more(self, tmp_path: Path) -> None:
        """A function that came to vfio-pci and cannot leave it; by then the other one can come, too."""
        harness, actor = await start_harness(tmp_path)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=GPU, nth=1)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=2)
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state) == (Result.DONE, State.VFIO)
        assert switch.plan == 2
        plans = plans_of((step.index, step.status) for step in switch.steps)
        assert next(step.title for step, plan in zip(switch.steps, plans, strict=True) if plan == 2).startswith("keep")
        assert sorted(set(plans)) == [1, 2]
        assert "the way back failed too" in switch.reason
        assert "0000:01:00.0 recovered: vfio" in harness.witness.words
        before = harness.witness.home
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() | before == harness.snapshot()

    async def test_what_did_not_come_back_is_named_beside_what_it_has_recovered_from(self, tmp_path: Path) -> None:
        """A unit that cannot be started is nothing that a second try has put right."""
        harness = await Harness.of("laptop", tmp_path)
        actor = harness.fleet.find("01:00.0")
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=2)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=GPU, nth=3)
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(EIO), operation="start_unit", nth=None)
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, actor.state) == (Result.DONE, State.HOST)
        assert switch.reason.splitlines()[1].startswith("the way back failed too: ")
        assert switch.reason.splitlines()[2:] == list(switch.forgone)
        assert "persistenced" in switch.forgone[0]

    async def test_it_ends_as_failed_with_the_whole_story(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        await stranded(harness, actor)
        assert actor.switch is not None
        for words in ("the way back failed too", "cannot get it on vfio", "Input/output error"):
            assert words in actor.switch.reason
        assert actor.reason == actor.switch.reason
        assert "0000:01:00.0 recovered: failed" in harness.witness.words

    @pytest.mark.parametrize("rules", [GENTLE, {}], ids=["not allowed", "on a host driver"])
    async def test_nothing_rough_is_done_unless_it_is_allowed(self, rules: dict[str, object], tmp_path: Path) -> None:
        """By itself not while a host driver has one of its functions."""
        harness, actor = await start_harness(tmp_path, **rules)
        await stranded(harness, actor)
        await (await actor.recover()).wait()
        assert destructive(actor) == set()

    async def test_a_rescan_brings_it_home_where_that_is_allowed(self, tmp_path: Path) -> None:
        """Only a device that was off the bus takes its driver again."""
        harness, actor = await start_harness(tmp_path, rescan_on_failure=True)
        before = harness.snapshot()
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        harness.witness.on_step = lambda _, event: harness.host.faults.clear() if event.step.kind == "rescan" else None
        switch = await harness.switch(actor, State.VFIO)
        assert destructive(actor) == {"rescan"}
        assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestRemedies:
    @pytest.mark.parametrize(
        ("rules", "more"),
        [(GENTLE, ["rescan_on_failure"]), ({}, ["rescan_on_failure"]), ({"rescan_on_failure": True}, [])],
        ids=["nothing rough", "as by default", "all"],
    )
    async def test_with_a_host_driver_on_it_no_reset_is_offered(
        self, rules: dict[str, object], more: list[str], tmp_path: Path
    ) -> None:
        harness, actor = await start_harness(tmp_path, **rules)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        harness.host.faults.add(Errno(EIO), operation="remove", nth=None)
        await harness.switch(actor, State.VFIO)
        assert actor.state is State.FAILED
        assert [each.kind for each in remedies(actor.record)] == ["recover", *more, "reboot"]

    async def test_the_milder_one_is_offered_first(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, **GENTLE)
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=GPU, nth=1)
        await harness.switch(actor, State.HOST)
        assert actor.record.stays_out
        assert [each.kind for each in remedies(actor.record)] == ["to_host", "reset_on_failure", "reboot"]

    async def test_a_service_that_starts_anew_offers_all_of_it(self, tmp_path: Path) -> None:
        """It knows of no step that has failed."""
        harness, actor = await start_harness(tmp_path, **GENTLE)
        await stranded(harness, actor)
        actor.record.page.write(replace(actor.record.page.entry, stays_out=""))
        successor = (await harness.again()).fleet.find("01:00.0")
        assert (successor.state, successor.switch) == (State.FAILED, None)
        assert [each.kind for each in remedies(successor.record)] == ["recover", "rescan_on_failure", "reboot"]

    async def test_the_same_once_more_is_offered_until_it_has_failed_alike(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, **GENTLE)
        assert remedies(actor.record) == ()
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        await harness.switch(actor, State.VFIO)
        for kinds in (["recover", "rescan_on_failure", "reboot"], ["rescan_on_failure", "reboot"]):
            await (await actor.recover()).wait()
            assert [each.kind for each in remedies(actor.record)] == kinds
        harness.host.faults.clear()
        # Elsewhere: something is different now.
        harness.host.faults.add(Errno(EIO), operation="set_override", nth=None)
        await (await actor.recover()).wait()
        assert next(each.kind for each in remedies(actor.record)) == "recover"
        harness.host.faults.clear()
        await (await actor.recover()).wait()
        assert (actor.state, remedies(actor.record)) == (State.HOST, ())


@pytest.mark.parametrize(
    ("steps", "plans"),
    [
        ("1 done, 2 failed, 2 reverted, 1 reverted, 1 done, 2 done", [1, 1, 1, 1, 2, 2]),
        ("1 failed, 1 failed, 1 reverted", [1, 2, 2]),
        ("1 done, 2 interrupted, 1 done", [1, 1, 2]),
        ("1 done, 2 failed, 2 reverted, 1 interrupted, 1 done", [1, 1, 1, 1, 2]),
        ("1 interrupted, 1 done", [1, 2]),
        ("1 failed, 1 revert-failed, 1 interrupted", [1, 1, 2]),
        ("", []),
    ],
)
def test_each_step_is_of_a_plan(steps: str, plans: list[int]) -> None:
    words = [each.split() for each in filter(None, steps.split(", "))]
    assert plans_of((int(index), status) for index, status in words) == plans


class TestRecover:
    async def test_brings_home_what_failed(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        before = harness.snapshot()
        await stranded(harness, actor)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, switch.target, actor.state, actor.reason) == (
            Result.DONE,
            State.HOST,
            State.HOST,
            "",
        )
        assert (harness.snapshot(), harness.pages) == (before, [])
        assert harness.witness.words.count("0000:01:00.0 recovered: host") == 1

    async def test_takes_vfio_where_the_host_cannot_be_had(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, **GENTLE)
        await stranded(harness, actor)
        harness.host.faults.add(Errno(EIO), operation="load", nth=None)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=1)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, actor.state) == (Result.REVERTED, State.VFIO)
        assert "cannot get it on the host" in switch.reason
        assert switch.reason.endswith("it is on vfio-pci now")

    async def test_what_is_well_needs_none(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        for state in (State.HOST, State.VFIO):
            await harness.moved(actor, state)
            switch = await actor.recover()
            assert (switch.result, switch.target, switch.count) == (Result.DONE, state, 0)

    async def test_two_are_one(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        await stranded(harness, actor)
        first = await actor.recover()
        assert await actor.recover() is first
        await first.wait()

    async def test_what_somebody_left_half_way_comes_home(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        await harness.moved(actor, State.VFIO)
        await harness.host.kernel("somebody").unbind(SOUND, "vfio-pci")
        harness.fleet.look()
        assert actor.state is State.UNKNOWN
        assert "0000:01:00.0 drifted from vfio to unknown" in harness.witness.words
        await (await actor.recover()).wait()
        assert (actor.state, harness.pages) == (State.HOST, [])

    async def test_is_refused_while_it_is_wedged_or_gone(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        hang = harness.host.faults.add(Hang("D"), operation="unbind", subject=SOUND)
        await (await actor.request(State.VFIO)).wait()
        with pytest.raises(Wedged):
            await actor.recover()
        hang.release()
        await harness.witness.until(lambda: actor.state is State.HOST)
        await harness.machine.unplug("0000:01:00")
        harness.fleet.look()
        with pytest.raises(NotViable, match="not on the PCI bus"):
            await actor.recover()

    async def test_a_hang_in_it_is_wedged_and_nothing_is_stacked_on_it(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, reset_on_failure=True)
        await stranded(harness, actor)
        actor.record.recent.clear()
        hang = harness.host.faults.add(Hang("D"), operation="probe", subject=SOUND, nth=1)
        switch = await actor.recover()
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        hang.release()
        await harness.witness.until(lambda: actor.state not in {State.WEDGED, State.RECOVERING})
        assert "reset" not in destructive(actor)


class TestAcrossAStart:
    async def test_failed_stays_failed_with_its_story(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        await stranded(harness, actor)
        story = actor.reason
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        again = await harness.again()
        found = again.fleet.find("01:00.0")
        assert found.state is State.FAILED
        assert found.reason.startswith(story)
        harness.host.faults.clear()
        await (await found.recover()).wait()
        assert (found.state, again.pages) == (State.HOST, [])

    async def test_one_that_is_well_by_then_is_not(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        await stranded(harness, actor)
        kernel = harness.host.kernel("somebody")
        for function, driver in ((GPU, "nvidia"), (SOUND, "snd_hda_intel")):
            await kernel.set_override({function: driver})
            await kernel.probe(function)
        for function in actor.gpu.functions:
            if harness.machine.devices[function].binding is None:
                await kernel.set_override({function: None})
                await kernel.probe(function)
        again = await harness.again()
        found = again.fleet.find("01:00.0")
        await again.witness.until(lambda: found.state is State.HOST and not found.bound)

    async def test_a_stop_in_the_middle_leaves_the_rest_to_the_next_start(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path)
        before = harness.snapshot()
        await stranded(harness, actor)
        switch = await actor.recover()
        await harness.witness.until(lambda: bool(switch.steps))
        await harness.fleet.stop("the service is stopping")
        assert switch.result is Result.FAILED
        assert "recovered when the service starts again" in switch.reason
        again = await harness.again()
        found = again.fleet.find("01:00.0")
        assert (found.state, again.snapshot(), again.pages) == (State.HOST, before, [])
        assert next(each.id for each in found.record.recent) == switch.id


async def test_no_recovery_waits_for_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, actor = await start_harness(tmp_path)
    await stranded(harness, actor)

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
        assert harness.pages
    # Nothing tells that there is room again.
    await asyncio.sleep(60)
    assert harness.pages == []


async def test_what_starts_again_by_itself_does_not_keep_it_from_a_rescan(tmp_path: Path) -> None:
    """The way back that failed has started nvidia-persistenced, which opened what is there of the GPU."""
    harness = await Harness.of("laptop", tmp_path, rescan_on_failure=True)
    actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
    harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
    switch = await harness.switch(actor, State.VFIO)
    assert "rescan" in destructive(actor)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    harness.host.faults.clear()
    assert (harness.snapshot(), harness.pages) == (before, [])


@pytest.mark.parametrize(("busy", "state"), [(None, State.FAILED), (Busy.TERMINATE, State.VFIO)])
async def test_the_options_of_the_call_hold_for_every_way(busy: Busy | None, state: State, tmp_path: Path) -> None:
    """It cannot get home, and a program has it open: that one is ended only where the call says so."""
    harness, actor = await start_harness(tmp_path, **GENTLE)
    await stranded(harness, actor)
    harness.machine.run("game", uid=1000)
    harness.machine.open_card(GPU, "game")
    harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=1)
    await (await actor.recover(Options(busy=busy))).wait()
    assert actor.state is state
    assert (harness.machine.processes.named("game") is None) == (busy is Busy.TERMINATE)


class TestBeforeTheServiceIsReady:
    async def left(self, harness: Harness, actor: Actor) -> None:
        """The service dies in the middle of a way to vfio-pci, and the sound function does not come home."""
        await actor.request(State.VFIO)
        await harness.witness.until_step(actor.gpu, Bind, function=GPU)
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        await asyncio.wait([actor.runner.task])
        await harness.host.kernel(str(actor.gpu.address)).returned()
        await harness.host.close()
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)

    async def test_nobody_is_waited_for(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, busy="wait", wait_seconds=3000.0)
        await self.left(harness, actor)
        began = asyncio.get_running_loop().time()
        again = await Harness.start(
            SimulatedHost(harness.machine), tmp_path, harness.fleet.config, restore_deferred=False
        )
        assert asyncio.get_running_loop().time() - began < 100
        assert again.fleet.find("01:00.0").state is State.FAILED

    async def test_the_ways_that_are_left_are_tried_afterwards(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, reset_on_failure=False, rescan_on_failure=True)
        before = harness.witness.home
        await self.left(harness, actor)
        again = await Harness.start(SimulatedHost(harness.machine), tmp_path, harness.fleet.config)
        actor = again.fleet.find("01:00.0")
        assert (actor.state, destructive(actor)) == (State.HOST, {"rescan"})
        assert again.snapshot() | before == again.snapshot()

    async def test_a_gpu_that_was_off_the_bus_when_the_service_died_is_found_again(self, tmp_path: Path) -> None:
        harness, actor = await start_harness(tmp_path, rescan_on_failure=True)
        harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
        hang = harness.host.faults.add(Hang(), operation="rescan")
        await actor.request(State.VFIO)
        await hang.reached.wait()
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        harness.host.faults.clear()
        hang.release()
        again = await Harness.start(SimulatedHost(harness.machine), tmp_path, harness.fleet.config)
        assert (again.fleet.find("01:00.0").state, again.pages) == (State.HOST, [])

    async def test_what_a_dead_service_had_sent_is_over_before_anything_is_believed(self, tmp_path: Path) -> None:
        """Its worker unloads a module that is still there when the next service looks."""
        harness, actor = await start_harness(tmp_path)
        before = harness.snapshot()
        harness.host.faults.add(Delay(5.0), operation="unload")
        await actor.request(State.VFIO)
        await harness.witness.until_step(actor.gpu, UnloadModules)
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        await asyncio.wait([actor.runner.task])
        again = await Harness.start(SimulatedHost(harness.machine), tmp_path, harness.fleet.config)
        assert (again.fleet.find("01:00.0").state, again.pages) == (State.HOST, [])
        assert again.snapshot() == before


async def test_a_recovery_that_waits_for_its_turn_does_not_stand_still(tmp_path: Path) -> None:
    """Another GPU of the driver waits for people; the watchdog has no reason to end all of it."""
    harness = await Harness.of("server", tmp_path, busy="wait", wait_seconds=3000.0, **GENTLE)
    first, second = (harness.fleet.find(f"{bus}:00.0") for bus in ("11", "21"))
    for actor in harness.fleet.actors.values():
        if actor not in {first, second} and actor.record.host_driver == "nvidia":
            await harness.moved(actor, State.VFIO)
    harness.host.faults.add(Errno(EIO), operation="probe", subject=first.gpu.address, nth=None)
    failed = await harness.switch(first, State.VFIO)
    harness.host.faults.clear()
    assert failed.result is Result.FAILED
    harness.machine.run("train", uid=1000)
    harness.machine.open_card(second.gpu.address, "train")
    await second.request(State.VFIO)
    recovery = await first.recover()
    for _ in range(10):
        await asyncio.sleep(100)
        assert harness.fleet.stalled() == []
    harness.machine.end("train")
    await recovery.wait()
    assert recovery.result is Result.DONE


async def test_a_journal_that_cannot_be_written_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a step that has to owe something before it does it."""
    words = "cannot write the journal (No space left on device)"

    def record_restore(*_: object) -> None:
        raise Failed(words)

    harness = await Harness.of("plain", tmp_path, busy="terminate")
    actor = harness.fleet.find("01:00.0")
    harness.machine.units.add(Unit("render.service"))
    harness.machine.run("render", unit=Unit("render.service"))
    harness.machine.open_card(GPU, "render")
    monkeypatch.setattr(actor.record, "record_restore", record_restore)
    switch = await harness.switch(actor, State.VFIO)
    assert (switch.result, switch.reason) == (Result.REVERTED, words)
    assert (actor.state, harness.state(Unit("render.service"))) == (State.HOST, "active")
