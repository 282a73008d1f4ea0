"""Brings one GPU to a known-good state: after a failure, after a crash, and once a kernel that hung has returned."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from gpuswitch.errors import Failed, GpuswitchError
from gpuswitch.gpu.gpu_record import GpuRecord, Outcome
from gpuswitch.gpu.planner import Planner
from gpuswitch.gpu.runner import Runner
from gpuswitch.gpu.strategies import (
    RecoveryStrategy,
    after_crash,
    after_failure,
    after_refusal,
    back_on_vfio,
    story_of,
    summary,
)
from gpuswitch.host.looking import seen
from gpuswitch.host.port import Host, Pending
from gpuswitch.log.fields import in_one_line, told
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import Engine, StoppedError, StuckError, returned_late
from gpuswitch.switch.journal.journal import Unfinished
from gpuswitch.switch.planning.plan import Plan
from gpuswitch.switch.record import Result, Switch
from gpuswitch.switch.steps.step import Step, StepError

_log = logging.getLogger(__name__)


class HungError(StepError):
    """It did not work, and the kernel did not return in time: nothing more is stacked on that."""


class Recovery:
    """Of one GPU."""

    def __init__(self, record: GpuRecord, runner: Runner, planner: Planner, host: Host) -> None:
        self._record = record
        self._runner = runner
        self._planner = planner
        self._host = host
        self._device_failed = False
        """Whether the recovery that runs has met a device in no state to be used."""

    # From a state of rest, or none ------------------------------------------------------------------------------------

    def start(self, switch: Switch, why: str, *, starting: bool) -> None:
        """Begin to look for a known-good state; `why` there is a need to. `starting`: the service is."""
        record = self._record
        story = record.page.entry.failed
        try:
            record.page.begin(switch, record.restore_state, record.trial)
        except Failed as error:
            # No reason to leave it where it is.
            _log.error("%s", error, extra=told(GPU=record.gpu.address))
        self._device_failed = False
        self._runner.set_out(switch, "recover")
        # Not counted before it has its turn, for which it may have to wait for people.
        self._runner.patience = math.inf
        work = partial(self._after_crash, switch, why, story, starting=starting)
        self._runner.launch(self._runner.to_rest(switch, work))

    def resume(self, left: Unfinished, stuck: Pending | None) -> Switch:
        """Take up the switch that a dead service left unfinished, which ends with this recovery. `stuck`: what the
        kernel had not returned from when that died, and has since.
        """
        switch, why = self._resumed(left)
        if stuck is not None:
            self._runner.has_returned(switch, 0.0, returned_late(stuck.what))
        self.start(switch, why, starting=True)
        return switch

    async def _after_crash(self, switch: Switch, why: str, story: str, *, starting: bool) -> Outcome:
        record = self._record
        await self._runner.turns.take(None)
        self._runner.be_patient()
        if why and not record.restore_state.functions and await record.is_at_rest():
            # None of its functions was to be moved: what was changed around it stays in the restore state.
            return await record.settle(Outcome(Result.REVERTED, why), record.restore_state, story)
        outcome = await self.run_recovery(switch, after_crash(record.rules, starting=starting), why, starting=starting)
        reverted = outcome.result is Result.REVERTED and switch.target is State.HOST
        if reverted and self._device_failed and not starting:
            outcome = await self._after_device_failure(switch, outcome.reason)
        return await record.settle(outcome, record.restore_state, story)

    async def recover_after_stall(self, engine: Engine) -> None:
        """The way from `wedged` to a state of rest where no switch of this run of the service had begun."""
        left = self._record.page.entry.unfinished
        switch, why = self._resumed(left) if left is not None else (None, "")
        stuck = self._record.page.entry.stuck
        await self._runner.to_rest(switch, partial(self._after_stall, engine, switch, why, stuck))

    async def _after_stall(self, engine: Engine, switch: Switch | None, why: str, stuck: Pending | None) -> Outcome:
        record = self._record
        await self._runner.until_returned()
        reason = await self._runner.go_back(engine) or ""
        if switch is not None:
            record.make_current(switch)
            if stuck is not None:
                self._runner.has_returned(switch, time.time(), returned_late(stuck.what))
            outcome = await self.run_recovery(switch, after_crash(record.rules), why)
            return await record.settle(outcome, record.restore_state)
        # It is where it was before, and why that is so is no other.
        outcome = Outcome(Result.FAILED, reason) if reason else Outcome(Result.REVERTED, record.page.entry.stays_out)
        return await record.settle(outcome, record.restore_state, record.page.entry.failed)

    def _resumed(self, left: Unfinished) -> tuple[Switch, str]:
        """The switch that a dead service left unfinished, and why there is a need to recover."""
        where = f"at step {left.index} of {left.count}, '{left.title}'" if left.index else "before its first step"
        taken_back = ", as it was being taken back" if left.back else ""
        waited = f", which waited: {in_one_line(left.waiting_for)}" if left.waiting_for else ""
        why = story_of([left.failure, f"the service ended {where}{taken_back}{waited}"])
        gpu = self._record.gpu.address
        extra = told(GPU=gpu, SWITCH_ID=left.id, TARGET=left.target)
        said = in_one_line(why)
        _log.warning("%s: switch %s to %s is unfinished: %s", gpu, left.id, left.target, said, extra=extra)
        steps = left.interrupted()
        switch = Switch.begun_before(
            left.id, left.target, left.count, left.options, left.requester, left.started, steps
        )
        switch.failure = left.failure
        return switch, why

    # From within a switch ---------------------------------------------------------------------------------------------

    async def after_failure(self, engine: Engine, switch: Switch, outcome: Outcome) -> Outcome:
        """The way back of a switch; where that fails too, any other to a known-good state (`runner.AfterFailure`)."""
        failed = await self._runner.go_back(engine)
        if failed is None:
            reverted = outcome.result is Result.REVERTED and switch.target is State.HOST
            if reverted and engine.failed_on_device:
                return await self._after_device_failure(switch, outcome.reason)
            return outcome
        switch.recovery = True
        reason = story_of([outcome.reason, _way_back_failed(failed)])
        if engine.hung or await self._record.is_at_rest():
            return Outcome(Result.FAILED, reason)
        return await self.run_recovery(switch, after_failure(switch.target, self._record.rules), reason)

    async def _after_device_failure(self, switch: Switch, reason: str) -> Outcome:
        """It is back on vfio, since its host driver could not take it: perhaps it can after a reset."""
        if self._record.retired or not (strategies := after_refusal(self._record.rules)):
            return Outcome(Result.REVERTED, reason)
        switch.recovery = True
        outcome = await self.run_recovery(switch, strategies, reason)
        if outcome.reached is not None:
            return outcome
        hung = self._runner.engine is not None and self._runner.engine.hung
        # A removal that ends after its time is followed by a rescan, and that by whatever drives the GPU at boot.
        self._record.removed_late = hung
        if await self._record.is_at_rest():
            return Outcome(Result.REVERTED, outcome.reason)
        return outcome if hung else await self.run_recovery(switch, back_on_vfio(), outcome.reason)

    # One strategy after the other -------------------------------------------------------------------------------------

    async def run_recovery(
        self, switch: Switch, strategies: Iterable[RecoveryStrategy], reason: str, *, starting: bool = False
    ) -> Outcome:
        """Try one way after the other to a known-good state.

        Raises:
            StoppedError: the service stops.
        """
        story = [reason]
        for strategy in strategies:
            if self._record.retired:
                raise StoppedError(self._record.retired)
            try:
                plan = await self._try_strategy(strategy, switch, starting=starting)
            except (GpuswitchError, StepError) as error:
                story.append(strategy.failed(error))
                if isinstance(error, HungError):
                    break
            else:
                if self._runner.engine is not None:
                    switch.forgone = tuple(self._runner.engine.forgone)
                result, why = summary(switch.target, plan.target, self._record.place(), story)
                return Outcome(result, story_of([why, *switch.forgone]), plan)
        return Outcome(Result.FAILED, story_of(story))

    async def _try_strategy(self, strategy: RecoveryStrategy, switch: Switch, *, starting: bool) -> Plan:
        """One strategy, to its end; raises as `_run_attempt`."""
        if strategy.destructive_steps is None:
            return await self._run_attempt(strategy, switch, None, starting=starting)
        steps = strategy.destructive_steps(self._record.gpu, await seen(self._host))
        await self._run_attempt(strategy, switch, steps, starting=starting)
        cleared = self._runner.engine
        try:
            return await self._run_attempt(strategy, switch, None, starting=starting)
        except (GpuswitchError, StepError) as failure:
            hung = isinstance(failure, HungError)
            if cleared is not None and not hung and (worse := await self._runner.go_back(cleared)):
                raise StepError(story_of([str(failure), _way_back_failed(worse)])) from failure
            raise

    async def _run_attempt(
        self, strategy: RecoveryStrategy, switch: Switch, destructive_steps: Sequence[Step] | None, *, starting: bool
    ) -> Plan:
        """The destructive steps of a strategy, or its way to a known-good state.

        Raises:
            GpuswitchError, StepError: it led nowhere, and what it began is taken back, as far as that went.
        """
        record, runner = self._record, self._runner
        engine = runner.new_engine(())
        # The machine that ended is not in its own way: its ownership has waited for libvirt as long as it is to.
        machine = switch.requester.machine if switch.requester.service else ""
        try:
            record.facts = await seen(self._host)
            preparation = self._planner.preparation(
                State.UNKNOWN,
                switch.options_in_force,
                starting=starting,
                machine=machine,
                at_boot=switch.requester.at_boot,
            )
            try:
                plan = await self._planner.plan(preparation, strategy.target, destructive_steps=destructive_steps)
            except (GpuswitchError, StuckError):
                engine = runner.new_engine(tuple(preparation.held_groups), begun=True)
                raise
            record.page.write_if_possible(replace(record.page.entry, restore_state=plan.restore_state))
            record.aims_home(plan)
            engine = runner.new_engine(plan.steps, held=preparation.held_groups)
            runner.use(engine)
            if record.retired:
                raise StoppedError(record.retired)
            await engine.forward()
        except (GpuswitchError, StepError, StuckError) as failure:
            words, kind = str(failure), StepError
            if isinstance(failure, StuckError):
                words, kind = failure.afterwards, HungError
                await runner.outlast(failure)
            self._device_failed = self._device_failed or engine.failed_on_device
            if worse := await runner.go_back(engine):
                words = story_of([words, _way_back_failed(worse)])
            raise (HungError if engine.hung else kind)(words) from failure
        return plan


def _way_back_failed(why: str) -> Sentence:
    return Sentence("the way back failed too: {failure}", failure=why)
