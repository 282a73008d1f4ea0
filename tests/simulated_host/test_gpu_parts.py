"""The parts of a GPU, each without those above it."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, InProgress, Owned
from gpuswitch.gpu.admission import Admission
from gpuswitch.gpu.gpu_record import GpuObserver, GpuRecord, Outcome
from gpuswitch.gpu.planner import Planner
from gpuswitch.gpu.recovery import Recovery
from gpuswitch.gpu.runner import Runner
from gpuswitch.gpu.stall import Stall
from gpuswitch.gpu.strategies import RecoveryStrategy
from gpuswitch.gpu.turns import Turns
from gpuswitch.host.port import Pending
from gpuswitch.host.simulated.faults import Errno, Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.gpu import Gpu, discover
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Engine, StepEvent, StuckError
from gpuswitch.switch.journal.journal import Journal
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Drift, Result, Switch
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE
from gpuswitch.switch.shared.arbiter import Arbiter
from tests.harness.simulated.harness import config

GPU = PciAddress.parse("0000:01:00.0")
SCREEN = PciAddress.parse("0000:00:02.0")
VM = Owner("win11", "11111111-1111-1111-1111-111111111111")


@dataclass
class Heard(GpuObserver):
    words: list[str] = field(default_factory=list)
    changed_once: asyncio.Event = field(default_factory=asyncio.Event)

    def changed(self, record: GpuRecord) -> None:
        self.changed_once.set()
        self.words.append(str(record.state))

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        assert switch is record.switch
        self.words.append(str(event.status))

    def waits(self, record: GpuRecord) -> None:
        assert record.switch is not None

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        assert switch is record.switch
        self.words.append(str(switch.result))

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        assert switch.returned is not None
        self.words.append(f"returned: {record.state}")

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        """A record takes in what others did, and whoever had it look says so."""
        raise AssertionError((record.gpu, drift))

    def recovered(self, record: GpuRecord) -> None:
        assert not record.state.moving
        self.words.append(f"recovered: {record.state}")


class Parts:
    """The record of one GPU of the scenario `plain`, with what it was made of."""

    def __init__(self, directory: Path) -> None:
        self.host: SimulatedHost = plain()
        self.arbiter = Arbiter(self.host.systemd)
        self.heard = Heard()
        self.journal = Journal(DirectoryStore(directory))
        self.record = self.new_record()

    def new_record(self) -> GpuRecord:
        """As a service that starts on this journal has it."""
        facts = self.host.look()
        gpu = next(each for each in discover(facts, {}) if each.address == GPU)
        return GpuRecord(
            gpu,
            facts,
            host=self.host,
            config=config(),
            journal=self.journal,
            arbiter=self.arbiter,
            observer=self.heard,
        )

    def runner(self) -> Runner:
        return Runner(self.record, host=self.host, arbiter=self.arbiter, observer=self.heard, rested=lambda: None)

    def planner(self) -> Planner:
        return Planner(self.record, self.host, self.arbiter)

    async def start(self, runner: Runner) -> Switch:
        """A switch to vfio, after whose failure nobody does anything but take it back."""
        preparation = self.planner().preparation(self.record.state, Options())
        plan = await self.planner().plan(preparation, State.VFIO)

        async def taken_back(engine: Engine, _: Switch, outcome: Outcome) -> Outcome:
            assert await runner.go_back(engine) is None
            return outcome

        switch = Switch(State.VFIO, len(plan.steps))
        runner.start(switch, plan, preparation, taken_back)
        return switch


@pytest.fixture
async def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


class TestRecord:
    async def test_says_whose_it_is_and_keeps_that(self, parts: Parts) -> None:
        parts.record.own(VM)
        assert (parts.record.owner, parts.heard.words) == (VM, ["host"])
        assert parts.journal.load(GPU).owner == VM
        assert parts.new_record().owner is None, "at home, and nobody waits for it"
        assert parts.journal.load(GPU).owner is None

    async def test_what_others_did_is_a_drift_and_no_reason_to_tell(self, parts: Parts) -> None:
        gpu, facts = parts.record.gpu, parts.host.look()
        gone = {a: f for a, f in facts.functions.items() if a not in gpu.functions}
        drift = parts.record.take_in(replace(facts, functions=gone), gpu)
        assert drift is not None
        assert (drift.before, drift.after, parts.record.state) == (State.HOST, State.ABSENT, State.ABSENT)
        assert parts.heard.words == []


class TestAdmission:
    async def test_who_waits_for_it_is_not_left_without(self, parts: Parts) -> None:
        parts.record.own(VM)
        parts.record.awaited = True
        Admission(parts.record).refuse_owned(State.VFIO)
        with pytest.raises(Owned, match="about to open it"):
            Admission(parts.record).refuse_owned(State.HOST)

    async def test_joins_what_does_all_that_is_asked_for(self, parts: Parts) -> None:
        running = Switch(State.VFIO, 3)
        assert Admission(parts.record).join(running, Options()) is running
        with pytest.raises(InProgress, match="and not with"):
            Admission(parts.record).join(running, Options(stop_units=("sddm.service",)))

    async def test_at_home_there_is_nothing_to_do_unless_something_is_owed(self, parts: Parts) -> None:
        admission = Admission(parts.record)
        assert (admission.is_at(State.HOST), admission.is_at(State.VFIO)) == (True, False)
        parts.record.record_restore(replace(parts.record.restore_state, modules=("nvidia_drm",)))
        assert not admission.is_at(State.HOST)


async def test_a_turn_is_had_once_nobody_of_the_group_is_moved(parts: Parts) -> None:
    """Who shares it is moved first, and somebody who waits is told."""
    group = parts.record.gpu.groups(parts.record.facts)
    other = Gpu(SCREEN, (SCREEN,))
    await parts.arbiter.take_groups(other, group)
    turns = Turns(parts.record, parts.host, parts.arbiter)
    with pytest.raises(InProgress, match="they share an IOMMU group"):
        await turns.take(10.0)
    parts.arbiter.end_turn(other.address)
    await turns.take(10.0)
    assert parts.arbiter.in_groups(group, besides=other.address) == (parts.record.gpu.address,)
    turns.end()
    assert parts.arbiter.in_groups(group, besides=other.address) == ()


async def test_a_stall_is_told_at_once_and_explained_when_the_holders_are_known(parts: Parts) -> None:
    record, kernel = parts.record, parts.host.kernel(str(parts.record.gpu.address))
    record.fire("detach")
    stall = Stall(record, parts.host, kernel)
    stall.begin(StuckError(Pending("unbind"), 10.0), ())
    assert (record.state, parts.heard.words) == (State.WEDGED, [])
    first = record.reason
    await parts.heard.changed_once.wait()
    assert record.reason.startswith(f"{first}\n")
    assert parts.heard.words == ["wedged"]
    await stall.until_returned()


class TestRunner:
    async def test_a_switch_ends_at_rest(self, parts: Parts) -> None:
        runner = parts.runner()
        switch = await parts.start(runner)
        assert (runner.busy, parts.record.state) == (True, State.DETACHING)
        await switch.wait()
        assert (switch.result, parts.record.state, runner.busy) == (Result.DONE, State.VFIO, False)
        assert parts.heard.words[0] == "detaching"
        assert parts.heard.words[-2:] == ["done", "vfio"]

    async def test_who_starts_it_says_what_follows_a_failure(self, parts: Parts) -> None:
        parts.host.machine.faults.add(Errno(errno.EIO), operation="unbind")
        switch = await parts.start(parts.runner())
        await switch.wait()
        assert (switch.result, parts.record.state, parts.record.restore_state) == (
            Result.REVERTED,
            State.HOST,
            NOTHING_TO_RESTORE,
        )
        assert "reverted" in parts.heard.words[:-2], "its steps were"

    async def test_waits_for_a_kernel_that_hangs(self, parts: Parts) -> None:
        hang = Hang()
        parts.host.machine.faults.add(hang, operation="unbind")
        runner = parts.runner()
        switch = await parts.start(runner)
        await switch.wait()
        assert (switch.result, parts.record.state) == (Result.WEDGED, State.WEDGED)
        assert runner.busy
        await runner.rest()
        hang.release()
        await runner.unwedged()
        await runner.rest()
        assert (parts.record.state, runner.busy) == (State.HOST, False)


class TestRecovery:
    async def test_one_strategy_after_the_other_until_one_leads_somewhere(self, parts: Parts) -> None:
        """The first one is refused, and that is the story."""
        parts.record.fire("seen_mixed")
        switch = Switch(State.VFIO, 0, recovery=True)

        def never(*_: object) -> tuple[()]:
            raise Failed("not this way")

        strategies = (
            RecoveryStrategy("cannot get it there: {failure}", State.HOST, never),
            RecoveryStrategy("cannot get it on vfio: {failure}", State.VFIO),
        )
        runner = parts.runner()
        recovery = Recovery(parts.record, runner, parts.planner(), parts.host)
        runner.set_out(switch, "recover")
        outcome = await recovery.run_recovery(switch, strategies, "because")
        assert (outcome.result, outcome.reason) == (Result.DONE, "because\ncannot get it there: not this way")
        assert outcome.reached is not None
        assert outcome.reached.target is State.VFIO
