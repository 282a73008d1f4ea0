"""The actor: one per GPU. It owns the GPU's state machine and its one switch at a time; nobody else moves either."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import replace

from gpuswitch.config import Config
from gpuswitch.errors import Failed, GpuswitchError, InProgress, InvalidArgument, NotViable, Owned, Wedged
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.cancelling import cancellable
from gpuswitch.switch.engine import StepEvent, StuckError
from gpuswitch.switch.guards import blockers, refusal
from gpuswitch.switch.host import Host
from gpuswitch.switch.journal import Journal
from gpuswitch.switch.looking import seen, seen_within
from gpuswitch.switch.needs import boot_framebuffers
from gpuswitch.switch.observe import place, whereabouts
from gpuswitch.switch.observer import Observer
from gpuswitch.switch.plan import Plan
from gpuswitch.switch.prepare import Preparation
from gpuswitch.switch.record import THE_SERVICE, Asker, Drift, Result, Switch
from gpuswitch.switch.running import Running
from gpuswitch.switch.step import StepError

_log = logging.getLogger(__name__)
_AS_CONFIGURED = Options()
_TURN_SECONDS = 10.0
"""Plenty for another GPU's switch, unless that waits for somebody."""


class Actor(Running):
    """One GPU that can be asked to move."""

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
        super().__init__(gpu, facts, host=host, config=config, journal=journal, arbiter=arbiter, rested=rested)
        self._deciding = asyncio.Lock()
        self._planning = asyncio.Lock()

    @property
    def bound(self) -> bool:
        """Its functions are its own until it is home: they are under way, or are owed something."""
        return self.busy or bool(self._owed) or self.owned

    @property
    def busy(self) -> bool:
        """It is under way, or may be in a moment."""
        return self._task is not None or self._deciding.locked()

    # What others see and ask ----------------------------------------------------------------------------------------

    def see(self, facts: HostFacts, gpu: Gpu | None = None) -> Drift | None:
        """Take in a look at the host; what somebody else did to this GPU since the last one.

        Nothing follows from it while a switch runs or the kernel has not returned.
        """
        if self._task is not None:
            return None
        known = (self.gpu, self.gpu.present(self.facts), self.state)
        drift = self._take_in(facts, gpu or self.gpu)
        if known != (self.gpu, self.gpu.present(facts), self.state):
            self._tell()
        if drift is not None:
            self._observer.drifted(self, drift)
        return drift

    async def plan(self, target: State, options: Options = _AS_CONFIGURED) -> Plan:
        """The plan of a switch to `target`, without steps where nothing is to do; or the refusal with all blockers.

        Changes nothing.
        """
        # Anyone may ask, and many: those who want to switch stand in another line.
        async with self._planning, self._deciding:
            self._refuse_retired()
            preparation = await self._preparation(options, asking=True)
            self._refuse_owned(target)
            if self._is_at(target):
                self._refuse_unusable(target)
                return Plan(self.gpu, target, self._owed, ())
            return await self._planned(preparation, target)

    async def request(self, target: State, options: Options = _AS_CONFIGURED, asker: Asker = THE_SERVICE) -> Switch:
        """Start a switch to State.VFIO or State.HOST, or join the one that goes there already.

        One that goes there with other options than were asked for is not joined. Where the GPU is there already, the
        switch that comes back is finished and had no steps.

        Raises:
            GpuswitchError: refused, with every reason; nothing was changed.
        """
        async with self._deciding:
            self._refuse_retired()
            if self.state.moving and self.switch is not None and self.switch.result is None:
                if self.switch.target is target:
                    return self._joined(self.switch, options)
                raise InProgress(
                    f"{self.gpu.address} cannot go to {target} while it is on its way to {self.switch.target} "
                    f"(switch {self.switch.id}): wait for that first"
                )
            if self._task is None:
                await self._take_turn(_TURN_SECONDS)
            try:
                preparation = await self._preparation(options, machine=asker.vm if asker.service else "")
                self._refuse_owned(target)
                if not self._is_at(target):
                    return await self._begun(preparation, target, asker)
                self._refuse_unusable(target)
                if target is State.VFIO:
                    self.let_stay()
                    self._rested()
            finally:
                if self._task is None:
                    self._arbiter.end_turn(self.gpu.address)
            return self._there(Switch(target, 0, options, asker))

    async def recover(self, options: Options = _AS_CONFIGURED, asker: Asker = THE_SERVICE) -> Switch:
        """Look for a known-good state: home, else vfio-pci, else by what the configuration allows besides.

        Where it is in one, the switch that comes back is finished and had no steps; a recovery that runs is joined.

        Raises:
            GpuswitchError: it is wedged, absent, or on its way; nothing was changed.
        """
        async with self._deciding:
            self._refuse_retired()
            self.see(await self._seen())
            if self.state.moving and self.switch is not None and self.switch.result is None:
                if self.switch.recovery:
                    return self._joined(self.switch, options)
                raise InProgress(f"{self.gpu.address} is on its way to {self.switch.target}: wait for that first")
            self._refuse_owned(State.HOST)
            if found := blockers(self.gpu, State.HOST, self.state, self.facts):
                raise refusal(found)
            if self.state.stable and not self.stays_out:
                return self._there(Switch(self.state, 0, options, asker))
            switch = Switch(State.HOST, 0, options, asker, recovery=True)
            self._start_recovery(switch, "", starting=False)
            return switch

    def cancel(self, id: str, asker: Asker) -> None:  # noqa: A002 -- as on the bus
        """Take the running switch of this id back, once the step that runs is over; `result` says what came of it.

        Raises:
            GpuswitchError: it cannot be taken back, or not any more, and goes on.
        """
        engine = cancellable(
            self.gpu.address, self.state, place(self.gpu, self._own_look_now()), self.known_switch(id), self._engine
        )
        engine.stop(f"cancelled by {asker}")

    async def adopt(self) -> None:
        """Take up what a dead service left: find what the kernel still has, and bring home what was under way.

        A GPU at rest is left alone, and so is one that somebody else moved meanwhile.
        """
        self.see(await seen(self._host))
        stuck = self._left_in_the_kernel(self._entry)
        if stuck is not None:
            self._wedge(StuckError(stuck, None))
            self._task = asyncio.create_task(self._outlast(self._new_engine(())))
            return
        self._keep_if_possible(replace(self._entry, stuck=None))
        if (left := self._entry.unfinished) is not None:
            switch, why = self._resumed(left)
            self._start_recovery(switch, why, starting=True)
            await switch.wait()
        elif self._owed.functions and self.state in {State.HOST, State.UNKNOWN, State.ABSENT}:
            text = f"{State.VFIO} → {self.state}: {whereabouts(self.gpu, self.facts)}, while the service was away"
            self._observer.drifted(self, Drift(State.VFIO, self.state, text, self.since))

    async def pay(self) -> None:
        if self._owed and self.state is State.HOST and not self.awaited:
            await self._bring_home()
        elif self.state is State.ABSENT and self.owes_units and not self.owned:
            await self._start_units()
        elif self._task is None and not self.owned:
            # A switch that was cut short left it behind, and nothing of ours needs it.
            await self._arbiter.give_back(self.gpu.address, (), self.config.deadlines)

    async def pay_at_start(self) -> None:
        """The same, once the service has started: now there are ways home that could not be gone before."""
        try:
            if self.stays_out and await self.try_again("the service has started"):
                return
        except GpuswitchError as error:
            _log.warning("%s", error)
        await self.pay()

    async def try_again(self, why: str) -> bool:
        """What did not come home is brought there once more; `why` that may work now. False: not now, says who refuses.

        Raises:
            NotViable, InvalidArgument: nor later.
        """
        _log.info("%s is to come home once more: %s", self.gpu.address, why)
        try:
            switch = await (self.recover() if self.state is State.FAILED else self.request(State.HOST))
        except (NotViable, InvalidArgument):
            raise
        except GpuswitchError as error:
            _log.warning("%s", error)
            return False
        await switch.wait()
        return True

    def own(self, owner: Owner | None, *, again: bool = False) -> None:
        super().own(owner, again=again)
        if self.stays_out:
            # Nobody has it any more, and somebody has to see to it.
            self._rested()

    async def _bring_home(self) -> None:
        try:
            switch = await self.request(State.HOST)
            await switch.wait()
        except Wedged:
            return
        except GpuswitchError as error:
            self.note(f"cannot bring {self.gpu.address} back to the host: {error}")

    def note(self, text: str) -> None:
        """Something that whoever looks at this GPU should know, beside why it is where it is; "" for no more of it."""
        self.noted = text
        self._tell()

    def retire(self, reason: str) -> None:
        """No switch begins from here on."""
        self._retired = reason

    def leave(self, reason: str) -> None:
        """It is nobody's any more."""
        self.retire(reason)
        self._page.close()

    async def stop(self, reason: str) -> None:
        """The service stops: a running switch ends its step and reverts. What the kernel has is left to it."""
        self.retire(reason)
        async with self._deciding:
            if self._engine is not None:
                self._engine.stop(reason, leaving=True)
        while self._task is not None and self.state is not State.WEDGED:
            await self._resting.wait()
        self._page.close()
        if self._task is not None:
            self._task.cancel()

    # Deciding -------------------------------------------------------------------------------------------------------

    def _is_at(self, target: State) -> bool:
        # On its host drivers, and what was changed besides is still to be undone: not home yet. On vfio, with the
        # firmware's frame buffer in its memory: no machine can use it yet.
        short = self._owed if target is State.HOST else boot_framebuffers(self.gpu, self.facts)
        return self.state is target and not short

    def _refuse_unusable(self, target: State) -> None:
        """On vfio, and of no use to a machine. At home, nothing is in its way."""
        if target is not State.VFIO:
            return
        if found := blockers(self.gpu, target, self.state, self.facts, along=self._along):
            raise refusal(found)

    def _refuse_retired(self) -> None:
        if self._retired:
            raise Failed(f"cannot switch {self.gpu.address}: {self._retired}")

    def _refuse_owned(self, target: State) -> None:
        """Who waits for it is not left without it at the last moment."""
        if target is State.HOST and self.awaited and self.owner is not None:
            raise Owned(
                f"{self.gpu.address} belongs to {self.owner}, which is about to open it: shut that down first; "
                f"not opened within {self._rules.start_grace:g} s, it comes home by itself"
            )

    def _joined(self, running: Switch, options: Options) -> Switch:
        """The one that goes there already, where that does all that is asked for."""
        rules = self._rules
        configured = Options(rules.busy, rules.wait_seconds, tuple(map(str, rules.stop_units)))
        if more := options.beyond(running.options, configured):
            raise InProgress(
                f"{self.gpu.address} is on its way to {running.target} already (switch {running.id}), and not with "
                f"{' '.join(more)}: ask without, wait for its end, or cancel it and ask again"
            )
        return running

    def _there(self, switch: Switch) -> Switch:
        """It was where it should be: nothing has happened that anybody would look up later."""
        self.needless.append(switch)
        switch.finish(Result.DONE, "")
        return switch

    async def _seen(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        """Whoever asked is answered, whatever can be seen."""
        return await seen_within(self.config.deadlines.capture, self._host, only)

    async def _preparation(self, options: Options, *, asking: bool = False, machine: str = "") -> Preparation:
        self.see(await self._seen())
        return self._preparation_in(self.state, options, asking=asking, machine=machine)

    async def _begun(self, preparation: Preparation, target: State, asker: Asker) -> Switch:
        plan = await self._prepared(preparation, target)
        switch = Switch(target, len(plan.steps), preparation.options, asker)
        try:
            self._refuse_retired()
            # The way home depends on nobody else's functions.
            own = self.gpu.functions
            self.see(await self._seen() if target is State.VFIO else self.facts.renewed(await self._seen(own), own))
            if not preparation.holds_true(self.gpu, self.state, self.facts, self._owed):
                raise Failed(
                    f"somebody else moved {self.gpu.address} at the same moment; nothing was changed; try again"
                )
            self._start(switch, plan, preparation)
        except GpuswitchError:
            await self._let_go(preparation)
            raise
        return switch

    async def _prepared(self, preparation: Preparation, target: State) -> Plan:
        try:
            return await self._planned(preparation, target)
        except StuckError as stuck:
            self._await_kernel(stuck, preparation)
            raise Wedged(str(stuck)) from None
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
        engine = self._new_engine(tuple(preparation.holds), begun=True)
        self._wedge(stuck)
        self.patience = 2 * engine.longest
        self._task = asyncio.create_task(self._outlast(engine))

    # Telling --------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._observer.changed(self)

    def _tell_step(self, switch: Switch, event: StepEvent) -> None:
        self._observer.stepped(self, switch, event)

    def _tell_end(self, switch: Switch) -> None:
        self._observer.finished(self, switch)

    def _tell_recovered(self, outcome: str) -> None:
        self._observer.recovered(self, outcome)
