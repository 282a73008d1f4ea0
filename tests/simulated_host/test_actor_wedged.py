"""A kernel that does not return: the GPU is wedged within the deadline, all is answered, and it recovers by itself."""

from __future__ import annotations

import asyncio
import errno
import re
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, GpuswitchError, InProgress, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno, Hang, Operation
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Result, Returned
from gpuswitch.switch.steps.pci import AimOverrides, Bind, Unbind
from tests.harness.simulated.harness import Harness, is_step

OPERATIONS: tuple[Operation, ...] = (
    "capture",
    "hold_group",
    "load",
    "keep_awake",
    "set_override",
    "unbind",
    "probe",
    "release_group",
    "set_power_control",
)
DEADLINES = {"capture": 5, "hold_group": 5, "load": 30, "keep_awake": 10, "set_override": 5, "unbind": 20, "probe": 30}
DEADLINES |= {"release_group": 5, "set_power_control": 10}
NOT_USED: dict[State, set[str]] = {State.VFIO: {"hold_group", "release_group", "set_power_control"}, State.HOST: set()}


async def at_the_start(target: State, directory: Path, scenario: str = "plain") -> tuple[Harness, Actor]:
    """A GPU at rest, on the other side of `target`."""
    harness = await Harness.of(scenario, directory)
    actor = harness.fleet.find("04:00.0" if scenario == "apu" else "01:00.0")
    if target is State.HOST:
        await harness.moved(actor, State.VFIO)
    return harness, actor


async def ask(harness: Harness, actor: Actor, target: State) -> str:
    """Request a switch, and wait for its end; the sentence of why it came to nothing."""
    try:
        switch = await actor.request(target)
    except GpuswitchError as refusal:
        return str(refusal)
    await switch.wait()
    return switch.reason


async def check_wedged(harness: Harness, actor: Actor, reason: str) -> None:
    """Everything is answered, and nothing is written."""
    assert actor.state is State.WEDGED
    assert reason.startswith("the kernel has not returned from '")
    await harness.witness.until(lambda: "it recovers by itself" in actor.reason)
    assert actor.reason.startswith(f"{reason}\nnothing more is written to 0000:01:00.0 until it does\nit recovers ")
    stands = harness.snapshot()
    for target in (State.VFIO, State.HOST):
        with pytest.raises(Wedged, match=r"0000:01:00\.0"):
            await actor.request(target)
        with pytest.raises(Wedged, match=r"0000:01:00\.0"):
            await actor.plan(target)
    harness.fleet.look()
    assert (actor.state, harness.snapshot()) == (State.WEDGED, stands)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
async def test_a_hang_at_each_operation(target: State, operation: Operation, tmp_path: Path) -> None:
    harness, actor = await at_the_start(target, tmp_path)
    before, restore_state, origin = harness.snapshot(), harness.pages, actor.state
    loop = asyncio.get_running_loop()
    for nth in range(1, 100):
        harness.host.faults.clear()
        hang = harness.host.faults.add(Hang("D", "somewhere"), operation=operation, nth=nth)
        started = loop.time()
        reason = await ask(harness, actor, target)
        if not hang.reached.is_set():
            break
        # A USB-C controller may rightly take minutes.
        deadline = 200 if "from nvidia-gpu" in reason else DEADLINES[operation]
        assert loop.time() - started == deadline
        await check_wedged(harness, actor, reason)
        hang.release()
        await harness.witness.until(lambda: not actor.bound or actor.state.stable)
        # logind's lock is let go by and by
        await harness.fleet._arbiter.awake.settled(actor.gpu.address)
        if target is State.HOST:
            # Modules that were loaded for the way home stay.
            before |= {"modules": harness.snapshot()["modules"]}
        assert (actor.state, harness.snapshot(), harness.pages) == (origin, before, restore_state)
        assert loop.time() - started == deadline
    assert actor.state is target
    assert (nth > 1) is (operation not in NOT_USED[target])


async def test_the_switch_ends_as_wedged_and_stays_so(tmp_path: Path) -> None:
    harness, actor = await at_the_start(State.VFIO, tmp_path)
    hang = harness.host.faults.add(Hang("D", "snd_card_free"), operation="unbind")
    switch = await actor.request(State.VFIO)
    await switch.wait()
    assert switch.result is Result.WEDGED
    assert re.fullmatch(
        r"the kernel has not returned from 'unbind 0000:01:00\.1 from snd_hda_intel' within 20 s "
        r"\(process \d+ is in state D, waiting in snd_card_free\)",
        switch.reason,
    )
    assert switch.returned is None
    hang.release()
    await harness.witness.until(lambda: actor.state is State.RECOVERING)
    assert switch.returned is not None
    at, late = switch.returned.at, "'unbind 0000:01:00.1 from snd_hda_intel' took longer than 20 s"
    assert (switch.reason, switch.returned) == (late, Returned(at, late))
    await harness.witness.until(lambda: actor.state is State.HOST)
    assert (switch.result, actor.reason) == (Result.WEDGED, late)
    await harness.witness.until(lambda: "0000:01:00.0 returned: host" in harness.witness.words)
    assert switch.returned == Returned(at, late, State.HOST)


async def test_a_wedged_gpu_shows_the_drivers_that_it_has(tmp_path: Path) -> None:
    harness, actor = await at_the_start(State.VFIO, tmp_path)
    hang = harness.host.faults.add(Hang("D", "snd_card_free"), operation="unbind")
    await (await actor.request(State.VFIO)).wait()
    assert actor.record.facts.functions[PciAddress.parse("0000:01:00.1")].driver is None
    hang.release()
    await harness.witness.until(lambda: actor.state is State.HOST)
    assert actor.record.facts.functions[PciAddress.parse("0000:01:00.1")].driver_name == "snd_hda_intel"


async def test_a_sound_card_that_somebody_opens_at_the_last_moment(tmp_path: Path) -> None:
    """No fault: the kernel itself waits until the last user closes it, and who that is can still be told."""
    harness, actor = await at_the_start(State.VFIO, tmp_path)
    before = harness.snapshot()
    sound = PciAddress.parse("0000:01:00.1")

    def open_it(_: Actor, event: StepEvent) -> None:
        if isinstance(event.step, Unbind) and event.step.function == sound and event.status is Status.RUNNING:
            harness.machine.open(sound, "arecord")

    harness.witness.on_step = open_it
    await check_wedged(harness, actor, await ask(harness, actor, State.VFIO))
    assert re.search(r"once these let go:\narecord \(pid \d+, user root\) has /dev/snd/controlC1 open; ", actor.reason)
    harness.machine.close(sound, "arecord")
    await harness.witness.until(lambda: actor.state is State.HOST)
    assert harness.snapshot() == before


async def test_one_that_is_wedged_does_not_hold_up_another(tmp_path: Path) -> None:
    harness = await Harness.of("server", tmp_path)
    stuck, well = harness.fleet.find("11:00.0"), harness.fleet.find("21:00.0")
    hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:11:00.0")
    first, second = await stuck.request(State.VFIO), await well.request(State.VFIO)
    await second.wait()
    assert second.result is Result.DONE
    await first.wait()
    await harness.moved(well, State.HOST)
    assert stuck.state is State.WEDGED
    hang.release()
    await harness.witness.until(lambda: stuck.state is State.HOST)


class TestTheWayBackHangs:
    async def test_it_waits_and_goes_on_where_it_was(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        before = harness.snapshot()
        # the USB controller does not go to vfio-pci, and hangs on its way back to xhci_hcd
        harness.host.faults.add(Errno(errno.EIO), operation="probe", subject="0000:01:00.2")
        hang = harness.host.faults.add(Hang(), operation="probe", subject="0000:01:00.2", nth=2)
        reason = await ask(harness, actor, State.VFIO)
        await check_wedged(harness, actor, reason)
        hang.release()
        await harness.witness.until(lambda: actor.state is State.HOST)
        assert harness.snapshot() == before
        assert harness.pages == []

    async def test_twice(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        before = harness.snapshot()
        first = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        second = harness.host.faults.add(Hang(), operation="probe", subject="0000:01:00.2")
        await ask(harness, actor, State.VFIO)
        first.release()
        await second.reached.wait()
        assert str(actor.state) == "recovering"
        await harness.witness.until(lambda: actor.state is State.WEDGED)
        second.release()
        await harness.witness.until(lambda: actor.state is State.HOST)
        assert harness.snapshot() == before

    async def test_what_failed_before_is_not_forgotten(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        harness.host.faults.add(Errno(errno.EIO), operation="probe", subject="0000:01:00.3", nth=None)
        hang = harness.host.faults.add(Hang(), operation="probe", subject="0000:01:00.2", nth=2)
        await ask(harness, actor, State.VFIO)
        assert actor.state is State.WEDGED
        hang.release()
        await harness.witness.until(lambda: actor.state is State.FAILED)
        assert "the way back failed too: cannot bind 0000:01:00.3" in actor.reason
        await harness.witness.until(lambda: "0000:01:00.0 returned: failed" in harness.witness.words)
        assert actor.switch is not None
        assert actor.switch.returned is not None
        assert "the way back failed too: cannot bind 0000:01:00.3" in actor.switch.returned.reason
        assert harness.pages

    async def test_while_it_recovers_nobody_joins_the_switch_that_is_over(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        later = harness.host.faults.add(Hang(), operation="probe", subject="0000:01:00.2")
        await ask(harness, actor, State.VFIO)
        hang.release()
        await later.reached.wait()
        for target in (State.VFIO, State.HOST):
            with pytest.raises(InProgress, match=r"0000:01:00\.0 is recovering"):
                await actor.request(target)
        later.release()
        await harness.witness.until(lambda: actor.state is State.HOST)


class TestBeforeTheFirstStep:
    async def test_a_hold_that_comes_late_is_let_go(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.HOST, tmp_path, "apu")
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="hold_group", subject=11)
        with pytest.raises(Wedged):
            await actor.request(State.HOST)
        assert harness.snapshot()[10] == ("the worker of 0000:04:00.0", None)
        hang.release()
        await harness.witness.until(lambda: actor.state is State.VFIO)
        assert harness.snapshot() == before
        assert actor.reason == ""

    async def test_a_group_that_cannot_be_let_go(self, tmp_path: Path) -> None:
        """The answer does not wait for that."""
        harness, actor = await at_the_start(State.HOST, tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("in the way of the journal")
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="release_group")
        with pytest.raises(Failed, match="cannot write the journal"):
            await actor.request(State.HOST)
        assert actor.state is State.WEDGED
        hang.release()
        await harness.witness.until(lambda: actor.state is State.VFIO)
        assert harness.snapshot() == before

    async def test_debts_outlive_it(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.HOST, tmp_path)
        harness.machine.devices[actor.gpu.address].override = "somebody's"
        hang = harness.host.faults.add(Hang(), operation="capture")
        with pytest.raises(Wedged):
            await actor.request(State.HOST)
        hang.release()
        await harness.witness.until(lambda: actor.state is State.VFIO)
        assert harness.pages == ["0000_01_00_0.json"]


class TestStop:
    async def test_a_running_switch_ends_its_step_and_reverts(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        stopping = asyncio.create_task(harness.fleet.stop("the service is stopping"))
        await asyncio.wait([stopping], timeout=1)
        assert not stopping.done()
        hang.release()
        await stopping
        assert (switch.result, switch.reason) == (Result.CANCELLED, "the service is stopping")
        assert (actor.state, harness.snapshot(), harness.pages) == (State.HOST, before, [])

    async def test_a_switch_that_had_not_begun_is_cancelled(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        switch = await actor.request(State.VFIO)
        await harness.fleet.stop("the service is stopping")
        assert switch.result is Result.CANCELLED
        assert actor.state is State.HOST

    async def test_no_switch_begins_afterwards(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        await harness.fleet.stop("the service is stopping")
        before = harness.snapshot()
        with pytest.raises(Failed, match=r"cannot switch 0000:01:00\.0: the service is stopping"):
            await actor.request(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_nor_one_that_was_being_decided(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.HOST, tmp_path)
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="capture")
        asked = asyncio.create_task(actor.request(State.HOST))
        await hang.reached.wait()
        stopping = asyncio.create_task(harness.fleet.stop("the service is stopping"))
        await asyncio.wait([stopping], timeout=1)
        hang.release()
        await stopping
        with pytest.raises(Failed, match="the service is stopping"):
            await asked
        assert harness.snapshot() == before

    async def test_what_the_kernel_has_is_left_to_it(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        switch = await actor.request(State.VFIO)
        await hang.reached.wait()
        await harness.fleet.stop("the service is stopping")
        assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
        assert harness.pages == ["0000_01_00_0.json"]

    async def test_a_recovery_that_has_just_begun_is_finished(self, tmp_path: Path) -> None:
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        before = harness.snapshot()
        hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
        again = harness.host.faults.add(Hang(), operation="probe", subject="0000:01:00.2")
        await ask(harness, actor, State.VFIO)
        hang.release()
        await again.reached.wait()
        stopping = asyncio.create_task(harness.fleet.stop("the service is stopping"))
        await asyncio.wait([stopping], timeout=1)
        again.release()
        await stopping
        assert (actor.state, harness.snapshot()) == (State.HOST, before)

    async def test_a_kernel_that_returns_at_the_last_moment(self, tmp_path: Path) -> None:
        """The service is gone before it can recover; the next one does."""
        harness, actor = await at_the_start(State.VFIO, tmp_path)
        before = harness.snapshot()
        harness.host.faults.add(Delay(DEADLINES["unbind"]), operation="unbind", subject="0000:01:00.2")
        stopping: list[asyncio.Task[None]] = []

        def stop(_: Actor, event: StepEvent) -> None:
            if is_step(event.step, Unbind, function=PciAddress.parse("0000:01:00.2")) and not stopping:
                stopping.append(asyncio.create_task(harness.fleet.stop("the service is stopping")))

        harness.witness.on_step = stop
        switch = await actor.request(State.VFIO)
        await switch.wait()
        await stopping[0]
        assert (switch.result, harness.pages) == (Result.WEDGED, ["0000_01_00_0.json"])
        again = await harness.again()
        assert (again.fleet.find("01:00.0").state, again.snapshot(), again.pages) == (State.HOST, before, [])


async def test_stalled_is_what_stands_still_beyond_its_deadlines(tmp_path: Path) -> None:
    harness, actor = await at_the_start(State.VFIO, tmp_path)
    hang = harness.host.faults.add(Hang(), operation="unbind")
    await actor.request(State.VFIO)
    assert harness.fleet.stalled() == []
    await harness.witness.until(lambda: actor.state is State.WEDGED)
    # the kernel stands still, the program does not
    await asyncio.sleep(1000)
    assert harness.fleet.stalled() == []
    hang.release()
    await harness.witness.until(lambda: actor.state is State.HOST)


async def test_a_group_that_was_held_for_an_unbind_that_hung_is_let_go(tmp_path: Path) -> None:
    """On a way back: the last function cannot be bound, and the kernel is stuck with the first."""
    harness, actor = await at_the_start(State.VFIO, tmp_path)
    before = harness.snapshot()
    harness.host.faults.add(Errno(errno.EIO), operation="probe", subject=actor.gpu.address)
    hang, first = Hang("D", "somewhere"), Bind(PciAddress.parse("0000:01:00.1"), "vfio-pci")

    def arm(_: Actor, event: StepEvent) -> None:
        if event.status is Status.REVERTING and event.step == first:
            harness.host.faults.add(hang, operation="unbind")
            harness.witness.on_step = None

    harness.witness.on_step = arm
    await (await actor.request(State.VFIO)).wait()
    assert actor.state is State.WEDGED
    hang.release()
    await harness.witness.until(lambda: actor.state is State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_the_same_where_somebody_else_had_bound_it_to_vfio_pci(tmp_path: Path) -> None:
    """Between the plan and the unbind: that fails, and its way back is the one that hangs."""
    harness, actor = await at_the_start(State.VFIO, tmp_path)
    before, first = harness.snapshot(), PciAddress.parse("0000:01:00.1")
    hang = harness.host.faults.add(Hang("D", "somewhere"), operation="unbind", nth=3)

    def bind(_: Actor, event: StepEvent) -> None:
        if event.status is Status.DONE and isinstance(event.step, AimOverrides):
            work.append(asyncio.create_task(bound_to_vfio(harness, first)))
            harness.host.faults.add(Delay(1), operation="scan")  # it is done when the last look is

    work: list[asyncio.Task[None]] = []
    harness.witness.on_step = bind
    await (await actor.request(State.VFIO)).wait()
    assert actor.state is State.WEDGED
    hang.release()
    await harness.witness.until(lambda: actor.state is State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def bound_to_vfio(harness: Harness, function: PciAddress) -> None:
    """By somebody else. The override is aimed already."""
    kernel = harness.host.kernel("somebody")
    await kernel.unbind(function, "snd_hda_intel")
    await kernel.probe(function)
