"""The actor: one per GPU. It owns the GPU's state machine and its one switch at a time; nobody else moves either."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from gpuswitch.config import Config
from gpuswitch.errors import Failed, GpuswitchError, InProgress, KernelError, Wedged
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Engine, StepEvent, StoppedError, StuckError
from gpuswitch.switch.host import Host
from gpuswitch.switch.journal import Journal
from gpuswitch.switch.machine import SEEN, SETTLE, START, GpuMachine
from gpuswitch.switch.observe import explain, observe
from gpuswitch.switch.plan import Baseline, Plan
from gpuswitch.switch.prepare import Preparation
from gpuswitch.switch.record import Result, Switch
from gpuswitch.switch.steps import Hands, Step, StepError

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who hears of what happens to GPUs. Called on the event loop, in order; must return at once and not raise."""

    def appeared(self, actor: Actor) -> None: ...
    def vanished(self, actor: Actor) -> None: ...
    def changed(self, actor: Actor) -> None: ...
    def stepped(self, actor: Actor, switch: Switch, event: StepEvent) -> None: ...
    def finished(self, actor: Actor, switch: Switch) -> None: ...


class Actor:
    """One GPU: what it is (`gpu`, `facts`), where it is (`state`, `reason`, `since`), and its last `switch`.

    `facts` is the last look; `reason` says why the GPU is where it is, when that is not where somebody wanted it;
    `since` is when it came there, in seconds since the epoch. `recent` are its last switches, `switch` the last one;
    `progress` is when anything last happened here, on the loop's clock; at work, `patience` seconds without are a
    fault. `rested` is called whenever a switch is over: looks taken meanwhile went unheeded.
    """

    def __init__(
        self,
        gpu: Gpu,
        facts: HostFacts,
        *,
        host: Host,
        config: Config,
        journal: Journal,
        observer: Observer,
        rested: Callable[[], None],
    ) -> None:
        self.gpu = gpu
        self.facts = facts
        self.config = config
        self.reason = ""
        self.since = time.time()
        self.switch: Switch | None = None
        self.recent: deque[Switch] = deque(maxlen=16)
        self.progress = asyncio.get_running_loop().time()
        self.patience = 0.0
        self._host = host
        self._kernel = host.kernel(str(gpu.address))
        self._journal = journal
        self._observer = observer
        self._rested = rested
        self._machine = GpuMachine()
        self._owed = journal.load(gpu.address)
        self._deciding = asyncio.Lock()
        self._retired = ""
        self._engine: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._resting = asyncio.Event()
        self._resting.set()
        self._take_in(facts, gpu)

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def bound(self) -> bool:
        """Its functions are its own until it is home: they are under way, or are owed something."""
        return self._task is not None or self._deciding.locked() or bool(self._owed)

    @property
    def host_driver(self) -> str | None:
        """The driver of the display function at home, None where it has none or nobody knows it yet."""
        display = self.facts.functions.get(self.gpu.address)
        if self._owed and (captured := self._owed.get(self.gpu.address)):
            return captured.driver.name if captured.driver else None
        if display is not None and not display.on_vfio:
            return display.driver_name
        return self.config.gpu(self.gpu.address).host_driver or None

    # What others see and ask ----------------------------------------------------------------------------------------

    def see(self, facts: HostFacts, gpu: Gpu | None = None) -> None:
        """Take in a look at the host. Nothing follows from it while a switch runs or the kernel has not returned."""
        if self._task is not None:
            return
        known = (self.gpu, self.gpu.present(self.facts), self.state)
        self._take_in(facts, gpu or self.gpu)
        if known != (self.gpu, self.gpu.present(facts), self.state):
            self._observer.changed(self)

    def _take_in(self, facts: HostFacts, gpu: Gpu) -> None:
        moved = explain(gpu, facts) != explain(self.gpu, self.facts)
        self.facts, self.gpu = facts, gpu
        seen = observe(gpu, facts, self._owed)
        if seen is not self.state and self._machine.can(SEEN[seen]):
            self._fire(SEEN[seen])
            self.reason = ""
        if self.state is State.UNKNOWN and (moved or not self.reason):
            self.reason = explain(gpu, facts)
        if not gpu.present(facts):
            # The overrides and power settings that we owed went with the device.
            self._forget_debts()

    async def plan(self, target: State) -> Plan:
        """The plan of a switch to `target`, without steps where it is there; or the refusal with all blockers.

        Changes nothing.
        """
        async with self._deciding:
            preparation = self._preparation()
            if self._is_at(target):
                return Plan(self.gpu, target, self._owed or {}, ())
            return await self._prepared(preparation, target, to_begin=False)

    async def request(self, target: State) -> Switch:
        """Start a switch to State.VFIO or State.HOST, or join the one that goes there already.

        Where the GPU is there already, the switch that comes back is finished and had no steps.

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
            preparation = self._preparation()
            if self._is_at(target):
                there = self._new_switch(target, 0)
                self._end(there, Result.DONE, "")
                return there
            plan = await self._prepared(preparation, target)
            try:
                return self._start(plan, preparation)
            except GpuswitchError:
                await self._let_go(preparation)
                raise

    async def adopt(self) -> None:
        """Bring home what a dead daemon left half-way. A GPU at rest is left alone."""
        self.see(self._host.look())
        if not self._owed or self.state is State.VFIO:
            return
        _log.warning("%s is neither home nor on vfio-pci: bringing it back to the host", self.gpu.address)
        try:
            switch = await self.request(State.HOST)
            await switch.wait()
        except Wedged:
            return
        except GpuswitchError as error:
            self.reason = f"cannot bring {self.gpu.address} back to the host: {error}"
            self._observer.changed(self)

    def retire(self, reason: str) -> None:
        """No switch begins from here on."""
        self._retired = reason

    async def stop(self, reason: str) -> None:
        """The service stops: a running switch ends its step and reverts. What the kernel has is left to it."""
        self.retire(reason)
        async with self._deciding:
            if self._engine is not None:
                self._engine.stop(reason)
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

    def _preparation(self) -> Preparation:
        self._refuse_retired()
        self.see(self._host.look())
        config = self.config.gpu(self.gpu.address)
        return Preparation(self.gpu, self.state, self.facts, self._owed or {}, config, self._kernel)

    async def _prepared(self, preparation: Preparation, target: State, *, to_begin: bool = True) -> Plan:
        deadline = self.config.deadlines.capture
        try:
            async with asyncio.timeout(deadline):
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
        try:
            await self._new_engine(tuple(preparation.holds), begun=True).back()
        except StepError as error:
            _log.warning("%s", error)
        except StuckError as stuck:
            self._await_kernel(stuck, preparation)

    def _await_kernel(self, stuck: StuckError, preparation: Preparation) -> None:
        """The kernel has not returned, and no switch had begun: give back what is held if ever it does."""
        self._wedge(stuck)
        self._task = asyncio.create_task(self._outlast(self._new_engine(tuple(preparation.holds), begun=True)))

    # Running --------------------------------------------------------------------------------------------------------

    def _start(self, plan: Plan, preparation: Preparation) -> Switch:
        self._refuse_retired()
        # The way home depends on nobody else's functions.
        self.see(self._host.look() if plan.target is State.VFIO else self._own_look())
        if not preparation.holds_true(self.gpu, self.state, self.facts, self._owed or {}):
            raise Failed(f"somebody else moved {self.gpu.address} at the same moment; nothing was changed; try again")
        self._journal.save(self.gpu.address, plan.owed)
        owed_before, self._owed = self._owed, plan.owed
        switch = self._new_switch(plan.target, len(plan.steps))
        self.reason = ""
        self._resting.clear()
        self._fire("recover" if self.state is State.FAILED else START[plan.target])
        self._observer.changed(self)
        self._engine = self._new_engine(plan.steps)
        self._task = asyncio.create_task(self._run(switch, self._engine, owed_before))
        return switch

    def _new_switch(self, target: State, steps: int) -> Switch:
        self.switch = Switch(target, steps)
        self.recent.append(self.switch)
        return self.switch

    def _new_engine(self, steps: tuple[Step, ...], *, begun: bool = False) -> Engine:
        hands = Hands(self._host, self._kernel)
        deadlines: dict[str, float] = self.config.deadlines.model_dump()
        self.patience = 2 * max(deadlines.values())
        return Engine(hands, steps, deadlines, self._stepped, begun=begun)

    async def _run(self, switch: Switch, engine: Engine, owed_before: Baseline | None) -> None:
        """One switch from its first step to a state of rest."""
        result, reason = Result.DONE, ""
        try:
            try:
                await engine.forward()
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
            result, reason = self._settle(result, reason, switch.target, owed_before)
        finally:
            self._rest()
        if switch.result is None:
            self._end(switch, result, reason)
        self._observer.changed(self)
        self._rested()

    async def _outlast(self, engine: Engine) -> None:
        """The way from `wedged` to a state of rest where no switch had begun."""
        try:
            await self._returned()
            result, reason = await self._go_back(engine, Result.REVERTED, "")
            self._settle(result, reason, None, self._owed)
        finally:
            self._rest()
        self._observer.changed(self)
        self._rested()
        # It was wedged when the service started, so nothing has brought it home yet.
        await self.adopt()

    def _rest(self) -> None:
        self._engine = self._task = None
        self._resting.set()

    async def _go_back(self, engine: Engine, result: Result, reason: str) -> tuple[Result, str]:
        if self.state is not State.RECOVERING:
            self._fire("fault")
            self._observer.changed(self)
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
        self._fire("stuck")
        self.facts = self._own_look()
        self.reason = f"{stuck}; nothing more is written to {self.gpu.address} until it does"
        if self.switch is not None and self.switch.result is None:
            self._end(self.switch, Result.WEDGED, str(stuck))
        self._resting.set()
        self._observer.changed(self)

    async def _returned(self) -> None:
        """Go on if ever the kernel returns."""
        await self._kernel.returned()
        self._resting.clear()
        self._fire("unstuck")
        self.facts = self._own_look()
        self.reason = ""
        self._observer.changed(self)

    def _settle(
        self, result: Result, reason: str, target: State | None, owed_before: Baseline | None
    ) -> tuple[Result, str]:
        """Enter the state that a fresh look shows; what is owed is forgotten once all of it was given back."""
        self.facts = self._own_look()
        seen = observe(self.gpu, self.facts, self._owed)
        if result is Result.DONE and seen is not target:
            result, reason = Result.FAILED, f"somebody else moved it meanwhile: {explain(self.gpu, self.facts)}"
        if seen is State.ABSENT:
            self._fire("seen_gone")
        else:
            if (self.state, seen) not in SETTLE:
                self._fire("fault")
            self._fire(SETTLE[self.state, seen])
        home = result is Result.DONE and target is State.HOST
        as_before = result in {Result.REVERTED, Result.CANCELLED} and not owed_before
        if home or as_before or not self.gpu.present(self.facts):
            self._forget_debts()
        self.reason = reason or (explain(self.gpu, self.facts) if self.state is State.FAILED else "")
        return result, reason

    def _own_look(self) -> HostFacts:
        return self.facts.renewed(self._host.look(self.gpu.functions), self.gpu.functions)

    def _forget_debts(self) -> None:
        if self._owed is not None:
            self._owed = None
            self._journal.drop(self.gpu.address)

    # Telling --------------------------------------------------------------------------------------------------------

    def _stepped(self, event: StepEvent) -> None:
        self.progress = asyncio.get_running_loop().time()
        if self.switch is not None and self.switch.result is None:
            self.switch.at(event)
            self._observer.stepped(self, self.switch, event)

    def _end(self, switch: Switch, result: Result, reason: str) -> None:
        switch.finish(result, reason)
        self._observer.finished(self, switch)

    def _fire(self, trigger: str) -> None:
        self._machine.fire(trigger)
        self.since = time.time()
        self.progress = asyncio.get_running_loop().time()
