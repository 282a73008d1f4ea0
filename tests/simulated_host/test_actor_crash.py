"""The service dies at any instant; the next one brings the GPU home, or finds it on vfio and can."""

from __future__ import annotations

import asyncio
from dataclasses import astuple
from pathlib import Path

import pytest

from gpuswitch.api.encoders import steps_values
from gpuswitch.errors import Owned
from gpuswitch.gpu.actor import Actor
from gpuswitch.history.history import entry_of
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Requester, Returned, Switch
from gpuswitch.switch.steps.pci import Unbind
from tests.harness.simulated.harness import GPUS, Harness


async def crashed(harness: Harness, actor: Actor, target: State, index: int, status: Status) -> Harness | None:
    """Switch, and die when this is told of the step; the next service, or None where there are fewer steps."""
    killed: list[asyncio.Task[None]] = []

    def die(actor: Actor, event: StepEvent) -> None:
        if (event.index, event.status) == (index, status):
            assert actor.runner.task is not None
            actor.runner.task.cancel()
            killed.append(actor.runner.task)

    harness.witness.on_step = die
    await actor.request(target)
    assert actor.runner.task is not None
    await asyncio.wait([actor.runner.task])
    return await harness.crash(actor) if killed else None


async def check_home(harness: Harness, scenario: str, before: object) -> None:
    """At home, or on vfio with everything owed; then home."""
    actor = harness.fleet.find(GPUS[scenario])
    assert actor.state in {State.HOST, State.VFIO}
    if actor.state is State.HOST:
        assert (harness.pages, harness.snapshot()) == ([], before)
    else:
        await harness.moved(actor, State.HOST)
        assert (harness.pages, harness.snapshot()) == ([], before)


@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
@pytest.mark.parametrize(
    ("scenario", "status"), [*((name, Status.RUNNING) for name in GPUS), ("laptop", Status.DONE)], ids=str
)
async def test_a_crash_at_each_step(scenario: str, target: State, status: Status, tmp_path: Path) -> None:
    index, outcomes = 1, set()
    while True:
        harness = await Harness.of(scenario, tmp_path / str(index))
        actor = harness.fleet.find(GPUS[scenario])
        before = harness.snapshot()
        if target is State.HOST:
            await harness.moved(actor, State.VFIO)
        again = await crashed(harness, actor, target, index, status)
        if again is None:
            break
        outcomes.add(again.fleet.find(GPUS[scenario]).state)
        await check_home(again, scenario, before)
        index += 1
    assert index > 6
    assert State.HOST in outcomes


async def test_a_crash_before_the_first_step(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    before = harness.snapshot()
    await actor.request(State.VFIO)
    assert harness.pages
    again = await harness.crash(actor)
    assert (again.fleet.find("01:00.0").state, again.pages, again.snapshot()) == (State.HOST, [], before)


ASKED = Options(busy=Busy.KILL, wait_seconds=7.0, stop_units=("nvidia-persistenced.service",))
ALICE = Requester(uid=1000, pid=4711, command="gpuswitchctl", vm="win11")


async def finished_after(crash: Harness) -> Switch:
    """How the switch ended that the crash has interrupted, as whoever looks it up later sees it."""
    # What the start could not wait for, such as units, is given back by a switch of its own.
    switch = crash.fleet.find("01:00.0").record.recent[0]
    await switch.wait()
    return switch


async def test_what_was_done_before_a_crash_is_in_the_record_of_the_switch(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    begun = await actor.request(State.VFIO, ASKED, ALICE)
    await harness.witness.until_step(actor.gpu, Unbind)
    done = list(begun.steps)
    assert done
    switch = await finished_after(await harness.crash(actor))
    assert (switch.id, switch.options, switch.requester, switch.started) == (begun.id, ASKED, ALICE, begun.started)
    assert switch.steps[: len(done)] == done
    interrupted, *recovered = switch.steps[len(done) :]
    under_way = (len(done) + 1, begun.step, "unbind", Status.INTERRUPTED, begun.step_started, 0.0)
    assert astuple(interrupted) == pytest.approx(under_way)
    assert recovered
    assert Status.INTERRUPTED not in {step.status for step in recovered}
    entry = entry_of("0000:01:00.0", switch)
    assert entry.options == {"busy": "kill", "wait_seconds": 7.0, "stop_units": ["nvidia-persistenced.service"]}
    told = [step["before_restart"] for step in steps_values(entry)]
    assert told == [True] * (len(done) + 1) + [False] * len(recovered)


async def test_why_it_was_being_taken_back_is_known_after_a_crash(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    harness.host.faults.add(Errno(5), operation="probe", subject="0000:01:00.0")
    again = await crashed(harness, actor, State.VFIO, 7, Status.REVERTED)
    assert again is not None
    switch = await finished_after(again)
    assert switch.reason.startswith("cannot bind 0000:01:00.0 to vfio-pci: Input/output error\n")
    assert "\nthe service ended at step " in switch.reason


async def test_for_whom_it_waited_is_known_after_a_crash(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    harness.machine.run("game")
    harness.machine.open(actor.gpu.address, "game", "nvidia")
    await actor.request(State.VFIO, Options(wait_seconds=600.0))
    await harness.witness.until(lambda: any("game (pid " in what for what in harness.witness.waited))
    switch = await finished_after(await harness.crash(actor))
    assert ", which waited: game (pid " in switch.reason


async def test_options_of_before_a_crash_end_nobody_after_it(tmp_path: Path) -> None:
    """They were for another way than the one that brings it home."""
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    await actor.request(State.VFIO, ASKED)
    switch = await finished_after(await harness.crash(actor))
    assert (switch.options, switch.options_in_force) == (ASKED, Options())


async def test_a_crash_while_it_is_reverted(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    before = harness.snapshot()
    harness.host.faults.add(Errno(5), operation="probe", subject="0000:01:00.0")
    again = await crashed(harness, actor, State.VFIO, 7, Status.REVERTED)
    assert again is not None
    await check_home(again, "laptop", before)


async def test_a_crash_while_the_kernel_has_it(tmp_path: Path) -> None:
    """The next service does not wait for the kernel; it brings the GPU home when the kernel has returned."""
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    before = harness.snapshot()
    hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
    switch = await actor.request(State.VFIO)
    await switch.wait()
    assert actor.runner.task is not None
    actor.runner.task.cancel()
    again = await harness.again()
    successor = again.fleet.find("01:00.0")
    assert successor.state is State.WEDGED
    assert "the kernel has not returned" in successor.reason
    assert again.pages == ["0000_01_00_0.json"]
    hang.release()
    await again.witness.until(lambda: successor.state is State.HOST and not successor.bound)
    await again.may_sleep(successor)
    assert again.snapshot() == before
    assert again.pages == []
    assert successor.switch is not None
    assert successor.switch.id == switch.id
    assert (returned := successor.switch.returned) is not None
    assert returned.at
    assert (returned.what, returned.state) == (
        "the kernel returned late from 'unbind 0000:01:00.2 from xhci_hcd'",
        State.HOST,
    )
    assert "0000:01:00.0 returned: host" in again.witness.words


async def test_one_that_returned_while_the_service_was_away(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    hang = harness.host.faults.add(Hang(), operation="unbind", subject="0000:01:00.2")
    switch = await actor.request(State.VFIO)
    await switch.wait()
    assert actor.runner.task is not None
    actor.runner.task.cancel()
    await asyncio.wait([actor.runner.task])
    hang.release()
    await actor.runner._kernel.returned()
    again = await harness.again()
    successor = again.fleet.find("01:00.0")
    assert successor.state is State.HOST
    ended = successor.record.known_switch(switch.id)
    late = "the kernel returned late from 'unbind 0000:01:00.2 from xhci_hcd'"
    assert ended.returned == Returned(0.0, late, State.HOST, ended.reason)


async def test_two_gpus_come_home_together(tmp_path: Path) -> None:
    harness = await Harness.of("server", tmp_path)
    before = harness.snapshot()
    actors = [harness.fleet.find(f"{number}1:00.0") for number in (1, 2)]
    for actor in actors:
        hang = harness.host.faults.add(Hang(), operation="probe", subject=actor.gpu.address)
        await actor.request(State.VFIO)
        await hang.reached.wait()
        hang.release()
    again = await harness.crash(*actors)
    for actor in again.fleet.actors.values():
        if actor.state is State.VFIO:
            await again.moved(actor, State.HOST)
    assert (again.snapshot(), again.pages) == (before, [])


class TestAdoption:
    async def test_leaves_a_gpu_at_rest_alone(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        before = harness.snapshot()
        again = await harness.again()
        assert (again.fleet.find("01:00.0").switch, again.snapshot()) == (None, before)

    async def test_leaves_a_gpu_on_vfio_alone_and_remembers_its_home(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        before = harness.snapshot()
        await harness.moved(harness.fleet.find("01:00.0"), State.VFIO)
        harness.machine.start_vm("win11", harness.fleet.find("01:00.0").gpu.functions)
        away = harness.snapshot()
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        assert (actor.state, actor.record.host_driver, again.snapshot()) == (State.VFIO, "nvidia", away)
        again.machine.end("win11")
        await again.moved(actor, State.HOST)
        assert again.snapshot() == before

    async def test_what_somebody_else_moved_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        """No switch of ours was under way: it is said, and whoever did it may have had a reason."""
        harness = await Harness.of("laptop", tmp_path)
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.VFIO)
        await harness.host.kernel("somebody").unbind(actor.gpu.address, "vfio-pci")
        harness.machine.open_group(13, "win11")
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        assert again.pages == ["0000_01_00_0.json"]
        assert str(actor.state) == "unknown"
        assert "0000:01:00.0 is on no driver" in actor.reason
        assert "0000:01:00.0 drifted from vfio to unknown" in again.witness.words
        with pytest.raises(Owned, match=r"win11 \(pid .* has /dev/vfio/13 open"):
            await actor.request(State.HOST)
        again.machine.end("win11")
        await again.moved(actor, State.HOST)

    async def test_a_journal_that_is_damaged_is_told_and_the_hardware_believed(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        await harness.moved(harness.fleet.find("01:00.0"), State.VFIO)
        (tmp_path / "0000_01_00_0.json").write_text("{")
        again = await harness.again()
        actor = again.fleet.find("01:00.0")
        assert actor.state is State.VFIO
        await again.moved(actor, State.HOST)
        assert actor.record.host_driver == "nvidia"
