"""How one GPU is moved: a switch or a recovery from its first step to a state of rest, past a kernel that hangs."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gpuswitch.errors import Failed, GpuswitchError, KernelError
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Engine, StepEvent, StoppedError, StuckError
from gpuswitch.switch.journal import Unfinished
from gpuswitch.switch.looking import seen
from gpuswitch.switch.observe import place
from gpuswitch.switch.owed import Owed
from gpuswitch.switch.pause import LateError
from gpuswitch.switch.plan import Plan
from gpuswitch.switch.prepare import Preparation
from gpuswitch.switch.record import Result, Switch
from gpuswitch.switch.recovery import OUTCOMES, Rung, after_crash, after_failure, after_refusal, back_on_vfio, summary
from gpuswitch.switch.step import Hands, Step, StepError
from gpuswitch.switch.waiting import Waiting

_log = logging.getLogger(__name__)


class HungError(StepError):
    """It did not work, and the kernel did not return in time: nothing more is stacked on that."""


class Running(Waiting):
    """A GPU with the one switch that moves it. Who hears of what, and what is asked, its actor knows."""

    _paying: asyncio.Task[None] | None = None
    _removed_late = False
    """Whether it may have come home by itself, so that all else is still owed."""
    _device_failed = False
    """Whether a recovery that runs has met a device in no state to be used."""

    # A switch -------------------------------------------------------------------------------------------------------

    def _start(self, switch: Switch, plan: Plan, preparation: Preparation) -> None:
        """Begin this switch.

        Raises:
            Failed: the journal cannot be written; nothing was changed.
        """
        before = self._owed, self._entry.failed
        self._begin_journal(switch, plan.owed)
        self._aims_home(plan)
        self._set_out(switch)
        self._engine = self._new_engine(plan.steps, held=preparation.holds)
        self.patience = 2 * self._engine.longest
        self._task = asyncio.create_task(self._to_rest(switch, partial(self._run, switch, self._engine, plan, *before)))

    async def _run(
        self, switch: Switch, engine: Engine, plan: Plan, owed_before: Owed, story: str
    ) -> tuple[Result, str]:
        """One switch from its first step to a state of rest."""
        result, reason = Result.DONE, ""
        reached: Plan | None = plan
        try:
            await engine.forward()
            reason = "; ".join(engine.forgone)
        except StepError as failure:
            result, reason = Result.REVERTED, str(failure)
        except StoppedError as word:
            result, reason = Result.CANCELLED, str(word)
        except StuckError as stuck:
            result, reason = Result.REVERTED, stuck.afterwards
            await self._outlasted(stuck)
        if result is not Result.DONE:
            result, reason, reached = await self._taken_back(engine, switch, result, reason)
        return await self._settle(result, reason, reached, owed_before, story)

    async def _to_rest(
        self, switch: Switch | None, work: Callable[[], Coroutine[Any, Any, tuple[Result, str]]]
    ) -> None:
        """Do this work, whatever becomes of it, and tell how the switch ended, where it was taken up."""
        try:
            result, reason = await work()
        except StoppedError as word:
            result, reason = Result.FAILED, _left(word)
        except Exception as fault:  # noqa: BLE001 -- whatever it was, it ends, and is told
            result, reason = self._broken(fault)
        finally:
            self._rest()
        self._over(switch if switch is self.switch else None, result, reason)

    async def _taken_back(
        self, engine: Engine, switch: Switch, result: Result, reason: str
    ) -> tuple[Result, str, Plan | None]:
        """The way back; where that fails too, any other to a known-good state. The plan is the one that led there."""
        failed = await self._go_back(engine)
        if failed is None:
            if result is Result.REVERTED and switch.target is State.HOST and engine.failed_on_device:
                return await self._mended(switch, reason)
            return result, reason, None
        switch.recovery = True
        reason = "; ".join(filter(None, (reason, f"the way back failed too: {failed}")))
        if engine.hung or await self._at_rest():
            return Result.FAILED, reason, None
        return await self._climb(switch, after_failure(switch.target, self._rules), reason)

    async def _mended(self, switch: Switch, reason: str) -> tuple[Result, str, Plan | None]:
        """It is back on vfio, since its host driver could not take it: perhaps it can after a reset."""
        if self._retired or not (rungs := after_refusal(self._rules)):
            return Result.REVERTED, reason, None
        switch.recovery = True
        result, reason, reached = await self._climb(switch, rungs, reason)
        if reached is not None:
            return result, reason, reached
        hung = self._engine is not None and self._engine.hung
        # A removal that ends after its time is followed by a rescan, and that by whatever drives the GPU at boot.
        self._removed_late = hung
        if await self._at_rest():
            return Result.REVERTED, reason, None
        return (result, reason, None) if hung else await self._climb(switch, back_on_vfio(), reason)

    async def _go_back(self, engine: Engine) -> str | None:
        """Take all of it back, however long the kernel takes; what did not work, in sentences, or None."""
        if self.state is not State.RECOVERING:
            self._fire("fault")
            self._tell()
        while True:
            try:
                await engine.back()
            except StepError as worse:
                return str(worse)
            except StuckError as stuck:
                await self._outlasted(stuck)
            else:
                return None

    def _broken(self, fault: Exception) -> tuple[Result, str]:
        """Something that must not happen: nobody knows how far it came, so it is `failed`, and told as it is."""
        _log.critical("a fault of gpuswitch itself", exc_info=fault)
        result, reason = Result.FAILED, f"a fault of gpuswitch itself: {fault!r}"
        if self.state in {State.DETACHING, State.REATTACHING}:
            self._fire("fault")
        if self.state is State.RECOVERING:
            self._fire("give_up")
        self.reason = reason
        self._keep_if_possible(replace(self._entry, unfinished=None, failed=reason, stays_out=reason))
        return result, reason

    # A recovery -----------------------------------------------------------------------------------------------------

    def _start_recovery(self, switch: Switch, why: str, *, starting: bool) -> None:
        """Begin to look for a known-good state; `why` there is a need to."""
        story = self._entry.failed
        try:
            self._begin_journal(switch, self._owed)
        except Failed as error:
            # No reason to leave it where it is.
            _log.error("%s", error)
        self._set_out(switch, "recover")
        # Not counted before it has its turn, for which it may have to wait for people.
        self.patience = math.inf
        self._task = asyncio.create_task(
            self._to_rest(switch, partial(self._recover, switch, why, story, starting=starting))
        )

    async def _recover(self, switch: Switch, why: str, story: str, *, starting: bool) -> tuple[Result, str]:
        await self._take_turn(None)
        self._be_patient()
        if why and not self._owed.functions and await self._at_rest():
            # Nothing of it was to be moved: what was done around it is owed, as ever.
            return await self._settle(Result.REVERTED, why, None, self._owed, story)
        ladder = after_crash(self._rules, starting=starting)
        result, reason, reached = await self._climb(switch, ladder, why, starting=starting)
        if result is Result.REVERTED and switch.target is State.HOST and self._device_failed and not starting:
            result, reason, reached = await self._mended(switch, reason)
        return await self._settle(result, reason, reached, self._owed, story)

    def _resumed(self, left: Unfinished) -> tuple[Switch, str]:
        """The switch that a dead service left unfinished, and why there is a need to recover."""
        where = f"at step {left.index} of {left.count}, '{left.title}'" if left.index else "before its first step"
        taken_back = ", as it was being taken back" if left.back else ""
        why = f"the service ended {where}{taken_back}"
        _log.warning("%s: switch %s to %s is unfinished: %s", self.gpu.address, left.id, left.target, why)
        return Switch.resumed(left.id, left.target, left.asker, left.started), why

    async def _outlast(self, engine: Engine) -> None:
        """The way from `wedged` to a state of rest where no switch of this run of the service had begun."""
        left = self._entry.unfinished
        switch, why = self._resumed(left) if left is not None else (None, "")
        await self._to_rest(switch, partial(self._unstuck, engine, switch, why))
        await self.pay()

    async def _unstuck(self, engine: Engine, switch: Switch | None, why: str) -> tuple[Result, str]:
        await self._returned()
        reason, reached = await self._go_back(engine) or "", None
        result = Result.FAILED if reason else Result.REVERTED
        if switch is not None:
            self._make_current(switch)
            result, reason, reached = await self._climb(switch, after_crash(self._rules), why)
        return await self._settle(result, reason, reached, self._owed)

    async def _climb(
        self, switch: Switch, ladder: Iterable[Rung], reason: str, *, starting: bool = False
    ) -> tuple[Result, str, Plan | None]:
        """Try one way after the other to a known-good state; the plan is the one that led there."""
        story = [reason]
        for rung in ladder:
            if self._retired:
                raise StoppedError(self._retired)
            try:
                plan = await self._tried(rung, switch, starting=starting)
            except (GpuswitchError, StepError) as error:
                story.append(f"{rung}: {error}")
                if isinstance(error, HungError):
                    break
            else:
                return (*summary(switch.target, plan.target, place(self.gpu, self._own_look_now()), story), plan)
        return Result.FAILED, "; ".join(filter(None, story)), None

    async def _tried(self, rung: Rung, switch: Switch, *, starting: bool) -> Plan:
        """One rung of the ladder, to its end; raises as `_led`."""
        if rung.rough is None:
            return await self._led(rung, switch, None, starting=starting)
        await self._led(rung, switch, rung.rough(self.gpu, await seen(self._host)), starting=starting)
        cleared = self._engine
        try:
            return await self._led(rung, switch, None, starting=starting)
        except (GpuswitchError, StepError) as failure:
            if cleared is not None and not isinstance(failure, HungError) and (worse := await self._go_back(cleared)):
                raise StepError(f"{failure}; the way back failed too: {worse}") from failure
            raise

    async def _led(self, rung: Rung, switch: Switch, rough: Sequence[Step] | None, *, starting: bool) -> Plan:
        """What is rough about a rung, or its way to a known-good state.

        Raises:
            GpuswitchError, StepError: it led nowhere, and what it began is taken back, as far as that went.
        """
        engine = self._new_engine(())
        # The machine that ended is not in its own way: its ownership has waited for libvirt as long as it is to.
        machine = switch.asker.vm if switch.asker.service else ""
        try:
            self.facts = await seen(self._host)
            preparation = self._preparation_in(State.UNKNOWN, switch.options, starting=starting, machine=machine)
            try:
                plan = await self._planned(preparation, rung.target, rough=rough)
            except (GpuswitchError, StuckError):
                engine = self._new_engine(tuple(preparation.holds), begun=True)
                raise
            self._keep_if_possible(replace(self._entry, owed=plan.owed))
            self._aims_home(plan)
            engine = self._engine = self._new_engine(plan.steps, held=preparation.holds)
            self.patience = 2 * engine.longest
            if self._retired:
                raise StoppedError(self._retired)
            await engine.forward()
        except (GpuswitchError, StepError, StuckError) as failure:
            words, kind = str(failure), StepError
            if isinstance(failure, StuckError):
                words, kind = failure.afterwards, HungError
                await self._outlasted(failure)
            self._device_failed = self._device_failed or engine.failed_on_device
            if worse := await self._go_back(engine):
                words += f"; the way back failed too: {worse}"
            raise (HungError if engine.hung else kind)(words) from failure
        return plan

    def _preparation_in(
        self, state: State, options: Options, *, starting: bool = False, asking: bool = False, machine: str = ""
    ) -> Preparation:
        return Preparation(
            self.gpu,
            state,
            self.facts,
            self._owed,
            self.config,
            options,
            self._host,
            self._arbiter,
            starting=starting,
            owned=self.owned,
            along=self._along,
            asking=asking,
            machine=machine,
        )

    async def _planned(self, preparation: Preparation, target: State, *, rough: Sequence[Step] | None = None) -> Plan:
        """What `Preparation.plan` says, or `plan_rough`.

        Raises:
            GpuswitchError: refused, or the kernel said no; nothing was changed.
            StuckError: the kernel did not return.
        """
        try:
            if rough is not None:
                return await preparation.plan_rough(rough)
            return await preparation.plan(target)
        except LateError as late:
            pending = preparation.kernel.pending
            if pending is not None and not preparation.asking:
                raise StuckError(pending, late.seconds) from None
            what = f" ('{pending.what}')" if pending is not None else ""
            raise Failed(
                f"{self.gpu.address} did not answer within {late.seconds:g} s{what}; nothing was changed"
            ) from None
        except KernelError as error:
            raise Failed(f"{error}; nothing was changed") from error

    # Around it ------------------------------------------------------------------------------------------------------

    def _aims_home(self, plan: Plan) -> None:
        captured = plan.owed.functions.get(self.gpu.address)
        if plan.target is State.HOST and captured is not None and captured.driver is not None:
            self.home_driver = captured.driver.name

    def _make_current(self, switch: Switch) -> None:
        self.switch = switch
        self.recent.append(switch)

    def _set_out(self, switch: Switch, trigger: str = "") -> None:
        self._make_current(switch)
        self.reason = ""
        self._device_failed = self._removed_late = False
        self._resting.clear()
        self._fire_start(switch.target, trigger)
        self._tell()

    def _new_engine(self, steps: tuple[Step, ...], *, begun: bool = False, held: Collection[Step] = ()) -> Engine:
        hands = Hands(
            self.gpu.address,
            self._host,
            self._kernel,
            self._arbiter,
            self._owe,
            deadlines=self._deadlines,
        )
        return Engine(hands, steps, self._stepped, self._intend, begun=begun, held=held)

    def _over(self, switch: Switch | None, result: Result, reason: str) -> None:
        """It is at rest: tell everybody."""
        if switch is not None and switch.result is None:
            self._end(switch, result, reason)
        self._tell()
        if switch is not None and switch.recovery and self.state in OUTCOMES:
            self._tell_recovered(OUTCOMES[self.state])
        self._rested()
        if self._removed_late and self.state is State.HOST and self._owed and not self._retired:
            self._paying = asyncio.create_task(self.pay())

    def _stepped(self, event: StepEvent) -> None:
        self.progress = asyncio.get_running_loop().time()
        if self.switch is not None and self.switch.result is None:
            self.switch.at(event)
            self._tell_step(self.switch, event)


def _left(word: StoppedError) -> str:
    return f"{word}: it is left as it is, and recovered when the service starts again"
