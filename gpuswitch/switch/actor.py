"""The actor: one per GPU. It owns the GPU's state machine and its one switch at a time; nobody else moves either."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from gpuswitch.config import Config
from gpuswitch.errors import Failed, GpuswitchError, InProgress, KernelError, Wedged
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.cancelling import cancellable
from gpuswitch.switch.engine import Engine, StepEvent, StoppedError, StuckError
from gpuswitch.switch.host import Host
from gpuswitch.switch.journal import Journal
from gpuswitch.switch.machine import START
from gpuswitch.switch.needs import moves_in_turns
from gpuswitch.switch.observer import Observer
from gpuswitch.switch.owed import Owed
from gpuswitch.switch.plan import Plan
from gpuswitch.switch.prepare import Preparation
from gpuswitch.switch.record import THE_SERVICE, Asker, Result, Switch
from gpuswitch.switch.standing import Standing
from gpuswitch.switch.step import Hands, Step, StepError

_log = logging.getLogger(__name__)
_AS_CONFIGURED = Options()
_TURN_SECONDS = 10.0
"""Plenty for another GPU's switch, unless that waits for somebody."""


class Actor(Standing):
    """One GPU that can be asked to move.

    At work, `patience` seconds without `progress` are a fault. `rested` is called whenever a switch is over: looks
    taken meanwhile went unheeded.
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
        observer: Observer,
        rested: Callable[[], None],
    ) -> None:
        self._observer = observer
        super().__init__(gpu, facts, host=host, config=config, journal=journal, arbiter=arbiter, changed=self._tell)
        self.patience = 0.0
        self._rested = rested
        self._deciding = asyncio.Lock()
        self._retired = ""
        self._engine: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._resting = asyncio.Event()
        self._resting.set()

    @property
    def bound(self) -> bool:
        """Its functions are its own until it is home: they are under way, or are owed something."""
        return self._task is not None or self._deciding.locked() or bool(self._owed)

    # What others see and ask ----------------------------------------------------------------------------------------

    def see(self, facts: HostFacts, gpu: Gpu | None = None) -> None:
        """Take in a look at the host. Nothing follows from it while a switch runs or the kernel has not returned."""
        if self._task is not None:
            return
        known = (self.gpu, self.gpu.present(self.facts), self.state)
        self._take_in(facts, gpu or self.gpu)
        if known != (self.gpu, self.gpu.present(facts), self.state):
            self._tell()

    async def plan(self, target: State, options: Options = _AS_CONFIGURED) -> Plan:
        """The plan of a switch to `target`, without steps where it is there; or the refusal with all blockers.

        Changes nothing.
        """
        async with self._deciding:
            preparation = self._preparation(options)
            if self._is_at(target):
                return Plan(self.gpu, target, self._owed, ())
            return await self._prepared(preparation, target, to_begin=False)

    async def request(
        self, target: State, options: Options = _AS_CONFIGURED, asker: Asker = THE_SERVICE, *, starting: bool = False
    ) -> Switch:
        """Start a switch to State.VFIO or State.HOST, or join the one that goes there already.

        Where the GPU is there already, the switch that comes back is finished and had no steps. `starting`: the
        service is, and waits for no systemd job.

        Raises:
            GpuswitchError: refused, with every reason; nothing was changed.
        """
        async with self._deciding:
            if self.state.moving and self.switch is not None and self.switch.result is None:
                if self.switch.target is target:
                    return self.switch
                raise InProgress(
                    f"{self.gpu.address} cannot go to {target} while it is on its way to {self.switch.target} "
                    f"(switch {self.switch.id}): wait for that first"
                )
            if self._task is None:
                await self._take_turn(None if starting else _TURN_SECONDS)
            try:
                preparation = self._preparation(options, starting=starting)
                if not self._is_at(target):
                    return await self._begun(preparation, target, asker)
            finally:
                if self._task is None:
                    self._arbiter.end_turn(self.gpu.address)
            there = self._new_switch(target, 0, options, asker)
            self._end(there, Result.DONE, "")
            return there

    def cancel(self, id: str, asker: Asker) -> None:  # noqa: A002 -- as on the bus
        """Take the running switch of this id back, once the step that runs is over; `result` says what came of it.

        Raises:
            GpuswitchError: it cannot be taken back, or not any more, and goes on.
        """
        engine = cancellable(self.gpu.address, self.state, self.known_switch(id), self._engine)
        engine.stop(f"cancelled by {asker}")

    async def adopt(self) -> None:
        """Take up what a dead daemon left: find what the kernel still has, bring home what is half-way.

        A GPU at rest is left alone.
        """
        self.see(self._host.look())
        if self._left_stuck is not None and self._kernel.adopt(self._left_stuck):
            self._wedge(StuckError(self._kernel.pending or self._left_stuck, None))
            self._task = asyncio.create_task(self._outlast(self._new_engine(())))
            return
        if not self._owed.functions or self.state is State.VFIO:
            return
        _log.warning("%s is neither home nor on vfio-pci: bringing it back to the host", self.gpu.address)
        await self._bring_home(starting=True)

    async def pay(self) -> None:
        """Give back what the start of the service could not wait for: units."""
        if self._owed and self.state is State.HOST:
            await self._bring_home(starting=False)
        elif self.state is State.ABSENT and self.owes_units:
            await self._start_units()
        elif self._task is None:
            # A switch that was cut short left it behind, and nothing of ours needs it.
            await self._arbiter.give_back(self.gpu.address, (), self.config.deadlines)

    async def _bring_home(self, *, starting: bool) -> None:
        try:
            switch = await self.request(State.HOST, starting=starting)
            await switch.wait()
        except Wedged:
            return
        except GpuswitchError as error:
            self.reason = f"cannot bring {self.gpu.address} back to the host: {error}"
            self._tell()

    def retire(self, reason: str) -> None:
        """No switch begins from here on."""
        self._retired = reason

    async def stop(self, reason: str) -> None:
        """The service stops: a running switch ends its step and reverts. What the kernel has is left to it."""
        self.retire(reason)
        async with self._deciding:
            if self._engine is not None:
                self._engine.stop(reason, leaving=True)
        while self._task is not None and self.state is not State.WEDGED:
            await self._resting.wait()
        if self._task is not None:
            self._task.cancel()

    # Deciding -------------------------------------------------------------------------------------------------------

    def _is_at(self, target: State) -> bool:
        # On its host drivers, and what was changed besides is still to be undone: not home yet.
        return self.state is target and not (target is State.HOST and self._owed)

    def _refuse_retired(self) -> None:
        if self._retired:
            raise Failed(f"cannot switch {self.gpu.address}: {self._retired}")

    async def _take_turn(self, deadline: float | None) -> None:
        """Where this switch may unload modules that other GPUs use: who is the last one is not to change meanwhile."""
        driver = self.host_driver
        policy = self.config.gpu(self.gpu.address).rules.module_policy
        if driver is None or self._retired or not moves_in_turns(driver, policy):
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

    def _preparation(self, options: Options, *, starting: bool = False) -> Preparation:
        self._refuse_retired()
        self.see(self._host.look())
        return Preparation(
            self.gpu, self.state, self.facts, self._owed, self.config, options, self._host, self._arbiter, starting
        )

    async def _begun(self, preparation: Preparation, target: State, asker: Asker) -> Switch:
        plan = await self._prepared(preparation, target)
        try:
            return self._start(plan, preparation, asker)
        except GpuswitchError:
            await self._let_go(preparation)
            raise

    async def _prepared(self, preparation: Preparation, target: State, *, to_begin: bool = True) -> Plan:
        deadline = self.config.deadlines.capture
        try:
            return await preparation.plan(target, to_begin=to_begin)
        except TimeoutError:
            if (pending := self._kernel.pending) is not None:
                stuck = StuckError(pending, deadline)
                self._await_kernel(stuck, preparation)
                raise Wedged(str(stuck)) from None
            await self._let_go(preparation)
            raise Failed(f"{self.gpu.address} did not answer within {deadline:g} s; nothing was changed") from None
        except KernelError as error:
            await self._let_go(preparation)
            raise Failed(f"{error}; nothing was changed") from error
        except GpuswitchError:
            await self._let_go(preparation)
            raise

    async def _let_go(self, preparation: Preparation) -> None:
        """No switch follows from it: give back what it holds."""
        if not preparation.holds:
            return
        try:
            await self._new_engine(tuple(preparation.holds), begun=True).back()
        except StepError as error:
            _log.warning("%s", error)
        except StuckError as stuck:
            self._await_kernel(stuck, preparation)

    def _await_kernel(self, stuck: StuckError, preparation: Preparation) -> None:
        """The kernel has not returned, and no switch had begun: give back what is held if ever it does."""
        self._wedge(stuck)
        engine = self._new_engine(tuple(preparation.holds), begun=True)
        self.patience = 2 * engine.longest
        self._task = asyncio.create_task(self._outlast(engine))

    # Running --------------------------------------------------------------------------------------------------------

    def _start(self, plan: Plan, preparation: Preparation, asker: Asker) -> Switch:
        self._refuse_retired()
        # The way home depends on nobody else's functions.
        self.see(self._host.look() if plan.target is State.VFIO else self._own_look())
        if not preparation.holds_true(self.gpu, self.state, self.facts, self._owed):
            raise Failed(f"somebody else moved {self.gpu.address} at the same moment; nothing was changed; try again")
        owed_before = self._owed
        self._owe(plan.owed)
        switch = self._new_switch(plan.target, len(plan.steps), preparation.options, asker)
        self.reason = ""
        self._resting.clear()
        self._fire("recover" if self.state is State.FAILED else START[plan.target])
        self._tell()
        self._engine = self._new_engine(plan.steps, held=preparation.holds)
        self.patience = 2 * self._engine.longest
        self._task = asyncio.create_task(self._run(switch, self._engine, plan, owed_before))
        return switch

    def _new_engine(self, steps: tuple[Step, ...], *, begun: bool = False, held: Collection[Step] = ()) -> Engine:
        hands = Hands(self.gpu.address, self._host, self._kernel, self._arbiter, self._owe_unit)
        return Engine(hands, steps, self.config.deadlines.model_dump(), self._stepped, begun=begun, held=held)

    async def _run(self, switch: Switch, engine: Engine, plan: Plan, owed_before: Owed) -> None:
        """One switch from its first step to a state of rest."""
        result, reason = Result.DONE, ""
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
                self._wedge(stuck)
                await self._returned()
            if result is not Result.DONE:
                result, reason = await self._go_back(engine, result, reason)
            result, reason = self._settle(result, reason, plan, owed_before)
        finally:
            self._rest()
        if switch.result is None:
            self._end(switch, result, reason)
        self._tell()
        self._rested()

    async def _outlast(self, engine: Engine) -> None:
        """The way from `wedged` to a state of rest where no switch had begun."""
        try:
            await self._returned()
            result, reason = await self._go_back(engine, Result.REVERTED, "")
            self._settle(result, reason, None, self._owed)
        finally:
            self._rest()
        self._tell()
        self._rested()
        # It was wedged when the service started, so nothing has brought it home yet.
        self._left_stuck = None
        await self.adopt()
        await self.pay()

    def _rest(self) -> None:
        self._engine = self._task = None
        self._arbiter.end_turn(self.gpu.address)
        self._resting.set()

    async def _go_back(self, engine: Engine, result: Result, reason: str) -> tuple[Result, str]:
        if self.state is not State.RECOVERING:
            self._fire("fault")
            self._tell()
        while True:
            try:
                await engine.back()
            except StepError as worse:
                return Result.FAILED, "; ".join(filter(None, (reason, f"the way back failed too: {worse}")))
            except StuckError as stuck:
                self._wedge(stuck)
                await self._returned()
            else:
                return result, reason

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
        """Go on if ever the kernel returns."""
        await self._kernel.returned()
        if self._explaining is not None:
            self._explaining.cancel()
        self._resting.clear()
        self._arbiter.stuck.pop(self.gpu.address, None)
        await self._take_turn(None)
        self._owe_at_last(self._owed)
        self._fire("unstuck")
        self.facts = self._own_look()
        self.reason = ""
        self._tell()

    def _tell(self) -> None:
        self._observer.changed(self)

    def _stepped(self, event: StepEvent) -> None:
        self.progress = asyncio.get_running_loop().time()
        if self.switch is not None and self.switch.result is None:
            self.switch.at(event)
            self._observer.stepped(self, self.switch, event)

    def _end(self, switch: Switch, result: Result, reason: str) -> None:
        switch.finish(result, reason)
        self._observer.finished(self, switch)
