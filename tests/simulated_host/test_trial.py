"""A trial: to vfio, and home by itself after a while, whatever becomes of whoever asked, and of the service."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, InProgress, KernelError, Owned
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.devices import Trouble
from gpuswitch.host.simulated.faults import Call, Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.record import Requester, Result, Switch
from gpuswitch.switch.steps.pci import Unbind
from tests.harness.simulated.harness import GENTLE, Harness
from tests.simulated_host.test_actor_first_seen import on_vfio as found_on_vfio
from tests.simulated_host.test_owners import ALL, GPU, GROUP, HOOK, WIN11, acquire, settled, start_harness

TRIAL = Options(trial_seconds=60.0)
ALICE = Requester(1000, 77, command="gpuswitchctl")


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await start_harness(tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


def ends_in(actor: Actor) -> float | None:
    """Seconds until it goes home by itself; None: it does not."""
    trial = actor.record.trial
    return None if trial is None or trial.ends is None else trial.ends - asyncio.get_running_loop().time()


async def tried(harness: Harness, actor: Actor, seconds: float = 60.0) -> None:
    await harness.moved(actor, State.VFIO, Options(trial_seconds=seconds))
    assert ends_in(actor) == seconds


async def comes_home(harness: Harness, actor: Actor) -> None:
    await harness.witness.until(lambda: actor.state is State.HOST and not actor.bound)
    await settled()
    assert (actor.record.trial, harness.pages) == (None, [])


class TestWhatItLeaves:
    async def test_to_keep_it_says_nothing_more_of_what_was_cancelled_before(
        self, harness: Harness, actor: Actor
    ) -> None:
        await harness.moved(actor, State.VFIO)
        actor.record.say_why("cancelled by somebody")
        await actor.request(State.VFIO)
        assert actor.record.reason == ""

    async def test_a_switch_that_is_undone_promises_what_was_promised_before(
        self, harness: Harness, actor: Actor
    ) -> None:
        await tried(harness, actor)
        before = actor.record.trial
        for options in (Options(trial_seconds=5.0), Options()):
            actor.record.trial_during(Switch(State.VFIO, 1, options))
            assert actor.record._trial_after(Result.REVERTED, "") == before
        assert actor.record._trial_after(Result.REVERTED, "out") == before  # of a way home, it is not over yet


class TestItsEnd:
    async def test_it_goes_home_by_itself_and_says_why(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await tried(harness, actor)
        await asyncio.sleep(59)
        assert actor.state is State.VFIO
        await asyncio.sleep(2)
        await comes_home(harness, actor)
        assert harness.snapshot() == before
        assert actor.switch is not None
        assert (actor.switch.result, str(actor.switch.requester)) == (
            Result.DONE,
            "the service itself, since a trial is over",
        )

    async def test_the_promise_is_on_disk_before_anything_is_touched(self, harness: Harness, actor: Actor) -> None:
        await actor.request(State.VFIO, TRIAL, ALICE)
        [page] = harness.directory.glob("*.json")
        assert json.loads(page.read_text())["trial"] == {"seconds": 60.0, "ends": None}
        assert actor.switch is not None
        assert not actor.switch.steps

    async def test_what_the_switch_waits_for_is_not_of_its_time(self, harness: Harness, actor: Actor) -> None:
        harness.machine.open(GPU, "game")
        options = Options(busy=Busy.WAIT, wait_seconds=500.0, trial_seconds=60.0)
        switch = await actor.request(State.VFIO, options, ALICE)
        await asyncio.sleep(300)
        assert (actor.state, actor.record.trial_ends) == (State.DETACHING, 0.0)
        harness.machine.end("game")
        await switch.wait()
        assert (actor.state, ends_in(actor)) == (State.VFIO, 60.0)
        await comes_home(harness, actor)

    async def test_a_clock_on_the_wall_is_told_as_it_is_when_asked(
        self, harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await tried(harness, actor)
        for now in (1_000_000.0, 5.0):
            monkeypatch.setattr("gpuswitch.gpu.gpu_record.time.time", lambda now=now: now)
            assert actor.record.trial_ends == now + 60
        await asyncio.sleep(59)
        assert actor.state is State.VFIO
        await comes_home(harness, actor)

    async def test_without_a_timer_it_is_tried_until_there_is_one(
        self, harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        until, refused = SimulatedHost.until, 0

        async def none_left(host: SimulatedHost, moment: float) -> None:
            nonlocal refused
            refused += 1
            if refused < 3:
                raise KernelError("set", "a timer", 24, "Too many open files")
            await until(host, moment)

        monkeypatch.setattr(SimulatedHost, "until", none_left)
        await tried(harness, actor)
        await comes_home(harness, actor)
        assert refused == 3


class TestWhoEndsItBefore:
    async def test_whoever_asks_for_the_host(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await harness.moved(actor, State.HOST)
        await harness.moved(actor, State.VFIO)
        await asyncio.sleep(600)
        assert (actor.state, actor.record.trial) == (State.VFIO, None)

    async def test_whoever_asks_for_vfio_keeps_it(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        switch = await actor.request(State.VFIO, requester=ALICE)
        assert (switch.result, switch.count, actor.record.trial, actor.record.trial_ends) == (Result.DONE, 0, None, 0.0)
        assert json.loads(next(harness.directory.glob("*.json")).read_text())["trial"] is None
        await asyncio.sleep(600)
        assert actor.state is State.VFIO

    async def test_also_on_the_way_there(self, actor: Actor) -> None:
        switch = await actor.request(State.VFIO, TRIAL, ALICE)
        assert await actor.request(State.VFIO, requester=ALICE) is switch
        await switch.wait()
        await asyncio.sleep(600)
        assert (actor.state, actor.record.trial) == (State.VFIO, None)

    async def test_also_at_the_very_moment_of_its_end(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        async with actor._deciding:
            kept = asyncio.create_task(actor.request(State.VFIO, requester=ALICE))
            await asyncio.sleep(61)
        assert (await kept).result is Result.DONE
        await asyncio.sleep(600)
        assert (actor.state, actor.record.trial, actor.reason) == (State.VFIO, None, "")

    async def test_whoever_asks_for_another_trial_has_it_counted_anew(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await asyncio.sleep(50)
        switch = await actor.request(State.VFIO, Options(trial_seconds=30.0), ALICE)
        assert (switch.count, ends_in(actor)) == (0, 30.0)
        await asyncio.sleep(25)
        assert actor.state is State.VFIO
        await comes_home(harness, actor)

    async def test_somebody_else_brings_it_home(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        machine = harness.machine
        for function in actor.gpu.functions:
            device = machine.devices[function]
            await machine.write("set_override", "driver_override", {function: None}, Call("move", function))
            assert device.binding is not None
            await machine.unbind(function, device.binding.driver.name, Call("move", function))
            await machine.probe(function, "", Call("move", function))
        machine.changed(None, uevent=True)
        await harness.witness.until(lambda: actor.state is State.HOST)
        assert actor.record.trial is None

    async def test_a_cancelled_way_home_is_kept_where_it_is(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await harness.witness.until(lambda: actor.state is State.REATTACHING)
        assert actor.switch is not None
        actor.cancel(actor.switch.id, ALICE)
        await actor.switch.wait()
        await asyncio.sleep(600)
        assert (actor.state, actor.switch.result, actor.record.trial) == (State.VFIO, Result.CANCELLED, None)

    async def test_a_way_home_that_is_cancelled_before_its_end_takes_nothing_from_it(
        self, harness: Harness, actor: Actor
    ) -> None:
        await tried(harness, actor, 600.0)
        switch = await actor.request(State.HOST, requester=ALICE)
        actor.cancel(switch.id, ALICE)
        await switch.wait()
        assert (actor.state, actor.record.trial is not None) == (State.VFIO, True)
        await comes_home(harness, actor)


class TestNothingIsLeftOfIt:
    async def test_of_a_switch_that_fails(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        harness.host.faults.add(Errno(22), operation="probe", subject=GPU)
        switch = await harness.switch(actor, State.VFIO, TRIAL)
        assert (switch.result, actor.state, actor.record.trial) == (Result.REVERTED, State.HOST, None)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_of_a_switch_that_is_cancelled(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        switch = await actor.request(State.VFIO, TRIAL, ALICE)
        actor.cancel(switch.id, ALICE)
        await switch.wait()
        assert (switch.result, actor.state, actor.record.trial) == (Result.CANCELLED, State.HOST, None)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_of_one_that_is_refused(self, harness: Harness, actor: Actor) -> None:
        harness.machine.open(GPU, "game")
        with pytest.raises(Exception, match="game"):
            await actor.request(State.VFIO, TRIAL, ALICE)
        assert (actor.record.trial, harness.pages) == (None, [])

    async def test_of_a_gpu_that_left_the_bus(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await harness.machine.unplug("0000:01:00")
        await harness.witness.until(lambda: actor.state is State.ABSENT)
        assert actor.record.trial is None


class TestRefused:
    async def test_what_belongs_to_a_machine(self, harness: Harness, actor: Actor) -> None:
        await acquire(harness)
        with pytest.raises(Owned, match="belongs to the virtual machine win11: shut that down first"):
            await actor.request(State.VFIO, TRIAL, ALICE)
        assert (actor.record.trial, actor.owner) == (None, WIN11)

    async def test_what_is_on_its_way_to_stay(self, actor: Actor) -> None:
        switch = await actor.request(State.VFIO, requester=ALICE)
        with pytest.raises(InProgress, match=f"{switch.id}.* not with trial_seconds=60"):
            await actor.request(State.VFIO, TRIAL, ALICE)
        await switch.wait()
        assert actor.record.trial is None

    async def test_what_cannot_be_written_is_not_promised(
        self, harness: Harness, actor: Actor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await harness.moved(actor, State.VFIO)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("gpuswitch.switch.journal.store.DirectoryStore.replace", full)
            with pytest.raises(Failed, match="No space left on device"):
                await actor.request(State.VFIO, TRIAL, ALICE)
        await asyncio.sleep(600)
        assert (actor.state, actor.record.trial) == (State.VFIO, None)


async def test_one_that_is_on_vfio_already_goes_home_as_well(harness: Harness, actor: Actor) -> None:
    before = harness.snapshot()
    await harness.moved(actor, State.VFIO)
    switch = await actor.request(State.VFIO, TRIAL, ALICE)
    assert (switch.result, switch.count, ends_in(actor)) == (Result.DONE, 0, 60.0)
    await comes_home(harness, actor)
    assert harness.snapshot() == before


class TestBusyAtItsEnd:
    async def test_it_goes_home_when_a_machine_has_let_go(self, harness: Harness, actor: Actor) -> None:
        """One that has not asked for it: nobody says so, and nobody looks again by the clock."""
        await tried(harness, actor)
        harness.machine.open_group(GROUP, "qemu")
        await asyncio.sleep(100)
        assert (actor.state, actor.record.trial_is_over) == (State.VFIO, True)
        assert "the trial is over, and 0000:01:00.0 stays where it is for now: " in actor.reason
        assert "qemu" in actor.reason
        words = len(harness.witness.words)
        await asyncio.sleep(10_000)
        assert len(harness.witness.words) == words
        harness.machine.end("qemu")
        await comes_home(harness, actor)
        assert actor.reason == ""

    async def test_whoever_keeps_it_then_is_not_told_of_that_any_more(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        harness.machine.open_group(GROUP, "qemu")
        await asyncio.sleep(100)
        await actor.request(State.VFIO, requester=ALICE)
        assert (actor.record.trial, actor.reason) == (None, "")
        harness.machine.end("qemu")
        await asyncio.sleep(600)
        assert actor.state is State.VFIO

    async def test_what_its_driver_cannot_take_stays_out_and_comes_home_later(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, **GENTLE)
        actor = harness.fleet.find("01:00.0")
        await tried(harness, actor)
        harness.machine.devices[GPU].trouble = Trouble.UNKNOWN
        await asyncio.sleep(600)
        assert (actor.state, actor.record.trial) == (State.VFIO, None)
        assert actor.record.stays_out
        harness.machine.devices[GPU].trouble = None
        harness = await harness.again()
        await comes_home(harness, harness.fleet.find("01:00.0"))

    async def test_what_has_no_driver_to_go_to_says_so_and_is_not_tried_by_the_clock(self, tmp_path: Path) -> None:
        harness = await Harness.start(found_on_vfio(), tmp_path)
        actor = harness.fleet.find("")
        await actor.request(State.VFIO, TRIAL, ALICE)
        await asyncio.sleep(100)
        assert (actor.state, actor.record.trial) == (State.VFIO, None)
        assert actor.record.stays_out == actor.reason
        assert "the trial is over, and 0000:01:00.0 stays where it is: " in actor.reason
        assert "no installed driver fits it" in actor.reason
        words = len(harness.witness.words)
        await asyncio.sleep(10_000)
        assert len(harness.witness.words) == words

    async def test_a_kernel_that_hangs_before_the_first_step_takes_nothing_from_it(
        self, harness: Harness, actor: Actor
    ) -> None:
        await tried(harness, actor)
        hang = Hang()
        harness.host.faults.add(hang, operation="capture")
        await harness.witness.until(lambda: actor.state is State.WEDGED)
        hang.release()
        await comes_home(harness, actor)

    async def test_a_machine_that_goes_down_refuses_it_for_as_long(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        harness.machine.units.stopping = True
        await asyncio.sleep(300)
        assert actor.state is State.VFIO
        assert "the system is going down" in actor.reason
        harness.machine.units.stopping = False
        await comes_home(harness, actor)


class TestMachines:
    async def test_one_that_gets_it_ends_the_trial(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await acquire(harness)
        assert (actor.record.trial, actor.owner) == (None, WIN11)
        harness.machine.open_group(GROUP, WIN11.name)
        harness.fleet.owners.adopt(WIN11, ALL)
        await asyncio.sleep(600)
        assert actor.state is State.VFIO
        harness.machine.end(WIN11.name)
        harness.fleet.owners.release(WIN11, "shutdown")
        await comes_home(harness, actor)

    async def test_after_it_the_configuration_decides(self, tmp_path: Path) -> None:
        harness = await start_harness(tmp_path, on_release="stay")
        actor = harness.fleet.find("01:00.0")
        await tried(harness, actor)
        await acquire(harness)
        harness.machine.open_group(GROUP, WIN11.name)
        harness.fleet.owners.adopt(WIN11, ALL)
        await settled()
        harness.machine.end(WIN11.name)
        harness.fleet.owners.release(WIN11, "shutdown")
        await asyncio.sleep(600)
        assert (actor.state, actor.owner, actor.record.trial) == (State.VFIO, None, None)

    async def test_one_that_does_not_get_it_takes_nothing_from_it(self, harness: Harness, actor: Actor) -> None:
        """The person before a dark screen did not ask for that machine."""
        await tried(harness, actor)
        harness.machine.open_group(GROUP, "somebody")
        with pytest.raises(Owned):
            await harness.fleet.owners.acquire(WIN11, ALL, HOOK)
        await settled()
        assert (actor.owner, actor.record.trial is not None) == (None, True)
        harness.machine.end("somebody")
        await comes_home(harness, actor)

    async def test_one_that_opens_it_after_a_crash_has_it(self, tmp_path: Path) -> None:
        """The service died when it had handed it over, and before that was on disk."""
        harness = await start_harness(tmp_path, on_release="stay")
        actor = harness.fleet.find("01:00.0")
        await tried(harness, actor)
        actor.record.own(WIN11)
        harness.machine.open_group(GROUP, WIN11.name)
        harness = await harness.again()
        actor = harness.fleet.find("01:00.0")
        await asyncio.sleep(600)
        assert (actor.state, actor.owner, actor.record.trial) == (State.VFIO, WIN11, None)


class TestTheServiceDies:
    async def test_the_next_one_goes_on_counting(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await asyncio.sleep(20)
        harness = await harness.crash(actor)
        actor = harness.fleet.find("01:00.0")
        assert (actor.state, ends_in(actor)) == (State.VFIO, 40.0)
        await comes_home(harness, actor)
        assert asyncio.get_running_loop().time() > 60

    async def test_one_that_is_over_by_then_goes_home_once_the_service_has_started(
        self, harness: Harness, actor: Actor
    ) -> None:
        await tried(harness, actor)
        harness.fleet._trials.stop()
        await asyncio.sleep(1000)
        harness = await harness.crash(actor, restore_deferred=False)
        actor = harness.fleet.find("01:00.0")
        await asyncio.sleep(100)
        assert (actor.state, actor.record.trial_is_over) == (State.VFIO, True)
        await harness.fleet.restore_deferred()
        await comes_home(harness, actor)

    async def test_on_the_way_there_it_comes_home_and_nothing_is_left(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await actor.request(State.VFIO, TRIAL, ALICE)
        await harness.witness.until_step(actor.gpu, Unbind)
        harness = await harness.crash(actor)
        actor = harness.fleet.find("01:00.0")
        assert (actor.state, actor.record.trial) == (State.HOST, None)
        await asyncio.sleep(600)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_on_the_way_home_it_comes_home(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await harness.witness.until(lambda: actor.state is State.REATTACHING)
        harness = await harness.crash(actor)
        actor = harness.fleet.find("01:00.0")
        await comes_home(harness, actor)

    async def test_one_that_stops_on_the_way_home_leaves_it_to_the_next(self, harness: Harness, actor: Actor) -> None:
        await tried(harness, actor)
        await harness.witness.until(lambda: actor.state is State.REATTACHING)
        await harness.fleet.stop("the service is stopping")
        assert (actor.state, actor.record.trial_is_over) == (State.VFIO, True)
        harness = await harness.again()
        await comes_home(harness, harness.fleet.find("01:00.0"))

    async def test_a_way_there_that_hangs_is_taken_back_when_it_can_be(self, harness: Harness, actor: Actor) -> None:
        hang = Hang()
        harness.host.faults.add(hang, operation="probe", subject=GPU)
        switch = await harness.switch(actor, State.VFIO, TRIAL)
        assert (switch.result, actor.state, actor.record.trial_ends) == (Result.WEDGED, State.WEDGED, 0.0)
        hang.release()
        await harness.witness.until(lambda: actor.state is State.HOST)
        assert actor.record.trial is None


async def test_a_page_of_a_version_without_trials_is_read(harness: Harness, actor: Actor) -> None:
    await harness.moved(actor, State.VFIO)
    [path] = harness.directory.glob("*.json")
    page = json.loads(path.read_text())
    del page["trial"]
    path.write_text(json.dumps(page))
    harness = await harness.again()
    actor = harness.fleet.find("01:00.0")
    assert (actor.state, actor.record.trial, bool(actor.record.restore_state)) == (State.VFIO, None, True)


async def test_a_trial_of_another_length_joins_the_one_on_its_way(harness: Harness, actor: Actor) -> None:
    switch = await actor.request(State.VFIO, TRIAL, ALICE)
    assert await actor.request(State.VFIO, replace(TRIAL, trial_seconds=5.0), ALICE) is switch
    await switch.wait()
    assert ends_in(actor) == 5.0
