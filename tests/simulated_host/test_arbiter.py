"""The arbiter: what several GPUs share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Unit
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter

FIRST, SECOND, THIRD = (PciAddress.parse(f"0000:0{n}:00.0") for n in (1, 2, 3))
SDDM, OLLAMA = Unit("sddm.service"), Unit("ollama.service")


@pytest.fixture
def host() -> SimulatedHost:
    host = plain()
    for unit in (SDDM, OLLAMA):
        host.machine.units.add(unit)
    return host


@pytest.fixture
def arbiter(host: SimulatedHost) -> Arbiter:
    """All three GPUs are owed both units."""
    arbiter = Arbiter(host.systemd)
    for each in (FIRST, SECOND, THIRD):
        arbiter.set_restore_state(each, RestoreState(units=(SDDM, OLLAMA)))
    return arbiter


async def settled(task: asyncio.Task[None]) -> bool:
    """Whether it is over, once all that can happen now has happened."""
    await asyncio.wait([task], timeout=0.001)
    return task.done()


class TestUnits:
    async def test_stopped_and_started(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        await arbiter.stop(FIRST, SDDM)
        assert host.machine.units.state(SDDM) == "inactive"
        await arbiter.start(FIRST, SDDM)
        assert host.machine.units.state(SDDM) == "active"
        assert host.machine.units.state(OLLAMA) == "active"

    @pytest.mark.parametrize("order", list(itertools.permutations((FIRST, SECOND, THIRD))), ids=str)
    async def test_the_last_who_needs_it_stopped_starts_it(
        self, order: tuple[PciAddress, ...], host: SimulatedHost, arbiter: Arbiter
    ) -> None:
        await asyncio.gather(*(arbiter.stop(gpu, SDDM) for gpu in (FIRST, SECOND, THIRD)))
        seen = []
        for gpu in order:
            await arbiter.start(gpu, SDDM)
            seen.append(host.machine.units.state(SDDM))
        assert seen == ["inactive", "inactive", "active"]

    async def test_who_stops_it_twice_starts_it_once(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        await arbiter.stop(FIRST, SDDM)
        await arbiter.stop(FIRST, SDDM)
        await arbiter.start(FIRST, SDDM)
        assert host.machine.units.state(SDDM) == "active"

    async def test_what_an_earlier_run_stopped_counts(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        host.machine.units.stop(SDDM)
        arbiter.claim(FIRST, RestoreState(units=(SDDM,)))
        await arbiter.stop(SECOND, SDDM)
        await arbiter.start(SECOND, SDDM)
        assert host.machine.units.state(SDDM) == "inactive"
        await arbiter.start(FIRST, SDDM)
        assert host.machine.units.state(SDDM) == "active"

    async def test_a_gpu_that_is_owed_nothing_any_more_needs_nothing(
        self, host: SimulatedHost, arbiter: Arbiter
    ) -> None:
        await arbiter.stop(FIRST, SDDM)
        await arbiter.stop(SECOND, SDDM)
        arbiter.set_restore_state(FIRST, NOTHING_TO_RESTORE)
        await arbiter.start(SECOND, SDDM)
        assert host.machine.units.state(SDDM) == "active"

    async def test_who_is_not_owed_it_is_not_in_the_way_of_who_is(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        arbiter.set_restore_state(FIRST, RestoreState(units=(OLLAMA,)))
        await arbiter.stop(FIRST, SDDM)
        await arbiter.stop(SECOND, SDDM)
        await arbiter.start(SECOND, SDDM)
        assert host.machine.units.state(SDDM) == "active"

    async def test_it_is_owed_until_the_last_one_is_owed_nothing(self, arbiter: Arbiter) -> None:
        seen = [arbiter.is_to_be_started(SDDM)]
        for each in (FIRST, SECOND, THIRD):
            arbiter.set_restore_state(each, NOTHING_TO_RESTORE)
            seen.append(arbiter.is_to_be_started(SDDM))
        assert seen == [True, True, True, False]

    async def test_nothing_starts_while_the_system_goes_down(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        await arbiter.stop(FIRST, SDDM)
        host.machine.units.stopping = True
        await arbiter.start(FIRST, SDDM)
        assert host.machine.units.state(SDDM) == "inactive"

    async def test_a_start_waits_for_a_stop_under_way(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        hang = host.faults.add(Hang(), operation="stop_unit", subject=SDDM)
        stopping = asyncio.create_task(arbiter.stop(FIRST, SDDM))
        await hang.reached.wait()
        starting = asyncio.create_task(arbiter.start(SECOND, SDDM))
        assert not await settled(starting)
        hang.release()
        await asyncio.gather(stopping, starting)
        # it is stopped for the first one's sake
        assert host.machine.units.state(SDDM) == "inactive"

    async def test_a_start_after_a_stop_that_is_not_needed_any_more(
        self, host: SimulatedHost, arbiter: Arbiter
    ) -> None:
        hang = host.faults.add(Hang(), operation="stop_unit", subject=SDDM)
        stopping = asyncio.create_task(arbiter.stop(FIRST, SDDM))
        await hang.reached.wait()
        starting = asyncio.create_task(arbiter.start(FIRST, SDDM))
        assert not await settled(starting)
        hang.release()
        await asyncio.gather(stopping, starting)
        assert host.machine.units.state(SDDM) == "active"

    async def test_a_stop_that_is_given_up_lets_others_have_the_unit(
        self, host: SimulatedHost, arbiter: Arbiter
    ) -> None:
        hang = host.faults.add(Hang(), operation="stop_unit", subject=SDDM)
        stopping = asyncio.create_task(arbiter.stop(FIRST, SDDM))
        await hang.reached.wait()
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        await arbiter.start(FIRST, SDDM)
        assert host.machine.units.state(SDDM) == "active"

    async def test_one_unit_does_not_wait_for_another(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        hang = host.faults.add(Hang(), operation="stop_unit", subject=SDDM)
        stopping = asyncio.create_task(arbiter.stop(FIRST, SDDM))
        await hang.reached.wait()
        await arbiter.stop(FIRST, OLLAMA)
        assert host.machine.units.state(OLLAMA) == "inactive"
        hang.release()
        await stopping

    async def test_what_the_manager_refuses_is_told(self, host: SimulatedHost, arbiter: Arbiter) -> None:
        with pytest.raises(KernelError, match=r"cannot stop missing\.service"):
            await arbiter.stop(FIRST, Unit("missing.service"))
        await arbiter.stop(FIRST, SDDM)
        host.faults.add(Errno(5), operation="start_unit")
        with pytest.raises(KernelError, match=r"cannot start sddm\.service"):
            await arbiter.start(FIRST, SDDM)


def gpu(address: PciAddress) -> Gpu:
    return Gpu(address, (address,))


def staying(*functions: PciAddress) -> Callable[[], Awaitable[set[PciAddress]]]:
    """A look which functions have the driver."""

    async def look() -> set[PciAddress]:
        return set(functions)

    return look


nobody = staying()
"""No other device has it."""


class TestTurns:
    async def test_one_of_two_at_a_time(self, arbiter: Arbiter) -> None:
        await arbiter.take_turn(gpu(FIRST), "nvidia", nobody)
        assert arbiter.moving("nvidia") == (FIRST,)
        second = asyncio.create_task(arbiter.take_turn(gpu(SECOND), "nvidia", nobody))
        assert not await settled(second)
        arbiter.end_turn(FIRST)
        await second
        assert arbiter.moving("nvidia") == (SECOND,)

    async def test_a_turn_that_ends_during_the_look_is_not_missed(self, arbiter: Arbiter) -> None:
        """A look takes its time where it cannot see everything at first."""
        seen, looking = asyncio.Event(), asyncio.Event()

        async def slowly() -> set[PciAddress]:
            looking.set()
            await seen.wait()
            return set()

        await arbiter.take_turn(gpu(FIRST), "nvidia", nobody)
        second = asyncio.create_task(arbiter.take_turn(gpu(SECOND), "nvidia", slowly))
        await looking.wait()
        arbiter.end_turn(FIRST)
        seen.set()
        async with asyncio.timeout(1):
            await second

    async def test_several_at_a_time_while_one_more_stays(self, arbiter: Arbiter) -> None:
        """None of them is the last then; the one that stays has to wait for all of them."""
        await arbiter.take_turn(gpu(FIRST), "nvidia", staying(SECOND, THIRD))
        await arbiter.take_turn(gpu(SECOND), "nvidia", staying(FIRST, THIRD))
        on_nvidia = {FIRST, SECOND}

        async def look() -> set[PciAddress]:
            return on_nvidia

        third = asyncio.create_task(arbiter.take_turn(gpu(THIRD), "nvidia", look))
        assert not await settled(third)
        on_nvidia.remove(FIRST)
        arbiter.end_turn(FIRST)
        assert not await settled(third)
        arbiter.end_turn(SECOND)
        await third
        assert arbiter.moving("nvidia") == (THIRD,)

    async def test_another_driver_has_its_own(self, arbiter: Arbiter) -> None:
        await arbiter.take_turn(gpu(FIRST), "nvidia", nobody)
        await arbiter.take_turn(gpu(SECOND), "amdgpu", nobody)
        arbiter.end_turn(SECOND)
        assert (arbiter.moving("nvidia"), arbiter.moving("amdgpu")) == ((FIRST,), ())

    async def test_one_who_has_none_ends_none(self, arbiter: Arbiter) -> None:
        await arbiter.take_turn(gpu(FIRST), "nvidia", nobody)
        arbiter.end_turn(SECOND)
        assert arbiter.moving("nvidia") == (FIRST,)
        arbiter.end_turn(FIRST)
        arbiter.end_turn(FIRST)

    async def test_who_stopped_waiting_does_not_get_it(self, arbiter: Arbiter) -> None:
        await arbiter.take_turn(gpu(FIRST), "nvidia", nobody)
        second = asyncio.create_task(arbiter.take_turn(gpu(SECOND), "nvidia", nobody))
        assert not await settled(second)
        second.cancel()
        await asyncio.wait([second])
        arbiter.end_turn(FIRST)
        await arbiter.take_turn(gpu(THIRD), "nvidia", nobody)
        assert arbiter.moving("nvidia") == (THIRD,)
