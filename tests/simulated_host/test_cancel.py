"""A switch is cancelled at any step: all is as before, or whoever asks is told why it is too late."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, GpuswitchError, InProgress, InvalidArgument, Wedged
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.cancelling import can_be_cancelled
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import THE_SERVICE, Requester, Result, Switch
from gpuswitch.switch.steps.holders import AwaitHolders
from gpuswitch.switch.steps.pci import Bind, Unbind
from gpuswitch.switch.steps.step import Step
from tests.harness.simulated.harness import GPUS, Harness
from tests.simulated_host.test_actor_revert import at_the_start, stay_loaded

ALICE = Requester(uid=1000, pid=42, unit="session-2.scope", command="gpuswitchctl")
BOB = Requester(uid=1001, pid=43, command="busctl")
BY_ALICE = "cancelled by gpuswitchctl (pid 42, uid 1000)"


@pytest.fixture
async def laptop(tmp_path: Path) -> Harness:
    return await Harness.of("laptop", tmp_path)


async def switched(harness: Harness, actor: Actor, target: State, index: int, status: Status) -> tuple[Switch, str]:
    """Switch, and cancel at this step; how it ended, and what the refusal said."""
    refusals: list[str] = []
    offered: list[bool] = []

    def cancel(actor: Actor, event: StepEvent) -> None:
        if (event.index, event.status) == (index, status) and actor.switch is not None:
            offered.append(can_be_cancelled(actor.state, actor.runner.engine))
            try:
                actor.cancel(actor.switch.id, ALICE)
            except InProgress as refusal:
                refusals.append(str(refusal))

    harness.witness.on_step = cancel
    switch = await harness.switch(actor, target)
    harness.witness.on_step = None
    assert offered == [not refusals]
    return switch, "".join(refusals)


@pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
@pytest.mark.parametrize(
    ("scenario", "status"), [*((name, Status.RUNNING) for name in GPUS), ("laptop", Status.DONE)], ids=str
)
async def test_at_each_step_it_leads_back_until_only_the_last_are_left(
    scenario: str, target: State, status: Status, tmp_path: Path
) -> None:
    harness, actor = await at_the_start(scenario, target, tmp_path)
    place = {State.VFIO: "on vfio-pci", State.HOST: "on the host"}[target]
    cancelled = refused = 0
    while actor.state is not target:
        steps = (await actor.plan(target)).steps
        before, restore_state, state = harness.snapshot(), harness.pages, actor.state
        index = cancelled + 1
        switch, refusal = await switched(harness, actor, target, index, status)
        if any(not step.optional for step in steps[index:]):
            assert (switch.result, switch.reason, refusal) == (Result.CANCELLED, BY_ALICE, "")
            if target is State.HOST:
                before |= {"modules": stay_loaded(before["modules"], harness.snapshot()["modules"])}
            assert (actor.state, harness.snapshot(), harness.pages) == (state, before, restore_state)
            cancelled += 1
        else:
            assert (switch.result, actor.state) == (Result.DONE, target)
            assert refusal == (
                f"cannot cancel switch {switch.id}: {actor.gpu.address} is {place} already, "
                "and only its last steps are left"
            )
            refused += 1
    assert cancelled > 3
    assert refused == 1


async def test_whoever_joined_hears_of_it_and_the_first_word_stands(laptop: Harness) -> None:
    actor = laptop.fleet.find("01:00.0")
    first = await actor.request(State.VFIO, Options(), BOB)
    joined = await actor.request(State.VFIO, Options(), ALICE)
    assert joined is first
    actor.cancel(first.id, ALICE)
    actor.cancel(first.id, BOB)
    await joined.wait()
    assert (first.result, first.reason, first.requester) == (Result.CANCELLED, BY_ALICE, BOB)
    assert actor.reason == BY_ALICE
    await laptop.witness.until(lambda: not actor.state.moving)
    await laptop.moved(actor, State.VFIO)
    assert actor.reason == ""


async def test_what_waits_for_people_is_cut_short(tmp_path: Path) -> None:
    harness = await Harness.of("laptop", tmp_path)
    actor = harness.fleet.find("01:00.0")
    harness.machine.run("blender", uid=1000)
    harness.machine.open(actor.gpu.address, "blender", "nvidia")
    before = harness.snapshot()
    switch = await actor.request(State.VFIO, Options(Busy.WAIT, 3600.0))
    await harness.witness.until_step(actor.gpu, AwaitHolders)
    now = asyncio.get_running_loop().time()
    actor.cancel(switch.id, ALICE)
    await switch.wait()
    assert asyncio.get_running_loop().time() - now < 5
    assert (switch.result, harness.snapshot()) == (Result.CANCELLED, before)


async def test_a_switch_nobody_knows_and_one_that_is_over(laptop: Harness) -> None:
    actor = laptop.fleet.find("01:00.0")
    assert refusal(actor, "5f") == (InvalidArgument, "0000:01:00.0 knows of no switch '5f'")
    switch = await laptop.switch(actor, State.VFIO)
    assert refusal(actor, switch.id) == (Failed, f"cannot cancel switch {switch.id}: it is over already (done)")
    assert actor.state is State.VFIO


def refusal(actor: Actor, id_: str) -> tuple[type[GpuswitchError], str]:
    with pytest.raises(GpuswitchError) as raised:
        actor.cancel(id_, ALICE)
    return raised.type, str(raised.value)


async def test_on_its_way_back_it_cannot_be_cancelled(laptop: Harness) -> None:
    actor = laptop.fleet.find("01:00.0")
    laptop.host.faults.add(Errno(errno.EINVAL), operation="probe", nth=1)
    before = laptop.snapshot()
    refusals = []

    def cancel(actor: Actor, event: StepEvent) -> None:
        if event.status is Status.REVERTING and actor.switch is not None:
            refusals.append(refusal(actor, actor.switch.id))

    laptop.witness.on_step = cancel
    switch = await laptop.switch(actor, State.VFIO)
    sentence = f"cannot cancel switch {switch.id}: 0000:01:00.0 is recovering, and nothing else is safe now"
    assert set(refusals) == {(InProgress, sentence)}
    assert (switch.result, laptop.snapshot()) == (Result.REVERTED, before)


async def test_a_wedged_one_cannot_be_cancelled(laptop: Harness) -> None:
    actor = laptop.fleet.find("01:00.0")
    hang = laptop.host.faults.add(Hang(), operation="unbind")
    switch = await actor.request(State.VFIO)
    await switch.wait()
    sentence = (
        "0000:01:00.0 is wedged, and nothing is written to it until the kernel returns; "
        "gpuswitchctl status 0000:01:00.0 says what may make it return"
    )
    assert refusal(actor, switch.id) == (Wedged, f"cannot cancel switch {switch.id}: {sentence}")
    hang.release()
    await laptop.witness.until(lambda: actor.state is State.HOST)
    assert refusal(actor, switch.id) == (Failed, f"cannot cancel switch {switch.id}: it is over already (wedged)")


async def test_cancelled_in_a_step_that_never_returns_it_is_wedged_and_comes_back_later(laptop: Harness) -> None:
    actor = laptop.fleet.find("01:00.0")
    before = laptop.snapshot()
    hang = laptop.host.faults.add(Hang(), operation="unbind")
    switch = await actor.request(State.VFIO)
    await laptop.witness.until_step(actor.gpu, Unbind)
    actor.cancel(switch.id, ALICE)
    await switch.wait()
    assert (switch.result, actor.state) == (Result.WEDGED, State.WEDGED)
    hang.release()
    await laptop.witness.until(lambda: actor.state is State.HOST)
    assert laptop.snapshot() == before


async def test_what_the_service_does_by_itself_says_so(laptop: Harness) -> None:
    """It died in mid-switch, and takes back what was half-way: the same switch, of the same asker."""
    actor = laptop.fleet.find("01:00.0")
    await actor.request(State.VFIO, Options(), ALICE)
    await laptop.witness.until_step(actor.gpu, Bind)
    again = await laptop.crash(actor)
    [taken_back, paid] = again.fleet.find("01:00.0").record.recent
    assert (taken_back.target, taken_back.requester, taken_back.result) == (State.VFIO, ALICE, Result.REVERTED)
    assert taken_back.reason.startswith("the service ended at step ")
    assert (paid.target, paid.requester, paid.result) == (State.HOST, THE_SERVICE, Result.DONE)


async def test_the_record_has_each_step_in_time(laptop: Harness) -> None:
    actor = laptop.fleet.find("01:00.0")
    laptop.host.faults.add(Errno(errno.EINVAL), operation="probe", nth=1)
    steps = (await actor.plan(State.VFIO)).steps
    has_a_way_back = [index for index, step in enumerate(steps, 1) if type(step).revert is not Step.revert]
    switch = await laptop.switch(actor, State.VFIO)
    [failed] = [step.index for step in switch.steps if step.status is Status.FAILED]
    assert [(step.index, step.status) for step in switch.steps] == [
        *((index, Status.DONE) for index in range(1, failed)),
        (failed, Status.FAILED),
        *((index, Status.REVERTED) for index in reversed(has_a_way_back) if index <= failed),
    ]
    assert failed < len(steps) == switch.count
    assert switch.finished is not None
    at = switch.started
    for step in switch.steps:
        assert step.started >= at - 1e-6
        at = step.started + step.seconds
    assert at <= switch.finished + 1e-6
