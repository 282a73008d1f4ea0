"""Units that several GPUs need stopped: started by the last of those that are owed them."""

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
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from tests.simulated.bed import Bed, config

OLLAMA = Unit("ollama.service")


async def two_cards(directory: Path, number: int = 2, **rules: object) -> Bed:
    """Two cards of nvidia, or another number of them, and its daemon on all."""
    numbers = range(1, number + 1)
    slots = [Slot(f"0000:{n}1:00", n, f"0000:{n}0:01.0") for n in numbers]
    cards = [slot.function(0, NVIDIA, 0x20F1, DISPLAY_3D) for slot in slots]
    host = boot([*(port(f"0000:{n}0:01.0", 20 + n) for n in numbers), *cards])
    host.machine.run("nvidia-persistenced", unit=PERSISTENCED, opens="nvidia")
    host.machine.units.add(OLLAMA)
    return await Bed.made(host, directory, config("", **rules))


class TestTwoGpus:
    """That share nvidia's daemon, and a unit that is configured for both."""

    @pytest.mark.parametrize("out", list(itertools.permutations(("11", "21"))), ids=" ".join)
    @pytest.mark.parametrize("home", list(itertools.permutations(("11", "21"))), ids=" ".join)
    async def test_in_every_order(self, out: tuple[str, str], home: tuple[str, str], tmp_path: Path) -> None:
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        before, states = bed.snapshot(), []
        for number in out:
            await bed.moved(bed.fleet.find(f"{number}:00.0"), State.VFIO)
            states.append((bed.state(PERSISTENCED), bed.state(OLLAMA)))
        for number in home:
            await bed.moved(bed.fleet.find(f"{number}:00.0"), State.HOST)
            states.append((bed.state(PERSISTENCED), bed.state(OLLAMA)))
        assert states == [
            ("active", "inactive"),
            ("inactive", "inactive"),
            # the daemon was stopped for the sake of the second one that left, and comes with it
            ("active" if home[0] == out[1] else "inactive", "inactive"),
            ("active", "active"),
        ]
        assert (bed.snapshot(), bed.pages) == (before, [])

    @pytest.mark.parametrize("out", list(itertools.permutations(("11", "21"))), ids=" ".join)
    @pytest.mark.parametrize("home", list(itertools.permutations(("11", "21"))), ids=" ".join)
    async def test_one_that_is_off_stays_off(self, out: tuple[str, str], home: tuple[str, str], tmp_path: Path) -> None:
        """That both need it stopped does not mean that it ever ran."""
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        bed.machine.units.stop(OLLAMA)
        before = bed.snapshot()
        for numbers, target in ((out, State.VFIO), (home, State.HOST)):
            for number in numbers:
                await bed.moved(bed.fleet.find(f"{number}:00.0"), target)
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_one_that_is_off_stays_off_while_both_leave_at_once(self, tmp_path: Path) -> None:
        bed = await two_cards(tmp_path, 3, stop_units=["ollama.service"])
        bed.machine.units.stop(OLLAMA)
        before = bed.snapshot()
        hang = bed.host.faults.add(Hang(), operation="stop_unit", subject=OLLAMA)
        first, second, _ = bed.fleet.actors.values()
        leaving = asyncio.create_task(bed.switch(first, State.VFIO))
        await hang.reached.wait()
        following = asyncio.create_task(bed.switch(second, State.VFIO))
        await bed.witness.until(lambda: second.state is State.DETACHING)
        hang.release()
        await asyncio.gather(leaving, following)
        for actor in (first, second):
            await bed.moved(actor, State.HOST)
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_one_that_somebody_started_while_the_other_was_away(self, tmp_path: Path) -> None:
        """It ran beside the first one that is away, and may do so again."""
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        bed.machine.units.stop(OLLAMA)
        first, second = bed.fleet.actors.values()
        await bed.moved(first, State.VFIO)
        bed.machine.units.settle(OLLAMA, "active")
        await bed.moved(second, State.VFIO)
        assert bed.state(OLLAMA) == "inactive"
        await bed.moved(second, State.HOST)
        assert bed.state(OLLAMA) == "active"
        await bed.moved(first, State.HOST)
        assert (bed.state(OLLAMA), bed.pages) == ("active", [])

    async def test_at_the_same_time(self, tmp_path: Path) -> None:
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        before = bed.snapshot()
        actors = list(bed.fleet.actors.values())
        for target in (State.VFIO, State.HOST):
            switches = await asyncio.gather(*(bed.switch(actor, target) for actor in actors))
            assert [switch.result for switch in switches] == [Result.DONE] * 2
        assert (bed.snapshot(), bed.pages) == (before, [])

    async def test_one_that_fails_starts_nothing_that_the_other_needs_stopped(self, tmp_path: Path) -> None:
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        first, second = bed.fleet.find("11:00.0"), bed.fleet.find("21:00.0")
        await bed.moved(first, State.VFIO)
        bed.host.faults.add(Errno(5), operation="set_override", subject=second.gpu.address)
        switch = await bed.switch(second, State.VFIO)
        assert (switch.result, second.state) == (Result.REVERTED, State.HOST)
        assert bed.state(OLLAMA) == "inactive"
        await bed.moved(first, State.HOST)
        assert bed.state(OLLAMA) == "active"

    async def test_also_after_the_service_was_restarted(self, tmp_path: Path) -> None:
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        before = bed.snapshot()
        for actor in bed.fleet.actors.values():
            await bed.moved(actor, State.VFIO)
        again = await bed.again()
        first, second = again.fleet.find("11:00.0"), again.fleet.find("21:00.0")
        await again.moved(first, State.HOST)
        assert again.state(OLLAMA) == "inactive"
        await again.moved(second, State.HOST)
        assert (again.snapshot(), again.pages) == (before, [])

    async def test_where_another_card_stays_it_comes_back_at_once(self, tmp_path: Path) -> None:
        bed = await two_cards(tmp_path)
        first, second = bed.fleet.find("11:00.0"), bed.fleet.find("21:00.0")
        stopped: list[bool] = []
        bed.witness.on_step = lambda *_: stopped.append(bed.state(PERSISTENCED) == "inactive")
        await bed.moved(first, State.VFIO)
        assert any(stopped)
        assert bed.state(PERSISTENCED) == "active"
        assert "nvidia-persistenced" in bed.machine.users(second.gpu.address)

    async def test_what_it_is_still_owed_counts_for_the_next_that_leaves(self, tmp_path: Path) -> None:
        """Nobody could start its unit yet, so it is stopped, and is to run when both are done with it."""
        bed = await two_cards(tmp_path, stop_units=["ollama.service"])
        first = bed.fleet.find("11:00.0")
        await bed.moved(first, State.VFIO)
        await bed.host.close()
        await bed.machine.unplug("0000:11:00")
        bed = await Bed.made(SimulatedHost(bed.machine), bed.directory, bed.fleet.config, restore_deferred=False)
        second = bed.fleet.find("21:00.0")
        await bed.moved(second, State.VFIO)
        await bed.fleet.restore_deferred()
        assert bed.state(OLLAMA) == "inactive"
        await bed.moved(second, State.HOST)
        assert (bed.state(OLLAMA), bed.pages) == ("active", [])
