"""Units: stopped for the GPU's sake, remembered, and started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno, Fault, Hang
from gpuswitch.host.simulated.scenarios import DISPLAY_MANAGER, PERSISTENCED, laptop
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import Result
from tests.simulated.bed import Bed, config

POWERD, GETTY = Unit("nvidia-powerd.service"), Unit("getty@tty1.service")
OLLAMA = Unit("ollama.service")


async def reverted(bed: Bed, actor: Actor, options: Options = Options()) -> str:  # noqa: B008 -- frozen
    """See that it begins, fails, and leaves no trace; the sentence."""
    before, restore_state = bed.snapshot(), bed.pages
    switch = await bed.switch(actor, State.VFIO, options)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (bed.snapshot(), bed.pages) == (before, restore_state)
    return switch.reason


class TestComfort:
    """Those that have the GPU open without anybody using it."""

    async def test_the_last_cards_daemon_comes_back_with_it(self, tmp_path: Path) -> None:
        bed = await Bed.of("laptop", tmp_path)
        bed.machine.units.add(POWERD, active=False)
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        assert (bed.state(PERSISTENCED), bed.state(POWERD)) == ("inactive", "inactive")
        await bed.moved(actor, State.HOST)
        assert (bed.state(PERSISTENCED), bed.state(POWERD)) == ("active", "inactive")
        assert "nvidia-persistenced" in bed.machine.users(actor.gpu.address)

    async def test_one_that_is_off_stays_off(self, tmp_path: Path) -> None:
        bed = await Bed.of("laptop", tmp_path)
        bed.machine.units.stop(PERSISTENCED)
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        await bed.moved(actor, State.HOST)
        assert bed.state(PERSISTENCED) == "inactive"

    async def test_where_no_manager_answers_they_are_nobodys_business(self, tmp_path: Path) -> None:
        bed = await Bed.of("plain", tmp_path)
        bed.machine.units.managed = False
        actor = bed.fleet.find("01:00.0")
        await bed.moved(actor, State.VFIO)
        await bed.moved(actor, State.HOST)


class TestConfigured:
    @pytest.fixture
    async def bed(self, tmp_path: Path) -> Bed:
        host = laptop()
        host.machine.units.add(OLLAMA)
        return await Bed.made(host, tmp_path, config(stop_units=["ollama.service"]))

    @pytest.fixture
    def actor(self, bed: Bed) -> Actor:
        return bed.fleet.find("01:00.0")

    async def test_stopped_and_started_again(self, bed: Bed, actor: Actor) -> None:
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        assert bed.state(OLLAMA) == "inactive"
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_one_that_is_off_stays_off(self, bed: Bed, actor: Actor) -> None:
        bed.machine.units.stop(OLLAMA)
        await bed.moved(actor, State.VFIO)
        await bed.moved(actor, State.HOST)
        assert bed.state(OLLAMA) == "inactive"

    async def test_one_more_for_this_call(self, bed: Bed, actor: Actor) -> None:
        bed.machine.units.add(GETTY)
        await bed.moved(actor, State.VFIO, Options(stop_units=("getty@tty1.service",)))
        assert (bed.state(OLLAMA), bed.state(GETTY)) == ("inactive", "inactive")
        await bed.moved(actor, State.HOST)
        assert (bed.state(OLLAMA), bed.state(GETTY)) == ("active", "active")

    async def test_one_that_does_not_exist(self, bed: Bed, actor: Actor) -> None:
        with pytest.raises(NotViable, match=r"^there is no missing\.service, which is to be stopped first: correct"):
            await actor.request(State.VFIO, Options(stop_units=("missing.service",)))
        assert (bed.pages, actor.state, actor.switch) == ([], State.HOST, None)

    @pytest.mark.parametrize(
        ("fault", "sentence"),
        [(Errno(1), "cannot stop ollama.service: Operation not permitted"), (Hang(), "ollama.service")],
        ids=["refuses", "hangs"],
    )
    async def test_one_that_does_not_stop(self, fault: Fault, sentence: str, bed: Bed, actor: Actor) -> None:
        """What was stopped beside it comes back."""
        bed.host.faults.add(fault, operation="stop_unit", subject=OLLAMA)
        started = asyncio.get_running_loop().time()
        assert sentence in await reverted(bed, actor)
        waited = asyncio.get_running_loop().time() - started
        assert waited == (100 if isinstance(fault, Hang) else 0)

    async def test_all_that_do_not_are_told(self, bed: Bed, actor: Actor) -> None:
        bed.host.faults.add(Errno(1), operation="stop_unit", nth=None)
        reason = await reverted(bed, actor)
        assert "ollama.service" in reason
        assert "nvidia-persistenced.service" in reason

    async def test_where_nobody_can_tell_whether_it_runs(self, bed: Bed, actor: Actor) -> None:
        bed.host.faults.add(Errno(5), operation="active")
        before = bed.snapshot()
        with pytest.raises(Failed, match=r"^cannot tell whether ollama\.service is active: "):
            await actor.request(State.VFIO)
        assert (bed.snapshot(), bed.pages) == (before, [])

    @pytest.mark.parametrize("fault", [Errno(5), Hang()], ids=["fails", "hangs"])
    async def test_one_that_does_not_start_takes_nothing_away(self, fault: Fault, bed: Bed, actor: Actor) -> None:
        """The GPU is home, and that is said with the fault."""
        await bed.moved(actor, State.VFIO)
        bed.host.faults.add(fault, operation="start_unit", subject=OLLAMA)
        switch = await bed.switch(actor, State.HOST)
        assert (switch.result, actor.state, bed.pages) == (Result.DONE, State.HOST, [])
        assert "ollama.service" in switch.reason
        assert bed.state(PERSISTENCED) == "active"

    async def test_one_that_somebody_started_meanwhile(self, bed: Bed, actor: Actor) -> None:
        await bed.moved(actor, State.VFIO)
        bed.machine.units.settle(OLLAMA, "active")
        await bed.moved(actor, State.HOST)
        assert bed.state(OLLAMA) == "active"

    async def test_a_cancelled_stop_is_no_debt(self, bed: Bed, actor: Actor) -> None:
        hang = bed.host.faults.add(Hang(), operation="stop_unit", subject=OLLAMA)
        before = bed.snapshot()
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        stopping = asyncio.create_task(bed.fleet.stop("the service is stopping"))
        await asyncio.wait([stopping])
        assert switch.result is Result.CANCELLED
        assert (bed.snapshot(), bed.pages) == (before, [])


class TestDesktop:
    """A display manager that holds the only GPU, and a session of a person on it."""

    @pytest.fixture
    async def bed(self, tmp_path: Path) -> Bed:
        return await Bed.of("single", tmp_path, after_host="getty@tty1.service")

    async def test_there_and_back(self, bed: Bed) -> None:
        bed.machine.units.add(GETTY, active=False)
        actor = bed.fleet.find("")
        await bed.moved(actor, State.VFIO)
        assert bed.state(DISPLAY_MANAGER) == "inactive"
        await bed.moved(actor, State.HOST)
        assert (bed.state(DISPLAY_MANAGER), bed.state(GETTY)) == ("active", "active")
        assert "Xorg" in bed.machine.users(actor.gpu.address)

    async def test_after_a_failure_the_users_unit_is_not_started(self, bed: Bed) -> None:
        bed.machine.units.add(GETTY, active=False)
        bed.host.faults.add(Errno(5), operation="set_override")
        await reverted(bed, bed.fleet.find(""))
        assert (bed.state(DISPLAY_MANAGER), bed.state(GETTY)) == ("active", "inactive")

    async def test_a_unit_of_the_users_choice_that_does_not_exist(self, bed: Bed) -> None:
        actor = bed.fleet.find("")
        await bed.moved(actor, State.VFIO)
        switch = await bed.switch(actor, State.HOST)
        assert (switch.result, bed.pages) == (Result.DONE, [])
        assert "getty@tty1.service" in switch.reason
        assert bed.state(DISPLAY_MANAGER) == "active"

    async def test_sessions_are_ended_where_that_is_configured(self, tmp_path: Path) -> None:
        """Somebody who called startx: no display manager is there to be stopped."""
        bed = await Bed.of("single", tmp_path, stop_units=[], end_sessions=True)
        actor = bed.fleet.find("")
        bed.machine.end("Xorg")
        assert "2" in bed.machine.units.sessions
        await bed.moved(actor, State.VFIO)
        assert "2" not in bed.machine.units.sessions

    async def test_and_one_that_does_not_end_is_told(self, tmp_path: Path) -> None:
        bed = await Bed.of("single", tmp_path, stop_units=[], end_sessions=True)
        bed.machine.end("Xorg")
        bed.host.faults.add(Errno(1), operation="end_session")
        assert "session 2" in await reverted(bed, bed.fleet.find(""))


class TestTheSystemGoesDown:
    @pytest.fixture
    async def bed(self, tmp_path: Path) -> Bed:
        return await Bed.of("laptop", tmp_path)

    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    async def test_nothing_begins(self, target: State, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        if target is State.HOST:
            await bed.moved(actor, State.VFIO)
        bed.machine.units.stopping = True
        before = bed.snapshot()
        with pytest.raises(Failed, match=r"^cannot switch 0000:01:00\.0: the system is going down$"):
            await actor.request(target)
        assert bed.snapshot() == before

    async def test_a_revert_starts_no_units(self, bed: Bed) -> None:
        actor = bed.fleet.find("01:00.0")
        before = bed.snapshot()
        hang = bed.host.faults.add(Hang(), operation="unbind")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        bed.machine.units.stopping = True
        stopping = asyncio.create_task(bed.fleet.stop("the service is stopping"))
        hang.release()
        await stopping
        assert (switch.result, actor.state) == (Result.CANCELLED, State.HOST)
        assert bed.snapshot() == before | {PERSISTENCED: "inactive"}


class TestTheServiceDies:
    async def test_at_each_step_its_units_come_back(self, tmp_path: Path) -> None:
        index = 1
        while True:
            bed = await Bed.of("single", tmp_path / str(index))
            actor = bed.fleet.find("")
            before = bed.snapshot()
            again = await self.crashed(bed, actor, index)
            if again is None:
                break
            assert again.fleet.find("").state is State.HOST
            assert (again.snapshot(), again.pages) == (before, [])
            index += 1
        assert index > 15

    async def test_units_are_waited_for_only_once_the_service_has_started(self, tmp_path: Path) -> None:
        """Whoever waits for it may be what it would wait for."""
        bed = await Bed.of("single", tmp_path)
        hang = bed.host.faults.add(Hang(), operation="unbind")
        actor = bed.fleet.find("")
        await actor.request(State.VFIO)
        await hang.reached.wait()
        hang.release()
        never = bed.host.faults.add(Hang(), operation="start_unit")
        again = await bed.crash(actor, restore_deferred=False)
        assert not never.reached.is_set()
        assert (again.fleet.find("").state, again.pages) == (State.HOST, ["0000_01_00_0.json"])
        restoring = asyncio.create_task(again.fleet.restore_deferred())
        await never.reached.wait()
        never.release()
        await restoring
        assert (again.state(DISPLAY_MANAGER), again.pages) == ("active", [])

    @staticmethod
    async def crashed(bed: Bed, actor: Actor, index: int) -> Bed | None:
        """Switch to vfio, and die at this step; the next service, or None where there are fewer steps."""
        killed: list[int] = []

        def die(actor: Actor, event: StepEvent) -> None:
            if event.index == index and not killed:
                assert actor.runner.task is not None
                actor.runner.task.cancel()
                killed.append(index)

        bed.witness.on_step = die
        await actor.request(State.VFIO)
        assert actor.runner.task is not None
        await asyncio.wait([actor.runner.task])
        return await bed.crash(actor) if killed else None


class TestThePulledCard:
    """It does not come home by a switch, and its units do not wait for that."""

    async def test_what_was_stopped_for_it_comes_back(self, tmp_path: Path) -> None:
        bed = await Bed.of("single", tmp_path)
        actor = bed.fleet.find("")
        await bed.moved(actor, State.VFIO)
        assert bed.state(DISPLAY_MANAGER) == "inactive"
        await bed.machine.unplug("0000:01:00")
        await bed.witness.until(lambda: actor.state is State.ABSENT)
        await bed.fleet._restoring[actor.gpu.address]
        assert (bed.state(DISPLAY_MANAGER), bed.pages) == ("active", [])

    async def test_also_where_it_was_pulled_while_no_service_was_there(self, tmp_path: Path) -> None:
        bed = await Bed.of("single", tmp_path)
        await bed.moved(bed.fleet.find(""), State.VFIO)
        await bed.host.close()
        await bed.machine.unplug("0000:01:00")
        bed = await bed.again()
        assert (bed.state(DISPLAY_MANAGER), bed.pages) == ("active", [])
