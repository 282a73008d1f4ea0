"""An attribute of the bridge above two GPUs: changed by the first that leaves, given back by the last that is home.

The step is the worked example in `tests/harness/bridge_power.py`; who adds one of this kind copies these tests.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.gpu.actor import Actor
from gpuswitch.host.port import AttributeChange
from gpuswitch.host.simulated.catalogue import DISPLAY_3D, NVIDIA, PCI_BRIDGE, PLX, Slot, port
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.faults import Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Result
from gpuswitch.switch.steps.attributes import ChangeAttribute, RestoreAttribute
from tests.harness.bridge_power import AT_HOME, D3COLD, WHILE_AWAY, bridges_stay_powered
from tests.harness.simulated.harness import GENTLE, Harness, config

ROOT, BRIDGE = PciAddress.parse("0000:00:01.0"), PciAddress.parse("0000:0e:00.0")
ATTRIBUTE = FunctionAttribute(BRIDGE, D3COLD)
FIRST, SECOND = "11:00.0", "21:00.0"
MOST_STEPS = 15
"""Of a way, with the one of the example."""
ORDERS = list(itertools.permutations((FIRST, SECOND)))


@pytest.fixture(autouse=True)
def _step() -> Iterator[None]:
    with bridges_stay_powered():
        yield


async def two_below_a_bridge(directory: Path, *others: Device) -> Harness:
    """Two cards of nvidia, each below a port of its own of the same PCIe switch, and what else is on the machine."""
    devices = [*others, port(str(ROOT), 1), Slot(str(BRIDGE)[:-2], 2, str(ROOT)).function(0, PLX, 0x8747, PCI_BRIDGE)]
    for number in (1, 2):
        below = f"0000:0f:0{number}"
        devices += [
            Slot(below, 10 + number, str(BRIDGE)).function(0, PLX, 0x8747, PCI_BRIDGE),
            Slot(f"0000:{number}1:00", 20 + number, f"{below}.0").function(0, NVIDIA, 0x20F1, DISPLAY_3D),
        ]
    return await Harness.start(boot(devices), directory, config("", **GENTLE))


def says(harness: Harness) -> str:
    """What the attribute of the bridge is."""
    return harness.machine.devices[BRIDGE].settings[D3COLD]


def both(harness: Harness) -> tuple[Actor, Actor]:
    return harness.fleet.find(FIRST), harness.fleet.find(SECOND)


@pytest.mark.parametrize("out", ORDERS, ids=" ".join)
@pytest.mark.parametrize("home", ORDERS, ids=" ".join)
async def test_there_and_back_in_every_order(out: tuple[str, ...], home: tuple[str, ...], tmp_path: Path) -> None:
    harness = await two_below_a_bridge(tmp_path)
    before, said = harness.snapshot(), []
    for numbers, target in ((out, State.VFIO), (home, State.HOST)):
        for number in numbers:
            await harness.moved(harness.fleet.find(number), target)
            said.append(says(harness))
    assert said == [WHILE_AWAY, WHILE_AWAY, WHILE_AWAY, AT_HOME]
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_at_the_same_time(tmp_path: Path) -> None:
    harness = await two_below_a_bridge(tmp_path)
    before = harness.snapshot()
    for target, then in ((State.VFIO, WHILE_AWAY), (State.HOST, AT_HOME)):
        switches = await asyncio.gather(*(harness.switch(actor, target) for actor in both(harness)))
        assert [switch.result for switch in switches] == [Result.DONE] * 2
        assert says(harness) == then
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_what_it_said_before_comes_back_whatever_that_was(tmp_path: Path) -> None:
    harness = await two_below_a_bridge(tmp_path)
    harness.machine.devices[BRIDGE].settings[D3COLD] = WHILE_AWAY
    for target in (State.VFIO, State.HOST):
        for actor in both(harness):
            await harness.moved(actor, target)
            assert says(harness) == WHILE_AWAY
    assert harness.pages == []


async def test_a_bridge_without_the_attribute_is_left_alone(tmp_path: Path) -> None:
    harness = await two_below_a_bridge(tmp_path)
    del harness.machine.devices[BRIDGE].settings[D3COLD]
    before = harness.snapshot()
    first, _ = both(harness)
    await harness.moved(first, State.VFIO)
    assert ATTRIBUTE not in first.record.restore_state.attributes
    await harness.moved(first, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_a_bridge_that_nobody_can_see_is_left_alone(tmp_path: Path) -> None:
    harness = await two_below_a_bridge(tmp_path)
    del harness.machine.devices[BRIDGE]
    before = harness.snapshot()
    first, _ = both(harness)
    for target in (State.VFIO, State.HOST):
        await harness.moved(first, target)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_one_comes_home_between_the_plan_of_the_other_and_its_step(tmp_path: Path) -> None:
    """What the other one finds then is what was there at first, and it is that what comes back."""
    # Where one stays on the driver, the two need not wait for each other.
    harness = await two_below_a_bridge(tmp_path, Slot("0000:31:00", 3).function(0, NVIDIA, 0x20F1, DISPLAY_3D))
    before = harness.snapshot()
    first, second = both(harness)
    await harness.moved(first, State.VFIO)
    hang = harness.host.faults.add(Hang(), operation="keep_awake", subject=second.gpu.address)
    leaving = asyncio.create_task(harness.switch(second, State.VFIO))
    await hang.reached.wait()
    await harness.moved(first, State.HOST)
    assert says(harness) == AT_HOME
    hang.release()
    await leaving
    assert (second.state, says(harness)) == (State.VFIO, WHILE_AWAY)
    await harness.moved(second, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])


class TestItFails:
    @pytest.mark.parametrize("fault", [Errno(errno.EIO), Silent()], ids=["errno", "silent"])
    async def test_the_write(self, fault: Errno | Silent, tmp_path: Path) -> None:
        """Nothing is changed, and the sentence names what it was about."""
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, _ = both(harness)
        harness.host.faults.add(fault, operation="set_attribute", subject=BRIDGE)
        switch = await harness.switch(first, State.VFIO)
        assert switch.result is Result.REVERTED
        assert f"{D3COLD} of {BRIDGE}" in switch.reason
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_a_page_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What could not be recorded is not changed."""
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, _ = both(harness)

        replace_page, full = DirectoryStore.replace, list[str]()

        def replaced(store: DirectoryStore, name: str, content: bytes) -> None:
            if D3COLD.encode() in content:
                full.append(name)
                raise OSError(errno.ENOSPC, "No space left on device")
            replace_page(store, name, content)

        monkeypatch.setattr(DirectoryStore, "replace", replaced)
        switch = await harness.switch(first, State.VFIO)
        assert (switch.result, first.state) == (Result.REVERTED, State.HOST)
        assert "No space left on device" in switch.reason
        assert (bool(full), harness.snapshot(), harness.pages) == (True, before, [])

    @pytest.mark.parametrize("other_away", [False, True], ids=["alone", "the other is away"])
    async def test_a_later_step(self, other_away: bool, tmp_path: Path) -> None:
        """It is given back where nobody else needs it."""
        harness = await two_below_a_bridge(tmp_path)
        first, second = both(harness)
        if other_away:
            await harness.moved(first, State.VFIO)
        harness.host.faults.add(Errno(errno.EIO), operation="set_override", subject=second.gpu.address)
        switch = await harness.switch(second, State.VFIO)
        assert (switch.result, second.state) == (Result.REVERTED, State.HOST)
        assert says(harness) == (WHILE_AWAY if other_away else AT_HOME)
        if other_away:
            await harness.moved(first, State.HOST)
        assert (says(harness), harness.pages) == (AT_HOME, [])

    async def test_a_step_of_the_way_home_after_it(self, tmp_path: Path) -> None:
        """It stays away, and so does its need."""
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, _ = both(harness)
        await harness.moved(first, State.VFIO)
        harness.host.faults.add(Errno(errno.EIO), operation="set_power_control", subject=first.gpu.address)
        switch = await harness.switch(first, State.HOST)
        assert (switch.result, first.state, says(harness)) == (Result.REVERTED, State.VFIO, WHILE_AWAY)
        await harness.moved(first, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_to_give_it_back(self, tmp_path: Path) -> None:
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, _ = both(harness)
        await harness.moved(first, State.VFIO)
        harness.host.faults.add(Errno(errno.EIO), operation="set_attribute", subject=BRIDGE)
        switch = await harness.switch(first, State.HOST)
        assert (switch.result, first.state, says(harness)) == (Result.REVERTED, State.VFIO, WHILE_AWAY)
        await harness.moved(first, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_it_hangs(self, tmp_path: Path) -> None:
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, second = both(harness)
        hang = harness.host.faults.add(Hang(), operation="set_attribute", subject=BRIDGE)
        switch = await harness.switch(first, State.VFIO)
        assert (switch.result, first.state) == (Result.WEDGED, State.WEDGED)
        assert f"set {D3COLD} of {BRIDGE} to '{WHILE_AWAY}'" in switch.reason
        await harness.moved(second, State.VFIO)
        hang.release()
        await harness.witness.until(lambda: first.state is State.HOST)
        assert says(harness) == WHILE_AWAY
        await harness.moved(second, State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_another_gpu_needs_another_value(self, tmp_path: Path) -> None:
        harness = await two_below_a_bridge(tmp_path)
        first, second = both(harness)
        await harness.moved(first, State.VFIO)
        entry = first.record.page.entry
        other = replace(entry.restore_state, attributes={ATTRIBUTE: AttributeChange(AT_HOME, "2")})
        first.record.page.write(replace(entry, restore_state=other))
        switch = await harness.switch(second, State.VFIO)
        assert switch.result is Result.REVERTED
        assert switch.reason == (
            f"{D3COLD} of {BRIDGE} is to be '0', and is kept at '2' for 0000:{FIRST}: bring that to the host first"
        )


class TestTheServiceEnds:
    async def test_while_both_are_away(self, tmp_path: Path) -> None:
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        for actor in both(harness):
            await harness.moved(actor, State.VFIO)
        again = await harness.again()
        first, second = both(again)
        await again.moved(first, State.HOST)
        assert says(again) == WHILE_AWAY
        await again.moved(second, State.HOST)
        assert (again.snapshot(), again.pages) == (before, [])

    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    @pytest.mark.parametrize("index", range(1, MOST_STEPS + 1))
    async def test_at_each_step(self, index: int, target: State, tmp_path: Path) -> None:
        """With the other one away all the while, and then without."""
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, second = both(harness)
        await harness.moved(second, State.VFIO)
        if target is State.HOST:
            await harness.moved(first, State.VFIO)
        reached, counts = asyncio.Event(), set[int]()

        def on_step(_: object, event: StepEvent) -> None:
            counts.add(event.count)
            if event.index == index:
                reached.set()

        harness.witness.on_step = on_step
        switch = await first.request(target)
        over = asyncio.create_task(switch.wait())
        await asyncio.wait([over, waiting := asyncio.create_task(reached.wait())], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert max(counts) <= MOST_STEPS  # else there are some at which nobody looks
        again = await harness.crash(first)
        over.cancel()
        first, second = both(again)
        assert says(again) == WHILE_AWAY
        if first.state is not State.HOST:
            await again.moved(first, State.HOST)
        assert says(again) == WHILE_AWAY
        await again.moved(second, State.HOST)
        assert (again.snapshot(), again.pages) == (before, [])

    @pytest.mark.parametrize("kind", [ChangeAttribute, RestoreAttribute])
    @pytest.mark.parametrize("operation", ["attribute", "set_attribute"])
    async def test_in_the_middle_of_the_step(self, operation: str, kind: type, tmp_path: Path) -> None:
        """Before it is known what was there; after it was recorded, and before the write has returned."""
        harness = await two_below_a_bridge(tmp_path)
        before = harness.snapshot()
        first, _ = both(harness)
        target = State.VFIO if kind is ChangeAttribute else State.HOST
        if target is State.HOST:
            await harness.moved(first, State.VFIO)
        hang = harness.host.faults.add(Hang(), operation=operation, subject=BRIDGE)
        switch = await first.request(target)
        await hang.reached.wait()
        assert switch.result is None
        hang.release()
        again = await harness.crash(first)
        first, _ = both(again)
        if first.state is not State.HOST:
            await again.moved(first, State.HOST)
        assert (again.snapshot(), again.pages) == (before, [])


class TestACardIsPulled:
    async def of_two(self, directory: Path) -> Harness:
        harness = await two_below_a_bridge(directory)
        for actor in both(harness):
            await harness.moved(actor, State.VFIO)
        return harness

    async def gone(self, harness: Harness, actor: Actor) -> None:
        """It has left, and what it shared is given back, where nobody else needs it."""
        await harness.witness.until(lambda: actor.state is State.ABSENT)
        await harness.fleet._restoring[actor.gpu.address]

    async def test_the_other_one_needs_it_still(self, tmp_path: Path) -> None:
        harness = await self.of_two(tmp_path)
        first, second = both(harness)
        await harness.machine.unplug("0000:11:00")
        await self.gone(harness, first)
        assert (says(harness), harness.pages) == (WHILE_AWAY, ["0000_21_00_0.json"])
        await harness.moved(second, State.HOST)
        assert (says(harness), harness.pages) == (AT_HOME, [])

    async def test_it_was_the_last_one(self, tmp_path: Path) -> None:
        harness = await self.of_two(tmp_path)
        first, second = both(harness)
        await harness.moved(second, State.HOST)
        await harness.machine.unplug("0000:11:00")
        await self.gone(harness, first)
        assert (says(harness), harness.pages) == (AT_HOME, [])

    async def test_while_the_service_does_not_run(self, tmp_path: Path) -> None:
        harness = await self.of_two(tmp_path)
        _, second = both(harness)
        await harness.moved(second, State.HOST)
        await harness.host.close()
        await harness.machine.unplug("0000:11:00")
        again = await Harness.start(SimulatedHost(harness.machine), harness.directory, harness.fleet.config)
        assert (says(again), again.pages) == (AT_HOME, [])

    async def test_its_bridge_goes_with_it(self, tmp_path: Path) -> None:
        harness = await self.of_two(tmp_path)
        _, second = both(harness)
        await harness.moved(second, State.HOST)
        first, _ = both(harness)
        del harness.machine.devices[BRIDGE]
        await harness.machine.unplug("0000:11:00")
        await self.gone(harness, first)
        assert harness.pages == []


async def test_of_what_is_asked_a_person_reads_what_is_done(tmp_path: Path) -> None:
    harness = await two_below_a_bridge(tmp_path)
    first, _ = both(harness)
    plan = await first.plan(State.VFIO)
    assert f"set {D3COLD} of {BRIDGE} to {WHILE_AWAY}" in [step.title for step in plan.steps]
    await harness.moved(first, State.VFIO)
    plan = await first.plan(State.HOST)
    assert f"restore {D3COLD} of {BRIDGE}" in [step.title for step in plan.steps]
