"""Units that several GPUs need stopped: started by the last of those that are owed them, a driver's by the first."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from gpuswitch.host.simulated.catalogue import DISPLAY_3D, NVIDIA, Slot, port
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import PERSISTENCED, boot
from gpuswitch.model.holders import Unit
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from tests.harness.simulated.harness import Harness, config

OLLAMA = Unit("ollama.service")


async def two_cards(directory: Path, number: int = 2, **rules: object) -> Harness:
    """Two cards of nvidia, or another number of them, and its daemon on all."""
    numbers = range(1, number + 1)
    slots = [Slot(f"0000:{n}1:00", n, f"0000:{n}0:01.0") for n in numbers]
    cards = [slot.function(0, NVIDIA, 0x20F1, DISPLAY_3D) for slot in slots]
    host = boot([*(port(f"0000:{n}0:01.0", 20 + n) for n in numbers), *cards])
    host.machine.run("nvidia-persistenced", unit=PERSISTENCED, opens="nvidia")
    host.machine.units.add(OLLAMA)
    return await Harness.start(host, directory, config("", **rules))


class TestTwoGpus:
    """That share nvidia's daemon, and a unit that is configured for both."""

    @pytest.mark.parametrize("out", list(itertools.permutations(("11", "21"))), ids=" ".join)
    @pytest.mark.parametrize("home", list(itertools.permutations(("11", "21"))), ids=" ".join)
    async def test_in_every_order(self, out: tuple[str, str], home: tuple[str, str], tmp_path: Path) -> None:
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        before, states = harness.snapshot(), []
        for number in out:
            await harness.moved(harness.fleet.find(f"{number}:00.0"), State.VFIO)
            states.append((harness.state(PERSISTENCED), harness.state(OLLAMA)))
        for number in home:
            await harness.moved(harness.fleet.find(f"{number}:00.0"), State.HOST)
            states.append((harness.state(PERSISTENCED), harness.state(OLLAMA)))
        assert states == [
            ("active", "inactive"),
            ("inactive", "inactive"),
            # the daemon was stopped only while the second one left: it comes with the first one that is home
            ("active", "inactive"),
            ("active", "active"),
        ]
        assert (harness.snapshot(), harness.pages) == (before, [])

    @pytest.mark.parametrize("out", list(itertools.permutations(("11", "21"))), ids=" ".join)
    @pytest.mark.parametrize("home", list(itertools.permutations(("11", "21"))), ids=" ".join)
    async def test_one_that_is_off_stays_off(self, out: tuple[str, str], home: tuple[str, str], tmp_path: Path) -> None:
        """That both need it stopped does not mean that it ever ran."""
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        harness.machine.units.stop(OLLAMA)
        before = harness.snapshot()
        for numbers, target in ((out, State.VFIO), (home, State.HOST)):
            for number in numbers:
                await harness.moved(harness.fleet.find(f"{number}:00.0"), target)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_one_that_is_off_stays_off_while_both_leave_at_once(self, tmp_path: Path) -> None:
        harness = await two_cards(tmp_path, 3, stop_units=["ollama.service"])
        harness.machine.units.stop(OLLAMA)
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="stop_unit", subject=OLLAMA)
        first, second, _ = harness.fleet.actors.values()
        leaving = asyncio.create_task(harness.switch(first, State.VFIO))
        await hang.reached.wait()
        following = asyncio.create_task(harness.switch(second, State.VFIO))
        await harness.witness.until(lambda: second.state is State.DETACHING)
        hang.release()
        await asyncio.gather(leaving, following)
        for actor in (first, second):
            await harness.moved(actor, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_one_that_somebody_started_while_the_other_was_away(self, tmp_path: Path) -> None:
        """It ran beside the first one that is away, and may do so again."""
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        harness.machine.units.stop(OLLAMA)
        first, second = harness.fleet.actors.values()
        await harness.moved(first, State.VFIO)
        harness.machine.units.settle(OLLAMA, "active")
        await harness.moved(second, State.VFIO)
        assert harness.state(OLLAMA) == "inactive"
        await harness.moved(second, State.HOST)
        assert harness.state(OLLAMA) == "active"
        await harness.moved(first, State.HOST)
        assert (harness.state(OLLAMA), harness.pages) == ("active", [])

    async def test_at_the_same_time(self, tmp_path: Path) -> None:
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        before = harness.snapshot()
        actors = list(harness.fleet.actors.values())
        for target in (State.VFIO, State.HOST):
            switches = await asyncio.gather(*(harness.switch(actor, target) for actor in actors))
            assert [switch.result for switch in switches] == [Result.DONE] * 2
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_one_that_fails_starts_nothing_that_the_other_needs_stopped(self, tmp_path: Path) -> None:
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        first, second = harness.fleet.find("11:00.0"), harness.fleet.find("21:00.0")
        await harness.moved(first, State.VFIO)
        harness.host.faults.add(Errno(5), operation="set_override", subject=second.gpu.address)
        switch = await harness.switch(second, State.VFIO)
        assert (switch.result, second.state) == (Result.REVERTED, State.HOST)
        assert harness.state(OLLAMA) == "inactive"
        await harness.moved(first, State.HOST)
        assert harness.state(OLLAMA) == "active"

    async def test_also_after_the_service_was_restarted(self, tmp_path: Path) -> None:
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        before = harness.snapshot()
        for actor in harness.fleet.actors.values():
            await harness.moved(actor, State.VFIO)
        again = await harness.again()
        first, second = again.fleet.find("11:00.0"), again.fleet.find("21:00.0")
        await again.moved(first, State.HOST)
        assert again.state(OLLAMA) == "inactive"
        await again.moved(second, State.HOST)
        assert (again.snapshot(), again.pages) == (before, [])

    async def test_where_another_card_stays_it_comes_back_at_once(self, tmp_path: Path) -> None:
        harness = await two_cards(tmp_path)
        first, second = harness.fleet.find("11:00.0"), harness.fleet.find("21:00.0")
        stopped: list[bool] = []
        harness.witness.on_step = lambda *_: stopped.append(harness.state(PERSISTENCED) == "inactive")
        await harness.moved(first, State.VFIO)
        assert any(stopped)
        assert harness.state(PERSISTENCED) == "active"
        assert "nvidia-persistenced" in harness.machine.users(second.gpu.address)

    async def test_a_card_that_was_pulled_from_its_machine_keeps_the_daemon_from_no_other(self, tmp_path: Path) -> None:
        """What was stopped for its sake is given back when its machine has ended, and not before."""
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        first, second = harness.fleet.actors.values()
        for actor in (first, second):
            await harness.moved(actor, State.VFIO)
        second.own(Owner("win11", "5d7b"))
        await harness.machine.unplug("0000:21:00")
        await harness.witness.until(lambda: second.state is State.ABSENT)
        await harness.moved(first, State.HOST)
        assert (harness.state(PERSISTENCED), harness.state(OLLAMA)) == ("active", "inactive")
        ran = {program.name: program.process for program in harness.machine.processes.running()}
        second.own(None)
        await second.restore_deferred()
        assert (harness.state(OLLAMA), harness.pages) == ("active", [])
        assert {program.name: program.process for program in harness.machine.processes.running()} == ran

    async def test_a_daemon_that_is_configured_for_one_also_when_that_could_not_come_home(self, tmp_path: Path) -> None:
        harness = await two_cards(tmp_path, reset_on_failure=False, rescan_on_failure=False)
        before = harness.snapshot()
        first, second = harness.fleet.actors.values()
        await harness.moved(first, State.VFIO)
        await harness.moved(second, State.VFIO, Options(stop_units=(str(PERSISTENCED),)))
        harness.host.faults.add(Errno(5), operation="probe", subject=second.gpu.address)
        switch = await harness.switch(second, State.HOST)
        assert (switch.result, second.state) == (Result.REVERTED, State.VFIO)
        await harness.moved(first, State.HOST)
        assert harness.state(PERSISTENCED) == "inactive"
        await harness.moved(second, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_a_daemon_that_is_configured_and_that_somebody_started_finds_who_comes_home(
        self, tmp_path: Path
    ) -> None:
        """As udev does where a distribution has it start when the driver comes."""
        harness = await two_cards(tmp_path)
        before = harness.snapshot()
        first, _ = harness.fleet.actors.values()
        await harness.moved(first, State.VFIO, Options(stop_units=(str(PERSISTENCED),)))
        harness.machine.units.settle(PERSISTENCED, "active")
        await harness.moved(first, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_what_it_is_still_owed_counts_for_the_next_that_leaves(self, tmp_path: Path) -> None:
        """Nobody could start its unit yet, so it is stopped, and is to run when both are done with it."""
        harness = await two_cards(tmp_path, stop_units=["ollama.service"])
        first = harness.fleet.find("11:00.0")
        await harness.moved(first, State.VFIO)
        await harness.host.close()
        await harness.machine.unplug("0000:11:00")
        harness = await Harness.start(
            SimulatedHost(harness.machine), harness.directory, harness.fleet.config, restore_deferred=False
        )
        second = harness.fleet.find("21:00.0")
        await harness.moved(second, State.VFIO)
        await harness.fleet.restore_deferred()
        assert harness.state(OLLAMA) == "inactive"
        await harness.moved(second, State.HOST)
        assert (harness.state(OLLAMA), harness.pages) == ("active", [])
