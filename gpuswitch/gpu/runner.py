"""Runs what moves one GPU, from the first step to a state of rest, past a kernel that does not return.

One thing at a time. What becomes of a switch that failed, whoever starts it says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

from gpuswitch.gpu.gpu_record import GpuObserver, GpuRecord, Outcome
from gpuswitch.gpu.machine import START
from gpuswitch.gpu.stall import Stall
from gpuswitch.gpu.strategies import OUTCOMES, story_of
from gpuswitch.gpu.turns import Turns
from gpuswitch.host.port import Host, Pending
from gpuswitch.log.fields import about, told
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Engine, Status, StepEvent, StoppedError, StuckError
from gpuswitch.switch.planning.plan import Plan
from gpuswitch.switch.planning.preparation import Preparation
from gpuswitch.switch.record import Result, Returned, Switch
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.awake import Why
from gpuswitch.switch.steps.step import Step, StepContext, StepError

_log = logging.getLogger(__name__)

AfterFailure = Callable[[Engine, Switch, Outcome], Coroutine[Any, Any, Outcome]]
"""Takes back what this engine has begun, and does what there is to do beyond that; how the switch ended after all."""


class Runner:
    """Of one GPU. `task` is what runs now, `engine` its steps.

    At work, `patience` seconds without `progress` of the record are a fault. `rested` is called whenever a switch is
    over: looks taken meanwhile went unheeded.
    """

    def __init__(
        self, record: GpuRecord, *, host: Host, arbiter: Arbiter, observer: GpuObserver, rested: Callable[[], None]
    ) -> None:
        self.engine: Engine | None = None
        self.task: asyncio.Task[None] | None = None
        self.patience = 0.0
        self.turns = Turns(record, host, arbiter)
        self._record = record
        self._host = host
        self._kernel = host.kernel(str(record.gpu.address))
        self._arbiter = arbiter
        self._observer = observer
        self._rested = rested
        self._stall = Stall(record, host, self._kernel)
        self._resting = asyncio.Event()
        self._resting.set()
        self._unwedged = asyncio.Event()
        self._unwedged.set()
        self._wedged: Switch | None = None
        """The one that the kernel has not returned from, or had not, until the GPU is at rest."""

    @property
    def busy(self) -> bool:
        """Something runs, or waits for the kernel."""
        return self.task is not None

    @property
    def stalled(self) -> bool:
        """It is at work and has not moved for twice its longest deadline: a fault of the program."""
        idle = asyncio.get_running_loop().time() - self._record.progress
        return self._record.state.moving and idle > self.patience

    async def rest(self) -> None:
        """Until no switch is under way, or it is wedged."""
        await self._resting.wait()

    async def unwedged(self) -> None:
        """Until it is not wedged."""
        await self._unwedged.wait()

    # A switch -------------------------------------------------------------------------------------------------------

    def start(self, switch: Switch, plan: Plan, preparation: Preparation, after_failure: AfterFailure) -> None:
        """Begin this switch.

        Raises:
            Failed: the journal cannot be written; nothing was changed.
        """
        before = self._record.restore_state, self._record.page.entry.failed
        self._record.page.begin(switch, plan.restore_state, self._record.trial_during(switch))
        self._record.aims_home(plan)
        self.set_out(switch)
        engine = self.new_engine(plan.steps, held=preparation.held_groups)
        self.use(engine)
        self.launch(self.to_rest(switch, partial(self._run, switch, engine, plan, after_failure, *before)))

    async def _run(
        self,
        switch: Switch,
        engine: Engine,
        plan: Plan,
        after_failure: AfterFailure,
        restore_state_before: RestoreState,
        story: str,
    ) -> Outcome:
        """One switch from its first step to a state of rest."""
        try:
            await engine.forward()
            switch.forgone = tuple(engine.forgone)
            outcome = Outcome(Result.DONE, story_of(switch.forgone), plan)
        except StepError as failure:
            outcome = Outcome(Result.REVERTED, str(failure))
            switch.error = failure.error.name
        except StoppedError as word:
            outcome = Outcome(Result.CANCELLED, str(word))
        except StuckError as stuck:
            outcome = Outcome(Result.REVERTED, stuck.afterwards)
            await self.outlast(stuck)
        if outcome.result is not Result.DONE:
            switch.failure = outcome.reason
            outcome = await after_failure(engine, switch, outcome)
        return await self._record.settle(outcome, restore_state_before, story)

    def set_out(self, switch: Switch, trigger: str = "") -> None:
        """This switch is under way from here on."""
        record = self._record
        record.make_current(switch)
        record.reason = ""
        record.removed_late = False
        self._resting.clear()
        record.fire(trigger or ("recover" if record.state is State.FAILED else START[switch.target]))
        record.tell()

    def launch(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this from here on; it ends with `to_rest`."""
        context = copy_context()
        context.run(self._about)
        self.task = asyncio.create_task(work, context=context)

    def _about(self) -> None:
        """What the log is to say of all that is done."""
        record = self._record
        switch = record.switch if record.switch is not None and record.switch.result is None else None
        owner = record.owner
        about(
            GPU=record.gpu.address,
            SWITCH_ID=switch.id if switch else "",
            TARGET=switch.target if switch else "",
            OWNER=owner and owner.label,
            STEP="",
        )

    async def to_rest(self, switch: Switch | None, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> None:
        """Do this work, whatever becomes of it, and tell how the switch ended, where it was taken up."""
        try:
            result, reason, _ = await work()
        except StoppedError as word:
            result, reason = Result.FAILED, _left(word)
        except Exception as fault:  # noqa: BLE001 -- whatever it was, it ends, and is told
            result, reason = self._broken(fault)
        finally:
            self._rest()
        self._over(switch if switch is self._record.switch else None, result, reason)

    def _rest(self) -> None:
        gpu = self._record.gpu.address
        self.engine = self.task = None
        self._arbiter.rests(gpu)
        self.turns.end()
        if self._record.state is not State.WEDGED:
            # The service may stop, and the kernel still has it.
            self._arbiter.awake.need(gpu, Why.SWITCH, needed=False)
        self._resting.set()
        about(SWITCH_ID="", TARGET="", STEP="")

    def _over(self, switch: Switch | None, result: Result, reason: str) -> None:
        """It is at rest: tell everybody."""
        record = self._record
        wedged, self._wedged = self._wedged, None
        if wedged is not None and wedged.returned is not None:
            beyond = reason.removeprefix(wedged.returned.what).lstrip("\n")
            wedged.returned = replace(wedged.returned, state=record.state, reason=beyond)
        if switch is not None and switch.result is None:
            self._end(switch, result, reason)
        record.tell()
        if wedged is not None and wedged.returned is not None:
            self._observer.returned(record, wedged)
        if switch is not None and switch.recovery and record.state in OUTCOMES:
            self._observer.recovered(record)
        self._rested()

    def _end(self, switch: Switch, result: Result, reason: str) -> None:
        switch.finish(result, reason)
        self._observer.finished(self._record, switch)

    def _broken(self, fault: Exception) -> tuple[Result, str]:
        """Something that must not happen: nobody knows how far it came, so it is `failed`, and told as it is."""
        record = self._record
        _log.critical("a fault of gpuswitch itself", exc_info=fault, extra=told(GPU=record.gpu.address))
        result, reason = Result.FAILED, f"a fault of gpuswitch itself: {fault!r}"
        if record.state in {State.DETACHING, State.REATTACHING}:
            record.fire("fault")
        if record.state is State.RECOVERING:
            record.fire("give_up")
        record.reason = reason
        entry = replace(record.page.entry, unfinished=None, failed=reason, stays_out=reason, trial=None)
        record.page.write_if_possible(entry)
        return result, reason

    # Its steps ------------------------------------------------------------------------------------------------------

    def new_engine(self, steps: tuple[Step, ...], *, begun: bool = False, held: Collection[Step] = ()) -> Engine:
        """An engine for these steps (`Engine`); what it does is told, and kept in the journal."""
        context = StepContext(
            self._record.gpu.address,
            self._host,
            self._kernel,
            self._arbiter,
            self._record.record_restore,
            deadlines=self._deadlines,
            waits=self._waits,
        )
        return Engine(context, steps, self._stepped, self._intend, begun=begun, held=held)

    def use(self, engine: Engine) -> None:
        """Its steps are what runs from here on."""
        self.engine = engine
        self.patience = 2 * engine.longest

    def be_patient(self) -> None:
        """Nothing is known yet of the steps that come."""
        self._record.progress = asyncio.get_running_loop().time()
        self.patience = 2 * max(self._deadlines.values())

    @property
    def _deadlines(self) -> dict[str, float]:
        return self._record.config.deadlines.by_kind()

    def _intend(self, event: StepEvent) -> None:
        """This step is begun next, or taken back.

        Raises:
            Failed: that could not be written.
        """
        # What brings it home does not wait for a disk.
        home = event.status is Status.REVERTING or self._record.state is State.RECOVERING
        self._record.page.begin_step(event, self._kernel.worker, self._record.switch, durably=not home)

    def _stepped(self, event: StepEvent) -> None:
        record = self._record
        record.progress = asyncio.get_running_loop().time()
        about(STEP=event.step.kind)
        if record.switch is not None and record.switch.result is None:
            record.switch.at(event)
            self._observer.stepped(record, record.switch, event)

    def _waits(self, what: str, until: float | None) -> None:
        record = self._record
        if record.switch is not None and record.switch.result is None:
            record.switch.waits(what, until)
            # What is over within a moment is nothing that anybody would look up later.
            if until is not None:
                record.page.waits(what)
            self._observer.waits(record)

    async def go_back(self, engine: Engine) -> str | None:
        """Take all of it back, however long the kernel takes; what did not work, in sentences, or None."""
        if self._record.state is not State.RECOVERING:
            self._record.fire("fault")
            self._record.tell()
        while True:
            try:
                await engine.back()
            except StepError as worse:
                return str(worse)
            except StuckError as stuck:
                await self.outlast(stuck)
            else:
                return None

    # A kernel that does not return ------------------------------------------------------------------------------------

    def left_behind(self) -> Pending | None:
        """What an earlier run of the service had sent, and the kernel still has or may have."""
        return self._stall.left_behind(self._record.page.entry)

    async def outlast(self, stuck: StuckError) -> None:
        """Say that it is wedged, and go on if ever the kernel returns."""
        self.wedge(stuck)
        await self.until_returned(stuck.afterwards)

    def wedge(self, stuck: StuckError) -> None:
        """The kernel has not returned: say so, and write nothing more."""
        record, gpu = self._record, self._record.gpu.address
        self._stall.begin(stuck, self.engine.numbers if self.engine else ())
        if record.switch is not None and record.switch.result is None:
            self._wedged = record.switch
            self._end(record.switch, Result.WEDGED, str(stuck))
        self._arbiter.awake.need(gpu, Why.SWITCH, needed=True)
        # The others of its driver need not wait for a turn, but nobody may unload what the kernel is in.
        self._arbiter.stuck[gpu] = record.host_driver or ""
        self.turns.end()
        self._unwedged.clear()
        self._resting.set()
        record.tell()

    def has_returned(self, switch: Switch, at: float, what: str) -> None:
        """The kernel has returned from this switch, which had ended as wedged (`Returned`)."""
        self._wedged = switch
        switch.returned = Returned(at, what)

    async def until_returned(self, what: str = "") -> None:
        """Until the kernel has returned; it is on its way again then, and has its turn. `what` returned, and how late,
        in a sentence.
        """
        record = self._record
        await self._stall.until_returned()
        if (wedged := self._wedged) is not None:
            # Where it did not once more, what was first is what its end was about.
            what = what if wedged.returned is None else wedged.returned.what
            self.has_returned(wedged, time.time(), what)
            wedged.reason = what
        self._resting.clear()
        self._arbiter.stuck.pop(record.gpu.address, None)
        await self.turns.take(None)
        record.page.write_if_possible(replace(record.page.entry, stuck=None))
        record.fire("unstuck")
        self._unwedged.set()
        self.be_patient()
        record.facts = await record.fresh_facts()
        record.say_why("")


def _left(word: StoppedError) -> str:
    return f"{word}: it is left as it is, and recovered when the service starts again"
