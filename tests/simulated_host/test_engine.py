"""The engine: which steps run, fail and are taken back, in which order, under which deadline."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pytest

from gpuswitch.errors import Failed, KernelError
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import laptop
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.engine import Engine, Status, StepEvent, StoppedError, StuckError
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.steps.step import Step, StepContext, StepError

GPU = PciAddress.parse("0000:01:00.0")
DEADLINE = 10.0
NO_KINDS: Mapping[str, type[Scripted]] = {}
_SHORT = {Status.RUNNING: "do", Status.DONE: "ok", Status.FAILED: "fail"}


@dataclass(frozen=True)
class Scripted(Step):
    """A step that does as it is told: `faults` are words such as `apply:error`, `revert:hang`."""

    name: str
    faults: frozenset[str]
    kind = "probe"

    @property
    def title(self) -> str:
        return self.name

    async def apply(self, context: StepContext) -> None:
        await self._act("apply", context)

    async def verify(self, context: StepContext) -> None:
        await self._act("verify", context)

    async def revert(self, context: StepContext) -> None:
        await self._act("revert", context)

    async def _act(self, part: str, context: StepContext) -> None:
        if f"{part}:error" in self.faults:
            raise StepError(f"{part} of {self.name} found it wrong")
        if f"{part}:kernel" in self.faults:
            raise KernelError(part, self.name, errno.EBUSY, "Device or resource busy")
        if f"{part}:bug" in self.faults:
            raise ZeroDivisionError("by nothing")
        if f"{part}:waits" in self.faults:
            await context.until(lambda _: f"{self.name} is not there")
        if f"{part}:sleeps" in self.faults:
            await asyncio.sleep(DEADLINE * 2)
        if f"{part}:hang" in self.faults:
            await context.kernel.probe(GPU)


class Forgoable(Scripted):
    """The switch can do without it."""

    optional = True


class Patient(Scripted):
    """It waits for people, and has its own idea of how long."""

    interruptible = True

    def deadline(self, deadlines: Mapping[str, float]) -> float:
        return deadlines[self.kind] + 100


class Stays(Scripted):
    """Nothing of it is taken back."""

    revert = Step.revert


class EngineHarness:
    """An engine with scripted steps, and what it reports. `kinds`: of which class they are, where not `Scripted`."""

    def __init__(
        self, script: str, *, steps: int = 3, begun: bool = False, kinds: Mapping[str, type[Scripted]] = NO_KINDS
    ) -> None:
        self.host: SimulatedHost = laptop()
        self.restore_state: list[RestoreState] = []
        self.intended: list[str] = []
        self.full_at = ""
        arbiter = Arbiter(self.host.systemd)
        kernel, deadlines = self.host.kernel(str(GPU)), {"probe": DEADLINE}
        self.context = StepContext(GPU, self.host, kernel, arbiter, self.restore_state.append, deadlines=deadlines)
        self.events: list[StepEvent] = []
        words = [word.split("-") for word in script.split()]
        names = [f"s{n}" for n in range(1, steps + 1)]
        scripted = tuple(
            kinds.get(name, Scripted)(name, frozenset(fault for step, fault in words if step == name)) for name in names
        )
        self.engine = Engine(self.context, scripted, self._hear, self._intend, begun=begun)
        self.stop_at = ("", Status.DONE)

    def _intend(self, event: StepEvent) -> None:
        word = f"{event.step.title}:{_SHORT.get(event.status, event.status)}"
        if word == self.full_at:
            raise Failed("the disk is full")
        self.intended.append(word)

    def _hear(self, event: StepEvent) -> None:
        self.events.append(event)
        if (event.step.title, event.status) == self.stop_at:
            self.engine.stop("enough")

    @property
    def heard(self) -> str:
        return " ".join(f"{e.step.title}:{_SHORT.get(e.status, e.status)}" for e in self.events)

    async def run(self) -> tuple[str, str]:
        """Forward, and back where that failed: the sentences of both, empty for a way that succeeded."""
        try:
            await self.engine.forward()
        except StepError as failure:
            try:
                await self.engine.back()
            except StepError as worse:
                return str(failure), str(worse)
            return str(failure), ""
        return "", ""


S1, S2 = "s1:reverting s1:reverted", "s2:reverting s2:reverted"
FORWARD_2_FAILS = "s1:do s1:ok s2:do s2:fail"
FORWARD_2_CANCELLED = "s1:do s1:ok s2:do s2:cancelled"
SEQUENCES: Iterable[tuple[str, str, str, str]] = [
    # what goes wrong, what is heard, the sentence of the failure, the sentence of a failed way back
    ("", "s1:do s1:ok s2:do s2:ok s3:do s3:ok", "", ""),
    ("s1-apply:error", f"s1:do s1:fail {S1}", "apply of s1 found it wrong", ""),
    ("s2-apply:error", f"{FORWARD_2_FAILS} {S2} {S1}", "apply of s2 found it wrong", ""),
    ("s2-verify:error", f"{FORWARD_2_FAILS} {S2} {S1}", "verify of s2 found it wrong", ""),
    (
        "s3-apply:error",
        f"s1:do s1:ok s2:do s2:ok s3:do s3:fail s3:reverting s3:reverted {S2} {S1}",
        "apply of s3 found it wrong",
        "",
    ),
    ("s2-apply:kernel", f"{FORWARD_2_FAILS} {S2} {S1}", "cannot apply s2: Device or resource busy", ""),
    (
        "s2-apply:bug",
        f"{FORWARD_2_FAILS} {S2} {S1}",
        "a fault of gpuswitch itself: ZeroDivisionError('by nothing')",
        "",
    ),
    ("s2-verify:waits", f"{FORWARD_2_FAILS} {S2} {S1}", "s2 is not there after 10 s", ""),
    ("s2-apply:sleeps", f"{FORWARD_2_FAILS} {S2} {S1}", "'s2' is not done after 10 s", ""),
    (
        "s2-apply:error s2-revert:error",
        f"{FORWARD_2_FAILS} s2:reverting s2:revert-failed {S1}",
        "apply of s2 found it wrong",
        "revert of s2 found it wrong",
    ),
    (
        "s2-apply:error s2-revert:bug s1-revert:kernel",
        f"{FORWARD_2_FAILS} s2:reverting s2:revert-failed s1:reverting s1:revert-failed",
        "apply of s2 found it wrong",
        "a fault of gpuswitch itself: ZeroDivisionError('by nothing'); cannot revert s1: Device or resource busy",
    ),
    (
        "s2-verify:waits s2-revert:sleeps",
        f"{FORWARD_2_FAILS} s2:reverting s2:revert-failed {S1}",
        "s2 is not there after 10 s",
        "'s2' is not done after 10 s",
    ),
]


async def test_what_is_not_taken_back_is_not_told_as_if_it_were() -> None:
    """As a module that is loaded, which stays (docs/adr/0006)."""
    harness = EngineHarness("s3-apply:error", kinds={"s2": Stays})
    assert await harness.run() == ("apply of s3 found it wrong", "")
    assert harness.heard.split()[-4:] == ["s3:reverting", "s3:reverted", "s1:reverting", "s1:reverted"]


@pytest.mark.parametrize(
    ("script", "heard", "failure", "worse"), SEQUENCES, ids=[row[0] or "well" for row in SEQUENCES]
)
async def test_sequences(script: str, heard: str, failure: str, worse: str) -> None:
    harness = EngineHarness(script)
    assert await harness.run() == (failure, worse)
    assert harness.heard == heard
    assert {event.count for event in harness.events} == {3}


async def test_no_step_takes_longer_than_its_deadline_to_fail() -> None:
    harness = EngineHarness("s1-verify:waits")
    await harness.run()
    assert asyncio.get_running_loop().time() == DEADLINE
    assert [event.seconds for event in harness.events] == [0, DEADLINE, 0, 0]


async def test_apply_and_verify_have_the_deadline_each() -> None:
    harness = EngineHarness("s1-verify:sleeps s2-apply:sleeps")
    await harness.run()
    assert asyncio.get_running_loop().time() == DEADLINE


class TestStuck:
    async def test_forward(self) -> None:
        harness = EngineHarness("s2-apply:hang")
        hang = harness.host.faults.add(Hang("D", "snd_card_free"), operation="probe")
        with pytest.raises(StuckError) as stuck:
            await harness.engine.forward()
        assert asyncio.get_running_loop().time() == DEADLINE
        pid = stuck.value.pending.pid
        assert str(stuck.value) == (
            f"the kernel has not returned from 'bind {GPU}' within 10 s "
            f"(process {pid} is in state D, waiting in snd_card_free)"
        )
        assert stuck.value.pending.kernel_wait == "snd_card_free"
        assert harness.heard == FORWARD_2_FAILS
        hang.release()
        await harness.context.kernel.returned()
        await harness.engine.back()
        assert harness.heard == f"{FORWARD_2_FAILS} {S2} {S1}"

    async def test_back_goes_on_with_the_step_that_was_stuck(self) -> None:
        harness = EngineHarness("s3-apply:error s2-revert:hang")
        hang = harness.host.faults.add(Hang(), operation="probe")
        with pytest.raises(StepError):
            await harness.engine.forward()
        with pytest.raises(StuckError):
            await harness.engine.back()
        harness.events.clear()
        hang.release()
        await harness.context.kernel.returned()
        await harness.engine.back()
        assert harness.heard == f"{S2} {S1}"

    async def test_back_remembers_what_failed_before_it_was_stuck(self) -> None:
        harness = EngineHarness("s3-apply:error s3-revert:error s2-revert:hang s1-revert:error")
        hang = harness.host.faults.add(Hang(), operation="probe")
        with pytest.raises(StepError):
            await harness.engine.forward()
        with pytest.raises(StuckError):
            await harness.engine.back()
        hang.release()
        await harness.context.kernel.returned()
        with pytest.raises(StepError, match=r"^revert of s3 found it wrong; revert of s1 found it wrong$"):
            await harness.engine.back()


class TestStop:
    async def test_before_the_first_step(self) -> None:
        harness = EngineHarness("")
        harness.engine.stop("enough")
        with pytest.raises(StoppedError, match="enough"):
            await harness.engine.forward()
        await harness.engine.back()
        assert harness.heard == ""

    async def test_the_step_that_runs_is_finished_first(self) -> None:
        harness = EngineHarness("")
        harness.stop_at = ("s2", Status.RUNNING)
        with pytest.raises(StoppedError, match="enough"):
            await harness.engine.forward()
        assert harness.heard == "s1:do s1:ok s2:do s2:ok"
        await harness.engine.back()
        assert harness.heard == f"s1:do s1:ok s2:do s2:ok {S2} {S1}"

    async def test_a_step_that_fails_meanwhile_has_failed(self) -> None:
        """The switch ends because it was asked to, all the same."""
        harness = EngineHarness("s2-verify:waits")
        harness.stop_at = ("s2", Status.RUNNING)
        with pytest.raises(StoppedError, match="enough") as stopped:
            await harness.engine.forward()
        assert str(stopped.value.__cause__) == "s2 is not there after 10 s"
        await harness.engine.back()
        assert harness.heard == f"{FORWARD_2_FAILS} {S2} {S1}"

    async def test_in_the_last_step_is_too_late(self) -> None:
        harness = EngineHarness("")
        harness.stop_at = ("s3", Status.RUNNING)
        assert await harness.run() == ("", "")


async def test_steps_that_somebody_else_began_are_reverted() -> None:
    harness = EngineHarness("", steps=2, begun=True)
    await harness.engine.back()
    assert harness.heard == f"{S2} {S1}"


class TestIntent:
    """What is kept of a step before it is begun."""

    async def test_each_step_in_both_directions(self) -> None:
        harness = EngineHarness("s3-verify:error")
        await harness.run()
        forward, back = ["s1:do", "s2:do", "s3:do"], ["s3:reverting", "s2:reverting", "s1:reverting"]
        assert harness.intended == forward + back

    async def test_before_it_touches_anything(self) -> None:
        """A kernel that hangs from the first call on: by then it is known what for."""
        harness = EngineHarness("s2-apply:hang")
        harness.host.faults.add(Hang("D"), operation="probe")
        with pytest.raises(StuckError):
            await harness.engine.forward()
        assert harness.intended == ["s1:do", "s2:do"]

    async def test_what_cannot_be_kept_is_not_begun(self) -> None:
        harness = EngineHarness("s2-apply:hang")
        harness.full_at = "s2:do"
        assert await harness.run() == ("the disk is full", "")
        assert harness.heard == f"{FORWARD_2_FAILS} {S2} {S1}"

    async def test_a_way_back_does_not_wait_for_a_disk(self) -> None:
        harness = EngineHarness("s2-apply:error")
        harness.full_at = "s2:reverting"
        assert await harness.run() == ("apply of s2 found it wrong", "")
        assert harness.heard == f"{FORWARD_2_FAILS} {S2} {S1}"

    async def test_nor_does_what_can_be_done_without(self) -> None:
        harness = EngineHarness("", kinds={"s2": Forgoable})
        harness.full_at = "s2:do"
        assert await harness.run() == ("", "")
        assert harness.engine.forgone == []


class TestOptional:
    """Steps that the switch can do without."""

    async def test_it_goes_on_and_says_so_in_the_end(self) -> None:
        harness = EngineHarness("s2-apply:error s3-verify:waits", kinds={"s2": Forgoable, "s3": Forgoable})
        assert await harness.run() == ("", "")
        assert harness.heard == "s1:do s1:ok s2:do s2:fail s3:do s3:fail"
        assert harness.engine.forgone == ["apply of s2 found it wrong", "s3 is not there after 10 s"]

    @pytest.mark.parametrize("fault", ["apply:kernel", "apply:bug", "apply:sleeps", "verify:error"])
    async def test_whatever_is_wrong_with_it(self, fault: str) -> None:
        harness = EngineHarness(f"s2-{fault}", kinds={"s2": Forgoable})
        assert await harness.run() == ("", "")
        assert len(harness.engine.forgone) == 1

    async def test_it_is_reverted_like_the_others(self) -> None:
        """What it did before it failed is done."""
        harness = EngineHarness("s2-apply:error s3-apply:error", kinds={"s2": Forgoable})
        assert await harness.run() == ("apply of s3 found it wrong", "")
        assert harness.heard.endswith(f"s3:reverting s3:reverted {S2} {S1}")

    async def test_a_kernel_that_does_not_return_is_no_option(self) -> None:
        harness = EngineHarness("s2-apply:hang", kinds={"s2": Forgoable})
        hang = harness.host.faults.add(Hang(), operation="probe")
        with pytest.raises(StuckError):
            await harness.engine.forward()
        hang.release()
        await harness.context.kernel.returned()

    async def test_once_only_such_are_left_a_stop_is_too_late(self) -> None:
        """The switch is done: to take it back would be worse."""
        harness = EngineHarness("", kinds={"s2": Forgoable, "s3": Forgoable})
        harness.stop_at = ("s1", Status.DONE)
        assert await harness.run() == ("", "")
        assert harness.heard.endswith("s3:ok")

    async def test_before_that_a_stop_is_a_stop(self) -> None:
        harness = EngineHarness("", kinds={"s2": Forgoable})
        harness.stop_at = ("s1", Status.DONE)
        with pytest.raises(StoppedError, match="enough"):
            await harness.engine.forward()


class TestPatient:
    """Steps that wait for people and their programs."""

    async def test_a_step_says_how_long_it_may_take(self) -> None:
        harness = EngineHarness("s1-apply:waits", kinds={"s1": Patient})
        assert await harness.run() == ("s1 is not there after 110 s", "")
        assert asyncio.get_running_loop().time() == DEADLINE + 100

    async def test_its_way_back_has_the_deadline_of_its_kind(self) -> None:
        harness = EngineHarness("s1-apply:error s1-revert:sleeps", kinds={"s1": Patient})
        assert await harness.run() == ("apply of s1 found it wrong", "'s1' is not done after 10 s")

    @pytest.mark.parametrize("fault", ["waits", "sleeps"])
    async def test_a_stop_cuts_it_short(self, fault: str) -> None:
        harness = EngineHarness(f"s2-apply:{fault}", kinds={"s2": Patient})
        asyncio.get_running_loop().call_later(3, harness.engine.stop, "enough")
        with pytest.raises(StoppedError, match="enough"):
            await harness.engine.forward()
        assert asyncio.get_running_loop().time() == 3
        await harness.engine.back()
        assert harness.heard == f"{FORWARD_2_CANCELLED} {S2} {S1}"

    async def test_one_that_is_done_at_that_moment_is_done(self) -> None:
        harness = EngineHarness("", kinds={"s2": Patient})
        harness.stop_at = ("s2", Status.RUNNING)
        with pytest.raises(StoppedError):
            await harness.engine.forward()
        assert harness.heard == "s1:do s1:ok s2:do s2:ok"

    async def test_a_stop_right_before_it_cuts_it_too(self) -> None:
        harness = EngineHarness("s2-apply:sleeps", kinds={"s2": Patient})
        harness.stop_at = ("s2", Status.RUNNING)
        with pytest.raises(StoppedError, match="enough"):
            await harness.engine.forward()
        assert (asyncio.get_running_loop().time(), harness.heard) == (0, FORWARD_2_CANCELLED)

    async def test_its_own_failure_is_told_as_such(self) -> None:
        harness = EngineHarness("s2-apply:error", kinds={"s2": Patient})
        assert await harness.run() == ("apply of s2 found it wrong", "")
