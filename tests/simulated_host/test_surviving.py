"""A machine that is kept awake, and a service that ends and comes back while the kernel has a GPU."""

from __future__ import annotations

import asyncio
import re
from errno import EMFILE
from pathlib import Path

import pytest

from gpuswitch.errors import Busy
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno, Fault, Hang
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER, PERSISTENCED
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.host import InhibitSleep
from gpuswitch.switch.steps.pci import LoadDriver, Unbind
from tests.harness.simulated.harness import Harness

SOUND = PciAddress.parse("0000:01:00.1")


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await Harness.of("laptop", tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


class TestSleep:
    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    async def test_the_machine_stays_awake_exactly_while_the_gpu_moves(
        self, target: State, harness: Harness, actor: Actor
    ) -> None:
        if target is State.HOST:
            await harness.moved(actor, State.VFIO)
        awake: list[bool] = []

        def look(_: Actor, event: StepEvent) -> None:
            held = harness.machine.units.inhibitors == {"0000:01:00.0"}
            begins = isinstance(event.step, LoadDriver | InhibitSleep) and event.status is Status.RUNNING
            if not begins and not (isinstance(event.step, LoadDriver) and event.index == 1):
                awake.append(held)

        harness.witness.on_step = look
        await harness.moved(actor, target)
        assert len(awake) > 10
        assert all(awake)
        assert harness.machine.units.inhibitors == set()

    async def test_also_while_it_is_taken_back(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Errno(5), operation="probe", subject=SOUND)
        held: list[bool] = []

        def look(_: Actor, event: StepEvent) -> None:
            if event.status is Status.REVERTING and isinstance(event.step, Unbind):
                held.append(bool(harness.machine.units.inhibitors))

        harness.witness.on_step = look
        switch = await harness.switch(actor, State.VFIO)
        assert switch.result is Result.REVERTED
        assert held
        assert all(held)
        assert harness.machine.units.inhibitors == set()

    @pytest.mark.parametrize("fault", [Errno(5), Hang()], ids=["fails", "hangs"])
    async def test_a_machine_that_cannot_be_kept_awake_switches_all_the_same(
        self, fault: Fault, harness: Harness, actor: Actor
    ) -> None:
        for nth in (1, 2):
            harness.host.faults.add(fault, operation="inhibit", nth=nth)
        switch = await harness.switch(actor, State.VFIO)
        assert (switch.result, actor.state) == (Result.DONE, State.VFIO)
        assert switch.reason

    @pytest.mark.parametrize("fault", [Errno(5), Hang()], ids=["fails", "hangs"])
    async def test_a_switch_is_over_before_the_machine_may_sleep_again(
        self, fault: Fault, harness: Harness, actor: Actor
    ) -> None:
        harness.host.faults.add(fault, operation="release_inhibitor")
        switch = await actor.request(State.VFIO)
        await switch.wait()
        assert (switch.result, switch.reason) == (Result.DONE, "")
        assert harness.machine.units.inhibitors == {"0000:01:00.0"}
        await asyncio.sleep(100)
        assert harness.machine.units.inhibitors == set()

    async def test_who_is_refused_finds_the_machine_as_it_was(self, harness: Harness, actor: Actor) -> None:
        """The lock is asked for while holders are looked for."""
        harness.machine.run("blender", uid=1000)
        harness.machine.open(actor.gpu.address, "blender", "nvidia")
        harness.host.faults.add(Delay(3), operation="inhibit")
        before = harness.snapshot()
        with pytest.raises(Busy):
            await actor.request(State.VFIO)
        assert harness.snapshot() == before

    async def test_what_a_dead_service_left_behind_is_let_go(self, harness: Harness, actor: Actor) -> None:
        """It died when the switch was over, and the machine was to be let sleep again."""
        hang = harness.host.faults.add(Hang(), operation="release_inhibitor")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        assert switch.result is Result.DONE
        assert harness.machine.units.inhibitors
        again = await harness.crash(actor)
        successor = again.fleet.find("01:00.0")
        await again.may_sleep(successor)
        assert (successor.state, again.machine.units.inhibitors) == (State.VFIO, set())


class TestWedged:
    async def wedged(self, harness: Harness, actor: Actor) -> Hang:
        hang = harness.host.faults.add(Hang("D", "snd_card_free"), operation="unbind", subject=SOUND)
        switch = await actor.request(State.VFIO)
        await switch.wait()
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        return hang

    async def test_units_wait_for_the_way_home_and_come_back_with_it(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        hang = await self.wedged(harness, actor)
        assert harness.state(PERSISTENCED) == "inactive"
        hang.release()
        await harness.witness.until(lambda: not actor.bound)
        assert (actor.state, harness.snapshot(), harness.pages) == (State.HOST, before, [])

    async def test_the_next_service_finds_it_again_and_brings_it_home(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        hang = await self.wedged(harness, actor)
        started = asyncio.get_running_loop().time()
        await harness.fleet.stop("the service is stopping")
        again = await harness.again()
        again = await again.again()
        assert asyncio.get_running_loop().time() == started
        successor = again.fleet.find("01:00.0")
        assert successor.state is State.WEDGED
        assert re.match(
            r"the kernel has not returned from 'unbind 0000:01:00\.1 from snd_hda_intel' since before the service "
            r"started \(process \d+ is in state D, waiting in snd_card_free\)\nnothing more is written",
            successor.reason,
        )
        stands = again.snapshot()
        again.fleet.look()
        assert again.snapshot() == stands
        hang.release()
        await again.witness.until(lambda: not successor.bound)
        await again.may_sleep(successor)
        assert (successor.state, again.snapshot(), again.pages) == (State.HOST, before, [])

    async def test_while_nobody_can_tell_whether_the_kernel_has_returned(self, harness: Harness, actor: Actor) -> None:
        """The next service starts, and the GPU counts as wedged until it is known."""
        before = harness.snapshot()
        hang = await self.wedged(harness, actor)
        await harness.fleet.stop("the service is stopping")
        for nth in (1, 2, 3):
            harness.host.faults.add(Errno(EMFILE), operation="adopt", nth=nth)
        again = await harness.again()
        successor = again.fleet.find("01:00.0")
        stands = again.snapshot()
        await asyncio.sleep(100)
        assert (successor.state, again.snapshot()) == (State.WEDGED, stands)
        assert "the kernel has not returned from 'unbind 0000:01:00.1 from snd_hda_intel'" in successor.reason
        hang.release()
        await again.witness.until(lambda: not successor.bound)
        await again.may_sleep(successor)
        assert (successor.state, again.snapshot(), again.pages) == (State.HOST, before, [])

    async def test_the_same_of_a_switch_that_was_under_way(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="unbind", subject=SOUND)
        await actor.request(State.VFIO)
        await hang.reached.wait()
        assert actor.runner.task is not None
        actor.runner.task.cancel()
        harness.host.faults.add(Errno(EMFILE), operation="adopt", nth=1)
        harness.host.faults.add(Errno(EMFILE), operation="adopt", nth=2)
        again = await harness.again()
        successor = again.fleet.find("01:00.0")
        assert successor.state is State.WEDGED
        await asyncio.sleep(100)
        assert successor.state is State.WEDGED
        hang.release()
        await again.witness.until(lambda: not successor.bound)
        await again.may_sleep(successor)
        assert (successor.state, again.snapshot(), again.pages) == (State.HOST, before, [])

    async def test_a_fault_with_one_gpu_takes_nothing_from_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adopt = Actor.adopt

        async def broken(actor: Actor) -> None:
            if actor.gpu.address.slot_name == "0000:11:00":
                raise ValueError("no such thing")
            await adopt(actor)

        monkeypatch.setattr(Actor, "adopt", broken)
        harness = await Harness.of("server", tmp_path)
        assert harness.fleet.find("11:00.0").reason == "a fault of gpuswitch itself: ValueError('no such thing')"
        await harness.moved(harness.fleet.find("21:00.0"), State.VFIO)

    async def test_one_that_returned_while_no_service_was_there(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        hang = await self.wedged(harness, actor)
        await harness.fleet.stop("the service is stopping")
        hang.release()
        await harness.host.kernel("0000:01:00.0").returned()
        again = await harness.again()
        assert (again.fleet.find("01:00.0").state, again.snapshot(), again.pages) == (State.HOST, before, [])

    async def test_other_gpus_of_its_driver_may_go_but_nobody_unloads_it(self, tmp_path: Path) -> None:
        harness = await Harness.of("server", tmp_path)
        stuck, *others = (harness.fleet.actors[address] for address in sorted(harness.fleet.actors))
        hang = harness.host.faults.add(Hang(), operation="unbind", subject=stuck.gpu.address)
        switch = await stuck.request(State.VFIO)
        await switch.wait()
        assert stuck.state is State.WEDGED
        for actor in others:
            await harness.moved(actor, State.VFIO)
        assert "nvidia" in harness.machine.look().modules
        for actor in others:
            await harness.moved(actor, State.HOST)
        hang.release()
        await harness.witness.until(lambda: not stuck.bound)

    async def test_the_machine_stays_awake_whoever_watches(self, harness: Harness, actor: Actor) -> None:
        hang = await self.wedged(harness, actor)
        await harness.fleet.stop("the service is stopping")
        assert harness.machine.units.inhibitors == {"0000:01:00.0"}
        again = await harness.again()
        await asyncio.sleep(100)
        assert again.machine.units.inhibitors == {"0000:01:00.0"}
        hang.release()
        await again.witness.until(lambda: not again.fleet.find("01:00.0").bound)
        await again.may_sleep(again.fleet.find("01:00.0"))
        assert again.machine.units.inhibitors == set()

    async def test_a_desktop_comes_back(self, tmp_path: Path) -> None:
        harness = await Harness.of("single", tmp_path)
        actor, before = harness.fleet.find(""), harness.snapshot()
        hang = await self.wedged(harness, actor)
        await harness.fleet.stop("the service is stopping")
        again = await harness.again()
        assert again.state(DISPLAY_MANAGER) == "inactive"
        hang.release()
        await again.witness.until(lambda: not again.fleet.find("").bound)
        await again.may_sleep(again.fleet.find(""))
        assert (again.snapshot(), again.pages) == (before, [])
