"""Units: stopped for the GPU's sake, remembered, and started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import Failed, NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Call, Errno, Fault, Hang
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER, PERSISTENCED, SCENARIOS, laptop
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import THE_SERVICE, Result
from tests.harness.simulated.harness import Harness, config, opened_by_units

POWERD, GETTY = Unit("nvidia-powerd.service"), Unit("getty@tty1.service")
OLLAMA = Unit("ollama.service")


async def reverted(harness: Harness, actor: Actor, options: Options = Options()) -> str:  # noqa: B008 -- frozen
    """See that it begins, fails, and leaves no trace; the sentence."""
    before, restore_state = harness.snapshot(), harness.pages
    switch = await harness.switch(actor, State.VFIO, options)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, restore_state)
    return switch.reason


async def reverted_at_bind(harness: Harness, actor: Actor) -> None:
    harness.host.faults.add(Errno(5), operation="probe", subject=actor.gpu.address)
    await reverted(harness, actor)


class TestComfort:
    """Those that have the GPU open without anybody using it."""

    async def test_the_last_cards_daemon_comes_back_with_it(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        harness.machine.units.add(POWERD, active=False)
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        assert (harness.state(PERSISTENCED), harness.state(POWERD)) == ("inactive", "inactive")
        await harness.moved(actor, State.HOST)
        assert (harness.state(PERSISTENCED), harness.state(POWERD)) == ("active", "inactive")
        assert "nvidia-persistenced" in harness.machine.users(actor.gpu.address)

    async def test_one_that_is_off_stays_off(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        harness.machine.units.stop(PERSISTENCED)
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        await harness.moved(actor, State.HOST)
        assert harness.state(PERSISTENCED) == "inactive"

    async def test_where_no_manager_answers_they_are_nobodys_business(self, tmp_path: Path) -> None:
        harness = await Harness.of("plain", tmp_path)
        harness.machine.units.managed = False
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        await harness.moved(actor, State.HOST)


class TestServesSeveral:
    """nvidia-persistenced of a host with several GPUs: it has open those that it has found when it started."""

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        return await Harness.of("server", tmp_path)

    @pytest.fixture
    def actors(self, harness: Harness) -> list[Actor]:
        return list(harness.fleet.actors.values())

    def opened(self, harness: Harness) -> frozenset[PciAddress]:
        return opened_by_units(harness.machine).get("nvidia-persistenced", frozenset())

    async def test_each_that_comes_home_is_opened_again(self, harness: Harness, actors: list[Actor]) -> None:
        first, *others = actors
        before = harness.snapshot()
        await harness.moved(first, State.VFIO)
        assert self.opened(harness) == {actor.gpu.address for actor in others}
        await harness.moved(first, State.HOST)
        assert harness.snapshot() == before

    @pytest.mark.parametrize("last_first", [False, True], ids=["the first one first", "the last one first"])
    async def test_the_first_that_is_home_of_those_that_all_were_away(
        self, last_first: bool, harness: Harness, actors: list[Actor]
    ) -> None:
        before = harness.snapshot()
        for actor in actors:
            await harness.moved(actor, State.VFIO)
        assert harness.state(PERSISTENCED) == "inactive"
        home: frozenset[PciAddress] = frozenset()
        for actor in actors[::-1] if last_first else actors:
            await harness.moved(actor, State.HOST)
            home |= {actor.gpu.address}
            assert (harness.state(PERSISTENCED), self.opened(harness)) == ("active", home)
        assert harness.snapshot() == before

    async def test_a_way_out_that_fails_while_another_one_is_away(self, harness: Harness, actors: list[Actor]) -> None:
        """It was the last one's claim that kept the unit stopped; that one rests."""
        for actor in actors:
            await harness.moved(actor, State.VFIO)
        await harness.moved(actors[0], State.HOST)
        await reverted_at_bind(harness, actors[0])

    async def test_a_way_out_that_fails_when_somebody_has_started_it(
        self, harness: Harness, actors: list[Actor]
    ) -> None:
        """It has found all but the one that was on its way out."""
        hang = harness.host.faults.add(Hang(), operation="probe", subject=actors[0].gpu.address)
        leaving = asyncio.create_task(reverted_at_bind(harness, actors[0]))
        await hang.reached.wait()
        harness.machine.units.settle(PERSISTENCED, "active")
        hang.release()
        await leaving

    async def test_whom_somebody_has_stopped_meanwhile_stays_so(self, harness: Harness, actors: list[Actor]) -> None:
        await harness.moved(actors[0], State.VFIO)
        harness.machine.units.stop(PERSISTENCED)
        await harness.moved(actors[0], State.HOST)
        assert harness.state(PERSISTENCED) == "inactive"

    async def test_not_while_another_one_is_moved(self, harness: Harness, actors: list[Actor]) -> None:
        first, second, *_ = actors
        await harness.moved(first, State.VFIO)
        hang = harness.host.faults.add(Hang(), operation="unbind", subject=second.gpu.address)
        leaves = await second.request(State.VFIO)
        await hang.reached.wait()
        await harness.moved(first, State.HOST)
        assert harness.state(PERSISTENCED) == "inactive"
        hang.release()
        await leaves.wait()
        assert self.opened(harness) == {actor.gpu.address for actor in actors if actor is not second}

    async def test_not_while_the_kernel_has_another_one(self, harness: Harness, actors: list[Actor]) -> None:
        """What waits in its driver for whoever has it open, must not find another one."""
        first, second, *_ = actors
        before = harness.snapshot()
        await harness.moved(first, State.VFIO)
        hang = harness.host.faults.add(Hang(), operation="unbind", subject=second.gpu.address)
        await (await second.request(State.VFIO)).wait()
        await harness.moved(first, State.HOST)
        assert (second.state, harness.state(PERSISTENCED)) == (State.WEDGED, "inactive")
        hang.release()
        await harness.witness.until(lambda: second.state is State.HOST)
        await harness.may_sleep(second)
        assert harness.snapshot() == before

    async def test_also_while_somebody_asks_for_another_one(self, harness: Harness, actors: list[Actor]) -> None:
        """The one that left last is to be moved, perhaps: nothing is done to it yet."""
        for actor in actors:
            await harness.moved(actor, State.VFIO)
        *_, third, second, last = actors
        await harness.moved(third, State.HOST)
        hang = harness.host.faults.add(Hang(), operation="capture", subject=last.gpu.address)
        harness.host.faults.add(Errno(5), operation="capture", subject=last.gpu.address)
        asked = asyncio.create_task(last.request(State.HOST))
        await hang.reached.wait()
        await harness.moved(second, State.HOST)
        assert self.opened(harness) == {second.gpu.address, third.gpu.address}
        hang.release()
        with pytest.raises(Failed):
            await asked

    async def test_not_while_another_one_is_moved_whose_driver_nobody_knows(self, tmp_path: Path) -> None:
        """Its display function has none; a member has, and only that can be seen."""
        first, second, other = (PciAddress.parse(f"0000:{number}1:00.0") for number in (1, 2, 3))
        host = SCENARIOS["server"]()
        host.machine.units.stop(PERSISTENCED)
        await host.machine.unbind(first, "nvidia", Call("unbind", first))
        host.machine.units.settle(PERSISTENCED, "active")
        settings = Config(gpus=(GpuConfig(first, managed=True, members=(second,)),))
        harness = await Harness.start(host, tmp_path, settings)
        several, one = harness.fleet.find(str(first)), harness.fleet.find(str(other))
        await harness.moved(one, State.VFIO)
        hang = harness.host.faults.add(Hang(), operation="unbind", subject=second)
        leaves = await several.request(State.VFIO)
        await hang.reached.wait()
        await harness.moved(one, State.HOST)
        assert harness.state(PERSISTENCED) == "inactive"
        hang.release()
        await leaves.wait()
        assert other in self.opened(harness)

    @pytest.mark.parametrize("cancelled", [True, False])
    async def test_not_before_it_is_certain_that_another_one_stays_home(
        self, cancelled: bool, harness: Harness, actors: list[Actor]
    ) -> None:
        """It would have that one open, which may have to go back to vfio."""
        first, second, *_ = actors
        await harness.moved(first, State.VFIO)
        await harness.moved(second, State.VFIO)
        hang = harness.host.faults.add(Hang(), operation="set_override", subject=first.gpu.address, nth=2)
        if not cancelled:
            harness.host.faults.add(Errno(5), operation="set_override", subject=first.gpu.address, nth=2)
        back = await first.request(State.HOST)
        await hang.reached.wait()
        home = await second.request(State.HOST)
        await harness.witness.until(lambda: "restart" in harness.witness.at[second.gpu.address].title)
        if cancelled:
            first.cancel(back.id, THE_SERVICE)
        hang.release()
        await back.wait()
        await home.wait()
        assert (first.state, second.state, home.reason) == (State.VFIO, State.HOST, "")
        assert self.opened(harness) == {actor.gpu.address for actor in actors if actor is not first}

    async def test_of_several_that_come_home_together_it_is_restarted_once(
        self, harness: Harness, actors: list[Actor]
    ) -> None:
        for actor in actors[:4]:
            await harness.moved(actor, State.VFIO)
        starts: list[str] = []
        harness.machine.units.settled = lambda unit, state: starts.append(state) if unit == PERSISTENCED else None
        for switch in [await actor.request(State.HOST) for actor in actors[:4]]:
            await switch.wait()
        assert starts.count("active") == 1
        assert self.opened(harness) == {actor.gpu.address for actor in actors}

    async def test_one_that_goes_back_to_vfio_keeps_no_other_from_being_found(self, tmp_path: Path) -> None:
        """It was stopped for that one, which left last."""
        harness = await Harness.of("server", tmp_path, reset_on_failure=False, rescan_on_failure=False)
        actors = list(harness.fleet.actors.values())
        for actor in actors:
            await harness.moved(actor, State.VFIO)
        *_, third, second, last = actors
        await harness.moved(third, State.HOST)
        hang = harness.host.faults.add(Hang(), operation="probe", subject=last.gpu.address)
        harness.host.faults.add(Errno(5), operation="probe", subject=last.gpu.address)
        back = await last.request(State.HOST)
        await hang.reached.wait()
        home = await second.request(State.HOST)
        hang.release()
        await back.wait()
        await home.wait()
        assert last.state is State.VFIO
        assert self.opened(harness) == {second.gpu.address, third.gpu.address}

    async def test_a_restart_that_takes_too_long_goes_on(self, harness: Harness, actors: list[Actor]) -> None:
        """Cancelled half-way, it would leave the others without."""
        await harness.moved(actors[0], State.VFIO)
        hang = harness.host.faults.add(Hang(), operation="start_unit", subject=PERSISTENCED)
        switch = await harness.switch(actors[0], State.HOST)
        assert (switch.result, actors[0].state, harness.pages) == (Result.DONE, State.HOST, [])
        assert "nvidia-persistenced.service" in switch.reason
        hang.release()
        # Of the simulated clock, which jumps: all that is at work by then is over.
        await asyncio.sleep(1)
        assert self.opened(harness) == {actor.gpu.address for actor in actors}


class TestConfigured:
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        host = laptop()
        host.machine.units.add(OLLAMA)
        return await Harness.start(host, tmp_path, config(stop_units=["ollama.service"]))

    @pytest.fixture
    def actor(self, harness: Harness) -> Actor:
        return harness.fleet.find("01:00.0")

    async def test_stopped_and_started_again(self, harness: Harness, actor: Actor) -> None:
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        assert harness.state(OLLAMA) == "inactive"
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_one_that_is_off_stays_off(self, harness: Harness, actor: Actor) -> None:
        harness.machine.units.stop(OLLAMA)
        await harness.moved(actor, State.VFIO)
        await harness.moved(actor, State.HOST)
        assert harness.state(OLLAMA) == "inactive"

    async def test_one_more_for_this_call(self, harness: Harness, actor: Actor) -> None:
        harness.machine.units.add(GETTY)
        await harness.moved(actor, State.VFIO, Options(stop_units=("getty@tty1.service",)))
        assert (harness.state(OLLAMA), harness.state(GETTY)) == ("inactive", "inactive")
        await harness.moved(actor, State.HOST)
        assert (harness.state(OLLAMA), harness.state(GETTY)) == ("active", "active")

    async def test_one_that_does_not_exist(self, harness: Harness, actor: Actor) -> None:
        with pytest.raises(NotViable, match=r"^there is no missing\.service, which is to be stopped first: correct"):
            await actor.request(State.VFIO, Options(stop_units=("missing.service",)))
        assert (harness.pages, actor.state, actor.switch) == ([], State.HOST, None)

    @pytest.mark.parametrize(
        ("fault", "sentence"),
        [(Errno(1), "cannot stop ollama.service: Operation not permitted"), (Hang(), "ollama.service")],
        ids=["refuses", "hangs"],
    )
    async def test_one_that_does_not_stop(self, fault: Fault, sentence: str, harness: Harness, actor: Actor) -> None:
        """What was stopped beside it comes back."""
        harness.host.faults.add(fault, operation="stop_unit", subject=OLLAMA)
        started = asyncio.get_running_loop().time()
        assert sentence in await reverted(harness, actor)
        waited = asyncio.get_running_loop().time() - started
        assert waited == (100 if isinstance(fault, Hang) else 0)

    async def test_all_that_do_not_are_told(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Errno(1), operation="stop_unit", nth=None)
        reason = await reverted(harness, actor)
        assert "ollama.service" in reason
        assert "nvidia-persistenced.service" in reason

    async def test_where_nobody_can_tell_whether_it_runs(self, harness: Harness, actor: Actor) -> None:
        harness.host.faults.add(Errno(5), operation="active")
        before = harness.snapshot()
        with pytest.raises(Failed, match=r"^cannot tell whether ollama\.service is active: "):
            await actor.request(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])

    @pytest.mark.parametrize("fault", [Errno(5), Hang()], ids=["fails", "hangs"])
    async def test_one_that_does_not_start_takes_nothing_away(
        self, fault: Fault, harness: Harness, actor: Actor
    ) -> None:
        """The GPU is home, and that is said with the fault."""
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(fault, operation="start_unit", subject=OLLAMA)
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, actor.state, harness.pages) == (Result.DONE, State.HOST, [])
        assert "ollama.service" in switch.reason
        assert harness.state(PERSISTENCED) == "active"

    async def test_one_that_somebody_started_meanwhile(self, harness: Harness, actor: Actor) -> None:
        await harness.moved(actor, State.VFIO)
        harness.machine.units.settle(OLLAMA, "active")
        await harness.moved(actor, State.HOST)
        assert harness.state(OLLAMA) == "active"

    async def test_a_cancelled_stop_is_no_debt(self, harness: Harness, actor: Actor) -> None:
        hang = harness.host.faults.add(Hang(), operation="stop_unit", subject=OLLAMA)
        before = harness.snapshot()
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        stopping = asyncio.create_task(harness.fleet.stop("the service is stopping"))
        await asyncio.wait([stopping])
        assert switch.result is Result.CANCELLED
        assert (harness.snapshot(), harness.pages) == (before, [])


class TestDesktop:
    """A display manager that holds the only GPU, and a session of a person on it."""

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        return await Harness.of("single", tmp_path, after_host="getty@tty1.service")

    async def test_there_and_back(self, harness: Harness) -> None:
        harness.machine.units.add(GETTY, active=False)
        actor = harness.fleet.find("")
        await harness.moved(actor, State.VFIO)
        assert harness.state(DISPLAY_MANAGER) == "inactive"
        await harness.moved(actor, State.HOST)
        assert (harness.state(DISPLAY_MANAGER), harness.state(GETTY)) == ("active", "active")
        assert "Xorg" in harness.machine.users(actor.gpu.address)

    async def test_after_a_failure_the_users_unit_is_not_started(self, harness: Harness) -> None:
        harness.machine.units.add(GETTY, active=False)
        harness.host.faults.add(Errno(5), operation="set_override")
        await reverted(harness, harness.fleet.find(""))
        assert (harness.state(DISPLAY_MANAGER), harness.state(GETTY)) == ("active", "inactive")

    async def test_a_unit_of_the_users_choice_that_does_not_exist(self, harness: Harness) -> None:
        actor = harness.fleet.find("")
        await harness.moved(actor, State.VFIO)
        switch = await harness.switch(actor, State.HOST)
        assert (switch.result, harness.pages) == (Result.DONE, [])
        assert "getty@tty1.service" in switch.reason
        assert harness.state(DISPLAY_MANAGER) == "active"

    async def test_sessions_are_ended_where_that_is_configured(self, tmp_path: Path) -> None:
        """Somebody who called startx: no display manager is there to be stopped."""
        harness = await Harness.of("single", tmp_path, stop_units=[], end_sessions=True)
        actor = harness.fleet.find("")
        harness.machine.end("Xorg")
        assert "2" in harness.machine.units.sessions
        await harness.moved(actor, State.VFIO)
        assert "2" not in harness.machine.units.sessions

    async def test_and_one_that_does_not_end_is_told(self, tmp_path: Path) -> None:
        harness = await Harness.of("single", tmp_path, stop_units=[], end_sessions=True)
        harness.machine.end("Xorg")
        harness.host.faults.add(Errno(1), operation="end_session")
        assert "session 2" in await reverted(harness, harness.fleet.find(""))


class TestTheSystemGoesDown:
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        return await Harness.of("laptop", tmp_path)

    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    async def test_nothing_begins(self, target: State, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        if target is State.HOST:
            await harness.moved(actor, State.VFIO)
        harness.machine.units.stopping = True
        before = harness.snapshot()
        with pytest.raises(Failed, match=r"^cannot switch 0000:01:00\.0: the system is going down$"):
            await actor.request(target)
        assert harness.snapshot() == before

    async def test_a_revert_starts_no_units(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="unbind")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        harness.machine.units.stopping = True
        stopping = asyncio.create_task(harness.fleet.stop("the service is stopping"))
        hang.release()
        await stopping
        assert (switch.result, actor.state) == (Result.CANCELLED, State.HOST)
        assert harness.snapshot() == before | {PERSISTENCED: "inactive", "opened by units": {}}


class TestTheServiceDies:
    async def test_at_each_step_its_units_come_back(self, tmp_path: Path) -> None:
        index = 1
        while True:
            harness = await Harness.of("single", tmp_path / str(index))
            actor = harness.fleet.find("")
            before = harness.snapshot()
            again = await self.crashed(harness, actor, index)
            if again is None:
                break
            assert again.fleet.find("").state is State.HOST
            assert (again.snapshot(), again.pages) == (before, [])
            index += 1
        assert index > 15

    async def test_units_are_waited_for_only_once_the_service_has_started(self, tmp_path: Path) -> None:
        """Whoever waits for it may be what it would wait for."""
        harness = await Harness.of("single", tmp_path)
        hang = harness.host.faults.add(Hang(), operation="unbind")
        actor = harness.fleet.find("")
        await actor.request(State.VFIO)
        await hang.reached.wait()
        hang.release()
        never = harness.host.faults.add(Hang(), operation="start_unit")
        again = await harness.crash(actor, restore_deferred=False)
        assert not never.reached.is_set()
        assert (again.fleet.find("").state, again.pages) == (State.HOST, ["0000_01_00_0.json"])
        restoring = asyncio.create_task(again.fleet.restore_deferred())
        await never.reached.wait()
        never.release()
        await restoring
        assert (again.state(DISPLAY_MANAGER), again.pages) == ("active", [])

    @staticmethod
    async def crashed(harness: Harness, actor: Actor, index: int) -> Harness | None:
        """Switch to vfio, and die at this step; the next service, or None where there are fewer steps."""
        killed: list[int] = []

        def die(actor: Actor, event: StepEvent) -> None:
            if event.index == index and not killed:
                assert actor.runner.task is not None
                actor.runner.task.cancel()
                killed.append(index)

        harness.witness.on_step = die
        switch = await actor.request(State.VFIO)
        assert actor.runner.task is not None
        await asyncio.wait([actor.runner.task])
        # The last step may be the end of it at once.
        return await harness.crash(actor) if killed and switch.result is not Result.DONE else None


class TestThePulledCard:
    """It does not come home by a switch, and its units do not wait for that."""

    async def test_what_was_stopped_for_it_comes_back(self, tmp_path: Path) -> None:
        harness = await Harness.of("single", tmp_path)
        actor = harness.fleet.find("")
        await harness.moved(actor, State.VFIO)
        assert harness.state(DISPLAY_MANAGER) == "inactive"
        await harness.machine.unplug("0000:01:00")
        await harness.witness.until(lambda: actor.state is State.ABSENT)
        await harness.fleet._restoring[actor.gpu.address]
        assert (harness.state(DISPLAY_MANAGER), harness.pages) == ("active", [])

    async def test_also_where_it_was_pulled_while_no_service_was_there(self, tmp_path: Path) -> None:
        harness = await Harness.of("single", tmp_path)
        await harness.moved(harness.fleet.find(""), State.VFIO)
        await harness.host.close()
        await harness.machine.unplug("0000:01:00")
        harness = await harness.again()
        assert (harness.state(DISPLAY_MANAGER), harness.pages) == ("active", [])

    @pytest.mark.parametrize(
        ("fault", "told"),
        [(Errno(5), "cannot start display-manager.service"), (Hang(), "display-manager.service: not started after")],
        ids=["refused", "hangs"],
    )
    async def test_what_does_not_start_is_told_and_not_kept(
        self, fault: Errno | Hang, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The host is asked once: nothing of this GPU is left that would ask again."""
        harness = await Harness.of("single", tmp_path)
        actor = harness.fleet.find("")
        await harness.moved(actor, State.VFIO)
        harness.host.faults.add(fault, operation="start_unit", subject=DISPLAY_MANAGER)
        await harness.machine.unplug("0000:01:00")
        await harness.witness.until(lambda: actor.state is State.ABSENT)
        await harness.fleet._restoring[actor.gpu.address]
        assert any(told in message for message in caplog.messages)
        assert harness.state(DISPLAY_MANAGER) != "active"
        assert harness.pages == []
