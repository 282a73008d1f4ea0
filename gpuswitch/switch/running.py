"""How one GPU is moved: a switch or a recovery from its first step to a state of rest, past a kernel that hangs."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from gpuswitch.config import Config
from gpuswitch.errors import Failed, GpuswitchError, InProgress, KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.engine import Engine, StepEvent, StoppedError, StuckError
from gpuswitch.switch.host import Host
from gpuswitch.switch.journal import Journal, Unfinished
from gpuswitch.switch.needs import moves_in_turns
from gpuswitch.switch.owed import Owed
from gpuswitch.switch.plan import Plan
from gpuswitch.switch.prepare import Preparation
from gpuswitch.switch.record import Result, Switch
from gpuswitch.switch.recovery import OUTCOMES, Rung, after_crash, after_failure, summary
from gpuswitch.switch.standing import Standing
from gpuswitch.switch.step import Hands, Step, StepError

_log = logging.getLogger(__name__)


class HungError(StepError):
    """It did not work, and the kernel did not return in time: nothing more is stacked on that."""


class Running(Standing, ABC):
    """A GPU with the one switch that moves it. At work, `patience` seconds without `progress` are a fault.

    `rested` is called whenever a switch is over: looks taken meanwhile went unheeded. Who hears of what, and what is
    asked, its actor knows.
    """

    def __init__(
        self,
        gpu: Gpu,
        facts: HostFacts,
        *,
        host: Host,
        config: Config,
        journal: Journal,
        arbiter: Arbiter,
        rested: Callable[[], None],
    ) -> None:
        super().__init__(gpu, facts, host=host, config=config, journal=journal, arbiter=arbiter, changed=self._tell)
        self.patience = 0.0
        self._rested = rested
        self._retired = ""
        """Why nothing new begins here."""
        self._engine: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._resting = asyncio.Event()
        self._resting.set()

    # A switch -------------------------------------------------------------------------------------------------------

    def _start(self, switch: Switch, plan: Plan, preparation: Preparation) -> None:
        """Begin this switch.

        Raises:
            Failed: the journal cannot be written; nothing was changed.
        """
        owed_before = self._owed
        self._begin_journal(switch, plan.owed)
        self._set_out(switch)
        self._engine = self._new_engine(plan.steps, held=preparation.holds)
        self.patience = 2 * self._engine.longest
        self._task = asyncio.create_task(self._run(switch, self._engine, plan, owed_before))

    async def _run(self, switch: Switch, engine: Engine, plan: Plan, owed_before: Owed) -> None:
        """One switch from its first step to a state of rest."""
        result, reason = Result.DONE, ""
        reached: Plan | None = plan
        try:
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
            result, reason = self._settle(result, reason, reached, owed_before)
        except StoppedError as word:
            result, reason = Result.FAILED, _left(word)
        finally:
            self._rest()
        self._over(switch, result, reason)

    async def _taken_back(
        self, engine: Engine, switch: Switch, result: Result, reason: str
    ) -> tuple[Result, str, Plan | None]:
        """The way back; where that fails too, any other to a known-good state. The plan is the one that led there."""
        failed = await self._go_back(engine)
        if failed is None:
            return result, reason, None
        switch.recovery = True
        reason = "; ".join(filter(None, (reason, f"the way back failed too: {failed}")))
        if self._at_rest or engine.hung:
            return Result.FAILED, reason, None
        return await self._climb(switch, after_failure(switch.target, self._rules), reason)

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

    # A recovery -----------------------------------------------------------------------------------------------------

    def _start_recovery(self, switch: Switch, why: str, *, starting: bool) -> None:
        """Begin to look for a known-good state; `why` there is a need to."""
        try:
            self._begin_journal(switch, self._owed)
        except Failed as error:
            # No reason to leave it where it is.
            _log.error("%s", error)
        self._set_out(switch, "recover")
        self.patience = 2 * max(self._deadlines.values())
        self._task = asyncio.create_task(self._recover(switch, why, starting=starting))

    async def _recover(self, switch: Switch, why: str, *, starting: bool) -> None:
        try:
            await self._take_turn(None)
            result, reason, reached = await self._climb(switch, after_crash(self._rules), why, starting=starting)
            result, reason = self._settle(result, reason, reached, self._owed)
        except StoppedError as word:
            result, reason = Result.FAILED, _left(word)
        finally:
            self._rest()
        self._over(switch, result, reason)

    def _resumed(self, left: Unfinished) -> tuple[Switch, str]:
        """The switch that a dead service left unfinished, and why there is a need to recover."""
        where = f"at step {left.index} of {left.count}, '{left.title}'" if left.index else "before its first step"
        taken_back = ", as it was being taken back" if left.back else ""
        why = f"the service ended {where}{taken_back}"
        _log.warning("%s: switch %s to %s is unfinished: %s", self.gpu.address, left.id, left.target, why)
        return Switch.resumed(left.id, left.target, left.asker, left.started), why

    async def _outlast(self, engine: Engine) -> None:
        """The way from `wedged` to a state of rest where no switch of this run of the service had begun."""
        left, switch, reached = self._entry.unfinished, None, None
        try:
            await self._returned()
            reason = await self._go_back(engine) or ""
            result = Result.FAILED if reason else Result.REVERTED
            if left is not None:
                switch, why = self._resumed(left)
                self._make_current(switch)
                result, reason, reached = await self._climb(switch, after_crash(self._rules), why)
            result, reason = self._settle(result, reason, reached, self._owed)
        except StoppedError as word:
            result, reason = Result.FAILED, _left(word)
        finally:
            self._rest()
        if switch is not None:
            self._over(switch, result, reason)
        else:
            self._tell()
            self._rested()
        await self.pay()

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
                return (*summary(switch.target, plan.target, story), plan)
        return Result.FAILED, "; ".join(filter(None, story)), None

    async def _tried(self, rung: Rung, switch: Switch, *, starting: bool) -> Plan:
        """One rung of the ladder, to its end; raises as `_led`."""
        if rung.rough is not None:
            await self._led(rung, switch, rung.rough(self.gpu, self._host.look()), starting=starting)
        return await self._led(rung, switch, None, starting=starting)

    async def _led(self, rung: Rung, switch: Switch, rough: Sequence[Step] | None, *, starting: bool) -> Plan:
        """What is rough about a rung, or its way to a known-good state.

        Raises:
            GpuswitchError, StepError: it led nowhere, and what it began is taken back, as far as that went.
        """
        engine = self._new_engine(())
        try:
            self.facts = self._host.look()
            preparation = self._preparation_in(State.UNKNOWN, switch.options, starting=starting)
            try:
                plan = await self._planned(preparation, rung.target, rough=rough)
            except (GpuswitchError, StuckError):
                engine = self._new_engine(tuple(preparation.holds), begun=True)
                raise
            self._keep_if_possible(replace(self._entry, owed=plan.owed))
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
            if worse := await self._go_back(engine):
                words += f"; the way back failed too: {worse}"
            raise (HungError if engine.hung else kind)(words) from failure
        return plan

    def _preparation_in(self, state: State, options: Options, *, starting: bool) -> Preparation:
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
        )

    async def _planned(
        self, preparation: Preparation, target: State, *, to_begin: bool = True, rough: Sequence[Step] | None = None
    ) -> Plan:
        """What `Preparation.plan` says, or `plan_rough`.

        Raises:
            GpuswitchError: refused, or the kernel said no; nothing was changed.
            StuckError: the kernel did not return.
        """
        deadline = self.config.deadlines.capture
        try:
            if rough is not None:
                return await preparation.plan_rough(rough)
            return await preparation.plan(target, to_begin=to_begin)
        except TimeoutError:
            if (pending := self._kernel.pending) is not None:
                raise StuckError(pending, deadline) from None
            raise Failed(f"{self.gpu.address} did not answer within {deadline:g} s; nothing was changed") from None
        except KernelError as error:
            raise Failed(f"{error}; nothing was changed") from error

    # Turns ----------------------------------------------------------------------------------------------------------

    async def _take_turn(self, deadline: float | None) -> None:
        """Where this switch may unload modules that other GPUs use: who is the last one is not to change meanwhile."""
        driver = self.host_driver
        if driver is None or not moves_in_turns(driver, self._rules.module_policy):
            return

        def staying() -> set[PciAddress]:
            functions = self._host.look().functions
            return {a for a, f in functions.items() if f.driver_name == driver and a not in self.gpu.functions}

        try:
            async with asyncio.timeout(deadline):
                await self._arbiter.take_turn(self.gpu, driver, staying)
        except TimeoutError:
            others = ", ".join(map(str, self._arbiter.moving(driver)))
            raise InProgress(f"{self.gpu.address} cannot be switched while {others} is: both are on {driver}") from None

    # A kernel that does not return ------------------------------------------------------------------------------------

    async def _outlasted(self, stuck: StuckError) -> None:
        """Say that it is wedged, and go on if ever the kernel returns."""
        self._wedge(stuck)
        await self._returned()

    def _wedge(self, stuck: StuckError) -> None:
        """The kernel has not returned: say so, and write nothing more."""
        self._say_stuck(stuck, self._engine.numbers if self._engine else ())
        if self.switch is not None and self.switch.result is None:
            self._end(self.switch, Result.WEDGED, str(stuck))
        # The others of its driver need not wait for a turn, but nobody may unload what the kernel is in.
        self._arbiter.stuck[self.gpu.address] = self.host_driver or ""
        self._arbiter.end_turn(self.gpu.address)
        self._resting.set()
        self._tell()

    async def _returned(self) -> None:
        await self._kernel.returned()
        if self._explaining is not None:
            self._explaining.cancel()
        self._resting.clear()
        self._arbiter.stuck.pop(self.gpu.address, None)
        await self._take_turn(None)
        self._keep_if_possible(replace(self._entry, stuck=None))
        self._fire("unstuck")
        self.facts = self._own_look()
        self.reason = ""
        self._tell()

    # Around it ------------------------------------------------------------------------------------------------------

    def _make_current(self, switch: Switch) -> None:
        self.switch = switch
        self.recent.append(switch)

    def _set_out(self, switch: Switch, trigger: str = "") -> None:
        self._make_current(switch)
        self.reason = ""
        self._resting.clear()
        self._fire_start(switch.target, trigger)
        self._tell()

    def _new_engine(self, steps: tuple[Step, ...], *, begun: bool = False, held: Collection[Step] = ()) -> Engine:
        hands = Hands(self.gpu.address, self._host, self._kernel, self._arbiter, self._owe, owned=lambda: self.owned)
        return Engine(hands, steps, self._deadlines, self._stepped, self._intend, begun=begun, held=held)

    @property
    def _deadlines(self) -> dict[str, float]:
        return self.config.deadlines.model_dump()

    def _rest(self) -> None:
        self._engine = self._task = None
        self._arbiter.end_turn(self.gpu.address)
        self._resting.set()

    def _over(self, switch: Switch, result: Result, reason: str) -> None:
        """It is at rest: tell everybody."""
        if switch.result is None:
            self._end(switch, result, reason)
        self._tell()
        if switch.recovery and self.state in OUTCOMES:
            self._tell_recovered(OUTCOMES[self.state])
        self._rested()

    def _stepped(self, event: StepEvent) -> None:
        self.progress = asyncio.get_running_loop().time()
        if self.switch is not None and self.switch.result is None:
            self.switch.at(event)
            self._tell_step(self.switch, event)

    def _end(self, switch: Switch, result: Result, reason: str) -> None:
        switch.finish(result, reason)
        self._tell_end(switch)

    @abstractmethod
    async def pay(self) -> None:
        """Give back what the start of the service could not wait for: units."""

    @abstractmethod
    def _tell(self) -> None: ...

    @abstractmethod
    def _tell_step(self, switch: Switch, event: StepEvent) -> None: ...

    @abstractmethod
    def _tell_end(self, switch: Switch) -> None: ...

    @abstractmethod
    def _tell_recovered(self, outcome: str) -> None: ...


def _left(word: StoppedError) -> str:
    return f"{word}: it is left as it is, and recovered when the service starts again"
