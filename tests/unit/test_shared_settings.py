"""Settings that several GPUs want changed at once: who records, who gives back, and who keeps it from that."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields

import pytest

from gpuswitch.host.port import Shared
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState, SharedSetting
from gpuswitch.switch.shared.settings import SharedSettings
from tests.harness.facts import at

FIRST, SECOND, THIRD = (at(f"0000:0{n}:00.0") for n in (1, 2, 3))
SDDM, OLLAMA = Unit("sddm.service"), Unit("ollama.service")
SETTING = SharedSetting("units", SDDM)
RECORDED = RestoreState(units=(SDDM,))


class Bench:
    """Three GPUs, and one setting of the host: `value` is what it is now, True as it was before anybody came."""

    def __init__(self) -> None:
        self.restore_states: dict[PciAddress, RestoreState] = {}
        self.settings = SharedSettings(self.restore_states)
        self.value = True
        self.restored = 0

    def record(self, gpu: PciAddress) -> None:
        self.restore_states[gpu] = RECORDED

    def drop(self, gpu: PciAddress) -> None:
        self.restore_states[gpu] = NOTHING_TO_RESTORE
        self.settings.forget(gpu)

    async def changed(self, gpu: PciAddress) -> None:
        await self.settings.change(gpu, SETTING, self.change)

    async def given_back(self, gpu: PciAddress) -> bool:
        """Whether the setting is as it was, once this GPU needs it no more."""
        await self.settings.restore(gpu, SETTING, self.restore)
        return self.value

    async def change(self) -> None:
        self.value = False

    async def restore(self) -> None:
        self.value = True
        self.restored += 1

    def recording(self, gpu: PciAddress, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        async def record_first() -> None:
            self.record(gpu)
            await work()

        return record_first


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("order", list(itertools.permutations((FIRST, SECOND, THIRD))), ids=str)
async def test_the_last_one_gives_it_back(order: tuple[PciAddress, ...], bench: Bench) -> None:
    for gpu in (FIRST, SECOND, THIRD):
        bench.record(gpu)
        await bench.changed(gpu)
    assert [await bench.given_back(gpu) for gpu in order] == [False, False, True]
    assert bench.restored == 1


async def test_the_second_one_records_what_the_first_one_found(bench: Bench) -> None:
    """Until none has it to restore any more: on its way home, too, the first one knows."""
    assert bench.settings.recorded(SETTING) is None
    bench.record(FIRST)
    await bench.changed(FIRST)
    assert bench.settings.recorded(SETTING) == RECORDED
    assert bench.settings.recorded(SharedSetting("units", OLLAMA)) is None
    assert bench.settings.recorded_by(SETTING) == (FIRST,)
    assert [bench.settings.has(gpu, SETTING) for gpu in (FIRST, SECOND)] == [True, False]
    await bench.given_back(FIRST)
    assert bench.settings.recorded(SETTING) == RECORDED
    bench.drop(FIRST)
    assert bench.settings.recorded(SETTING) is None


async def test_what_is_recorded_while_it_is_changed_counts(bench: Bench) -> None:
    for gpu in (FIRST, SECOND):
        await bench.settings.change(gpu, SETTING, bench.recording(gpu, bench.change))
    assert [await bench.given_back(gpu) for gpu in (FIRST, SECOND)] == [False, True]


async def test_also_where_the_change_fails_then(bench: Bench) -> None:
    """Nobody knows what became of it: it is this GPU's until that gives it back."""

    async def half_done() -> None:
        bench.value = False
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await bench.settings.change(FIRST, SETTING, bench.recording(FIRST, half_done))
    bench.record(SECOND)
    await bench.changed(SECOND)
    assert [await bench.given_back(gpu) for gpu in (SECOND, FIRST)] == [False, True]


async def test_who_has_not_recorded_it_is_in_nobodys_way(bench: Bench) -> None:
    bench.record(FIRST)
    for gpu in (FIRST, SECOND):
        await bench.changed(gpu)
    assert await bench.given_back(FIRST)


async def test_a_restore_state_alone_is_in_nobodys_way(bench: Bench) -> None:
    """It is there before the first step, and until the whole way home is over."""
    bench.record(SECOND)
    bench.record(FIRST)
    await bench.changed(FIRST)
    assert await bench.given_back(FIRST)


async def test_what_is_forgotten_is_not_needed(bench: Bench) -> None:
    for gpu in (FIRST, SECOND):
        bench.record(gpu)
        await bench.changed(gpu)
    bench.drop(FIRST)
    assert await bench.given_back(SECOND)


async def test_what_is_forgotten_but_for_this_is_needed(bench: Bench) -> None:
    for gpu in (FIRST, SECOND):
        bench.record(gpu)
        await bench.changed(gpu)
    bench.restore_states[FIRST] = RestoreState(units=(OLLAMA, SDDM))
    bench.settings.forget(FIRST)
    assert not await bench.given_back(SECOND)


async def test_what_an_earlier_run_changed_counts(bench: Bench) -> None:
    bench.record(FIRST)
    bench.settings.claim(FIRST)
    bench.record(SECOND)
    await bench.changed(SECOND)
    assert [await bench.given_back(gpu) for gpu in (SECOND, FIRST)] == [False, True]


async def test_one_at_a_time(bench: Bench) -> None:
    """What is being changed is not given back meanwhile, and then it is another one's."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        begun.set()
        await go_on.wait()
        await bench.change()

    bench.record(FIRST)
    await bench.changed(FIRST)
    changing = asyncio.create_task(bench.settings.change(SECOND, SETTING, bench.recording(SECOND, slowly)))
    await begun.wait()
    giving_back = asyncio.create_task(bench.given_back(FIRST))
    await asyncio.wait([giving_back], timeout=0.001)
    assert bench.restored == 0
    go_on.set()
    await changing
    assert not await giving_back
    assert await bench.given_back(SECOND)


async def test_what_could_not_be_given_back_is_tried_again(bench: Bench) -> None:
    async def refused() -> None:
        raise RuntimeError

    bench.record(FIRST)
    await bench.changed(FIRST)
    with pytest.raises(RuntimeError):
        await bench.settings.restore(FIRST, SETTING, refused)
    assert await bench.given_back(FIRST)


def test_a_kind_that_no_restore_state_has() -> None:
    with pytest.raises(TypeError, match=r"'unit' is no kind of shared setting: declare it in gpuswitch\.host\.port"):
        SharedSetting("unit", SDDM)
    assert str(SETTING) == "sddm.service (units)"


def test_each_kind_is_a_tuple_or_a_mapping_and_empty_at_first() -> None:
    nothing = Shared()
    for kind in fields(Shared):
        value = getattr(nothing, kind.name)
        assert isinstance(value, tuple | Mapping)
        assert not value
        assert kind.name in {each.name for each in fields(RestoreState)}
