"""The actor: one per GPU. It decides what is done with the GPU; nobody else moves it.

A request goes one way: from here to the `runner`, or to the `recovery`, and from both to the `record`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace

from gpuswitch.config.settings import Config
from gpuswitch.errors import Failed, GpuswitchError, InProgress, InvalidArgument, KernelError, NotViable, Wedged
from gpuswitch.gpu.absent import restore_for_absent
from gpuswitch.gpu.admission import Admission
from gpuswitch.gpu.cancelling import can_be_cancelled, cancellable
from gpuswitch.gpu.deciding import Deciding
from gpuswitch.gpu.gpu_record import GpuObserver, GpuRecord
from gpuswitch.gpu.observe import whereabouts
from gpuswitch.gpu.planner import Planner
from gpuswitch.gpu.recovery import Recovery
from gpuswitch.gpu.runner import Runner
from gpuswitch.host.looking import seen, seen_within
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder, Unit
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import AS_CONFIGURED, Options
from gpuswitch.model.states import State
from gpuswitch.runtime.stacks import where
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import Engine, StuckError
from gpuswitch.switch.journal.journal import Journal
from gpuswitch.switch.planning.guards import Blocker, blockers, refusal
from gpuswitch.switch.planning.plan import Plan
from gpuswitch.switch.planning.preparation import Preparation
from gpuswitch.switch.planning.requirements import everything, leaving_as_configured
from gpuswitch.switch.record import THE_SERVICE, Drift, Requester, Result, Switch
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.awake import Why
from gpuswitch.switch.steps.step import StepError

_log = logging.getLogger(__name__)
_TURN_SECONDS = 10.0
"""Plenty for another GPU's switch, unless that waits for somebody."""


class Actor:
    """One GPU that can be asked to move. All that is known of it is in `record`."""

    def __init__(
        self,
        gpu: Gpu,
        facts: HostFacts,
        *,
        host: Host,
        config: Config,
        journal: Journal,
        arbiter: Arbiter,
        observer: GpuObserver,
        rested: Callable[[], None],
        rested_as_wanted: Callable[[], None],
    ) -> None:
        self.record = GpuRecord(
            gpu, facts, host=host, config=config, journal=journal, arbiter=arbiter, observer=observer
        )
        self.runner = Runner(self.record, host=host, arbiter=arbiter, observer=observer, rested=self._is_over)
        self._planner = Planner(self.record, host, arbiter)
        self._recovery = Recovery(self.record, self.runner, self._planner, host)
        self._admission = Admission(self.record)
        self._host = host
        self._arbiter = arbiter
        self._observer = observer
        self._rested = rested
        self._rested_as_wanted = rested_as_wanted
        self._restoring: asyncio.Task[None] | None = None
        self._deciding = Deciding()
        self._planning = asyncio.Lock()
        self._looking = asyncio.Lock()

    # What everybody asks; the rest is in the record.

    @property
    def gpu(self) -> Gpu:
        return self.record.gpu

    @property
    def state(self) -> State:
        return self.record.state

    @property
    def reason(self) -> str:
        return self.record.reason

    @property
    def owner(self) -> Owner | None:
        return self.record.owner

    @property
    def switch(self) -> Switch | None:
        return self.record.switch

    @property
    def bound(self) -> bool:
        """Its functions stay its own until it is home: they are under way, or something of them is to be restored."""
        record = self.record
        return self.busy or bool(record.restore_state) or record.owned or record.trial is not None

    @property
    def busy(self) -> bool:
        """It is under way, or may be in a moment."""
        return self.runner.busy or self._deciding.locked()

    @property
    def stalled(self) -> str:
        """Where something stands still here in the program itself; "": nothing does.

        It has had longer than all that it may wait for has together. A kernel that does not return is none of that, and
        who waits for people does so under a deadline.
        """
        if self.runner.stalled:
            if self.runner.task is not None:
                return where(self.runner.task)
            # A service that stops leaves it under way to the next one.
            return "" if self.record.retired else f"it is {self.state}, and nothing works on it"
        if self._deciding.task is None:
            return ""
        since = max(self._deciding.began, self.record.progress)
        longest = 2 * _TURN_SECONDS + sum(self.record.config.deadlines.by_kind().values())
        return where(self._deciding.task) if asyncio.get_running_loop().time() - since > longest else ""

    # What it is asked -------------------------------------------------------------------------------------------------

    async def holders(self) -> tuple[Holder, ...]:
        """Who has it open, on whatever driver it is.

        Raises:
            Failed: nobody can tell.
        """
        record = self.record
        try:
            # One look at a time: anyone may ask.
            async with self._looking, asyncio.timeout(record.config.deadlines.holders):
                return (await self._host.processes.scan(everything(record.gpu, record.facts))).holders
        except KernelError as error:
            raise Failed(self._unknown(Sentence.of(error))) from error
        except TimeoutError:
            seconds = f"{record.config.deadlines.holders:g}"
            why = Sentence("the look for them took longer than {seconds} s", seconds=seconds)
            raise Failed(self._unknown(why)) from None

    async def goes_by_itself(self, holders: Collection[Holder]) -> frozenset[Holder]:
        """Those of them that a switch to vfio, as it is configured, sees to by itself: none where it is not at home."""
        record = self.record
        if record.state is not State.HOST or not holders:
            return frozenset()
        leaving = leaving_as_configured(record.gpu, record.facts, record.config, holders)
        canonical: list[Unit] = []
        with suppress(KernelError, TimeoutError):  # then by the names that the configuration has
            async with asyncio.timeout(record.config.deadlines.inhibit):
                canonical += [await self._host.systemd.canonical(unit) for unit in leaving.units]
        leaving = replace(leaving, units=(*leaving.units, *canonical))
        return frozenset(holder for holder in holders if leaving.takes(holder))

    def _unknown(self, why: Sentence) -> Sentence:
        return Sentence("nobody can tell who has {gpu} open: {why}", gpu=self.gpu.address, why=why)

    async def plan(self, target: State, options: Options = AS_CONFIGURED) -> Plan:
        """The plan of a switch to `target`, without steps where nothing is to do; or the refusal with all blockers.

        Changes nothing.
        """
        # Anyone may ask, and many: those who want to switch stand in another line.
        async with self._planning, self._deciding:
            self._admission.refuse_retired()
            if (running := self._admission.running()) is not None:
                raise refusal([self._under_way(running)])
            preparation = await self._preparation(options, asking=True)
            self._admission.refuse_owned(target)
            if self._admission.is_at(target):
                self._admission.refuse_unusable(target)
                return Plan(self.gpu, target, self.record.restore_state, ())
            return await self._planner.plan(preparation, target)

    def _under_way(self, running: Switch) -> Blocker:
        """Why there is no plan while a switch is under way, and what can be done meanwhile."""
        named = {"gpu": self.gpu.address, "target": running.target, "id": running.id}
        if can_be_cancelled(self.state, self.runner.engine):
            sentence = Sentence(
                "{gpu} is on its way to {target} (switch {id}): gpuswitchctl watch {gpu} shows it, gpuswitchctl wait "
                "{gpu} waits for its end, gpuswitchctl cancel {gpu} takes it back",
                **named,
            )
        else:
            sentence = Sentence(
                "{gpu} is on its way to {target} (switch {id}), and can no longer be cancelled: gpuswitchctl watch "
                "{gpu} shows it, gpuswitchctl wait {gpu} waits for its end",
                **named,
            )
        return Blocker("in_progress", sentence, InProgress)

    async def request(
        self, target: State, options: Options = AS_CONFIGURED, requester: Requester = THE_SERVICE
    ) -> Switch:
        """Start a switch to State.VFIO or State.HOST, or join the one that goes there already.

        One that goes there with other options than were asked for is not joined. Where the GPU is there already, the
        switch that comes back is finished and had no steps. Who asks for vfio without `trial_seconds`, and not for a
        virtual machine, keeps it there: what was promised of it is no more so.

        Raises:
            GpuswitchError: refused, with every reason; nothing was changed.
        """
        async with self._deciding:
            self._admission.refuse_retired()
            self._admission.refuse_trial(options)
            if (running := self._admission.running()) is not None:
                if running.target is target:
                    joined = self._admission.join(running, options)
                    self._promise(target, options, requester)
                    return joined
                raise InProgress(
                    Sentence(
                        "{gpu} cannot go to {target} while it is on its way to {other} (switch {id}): wait for that "
                        "first, or cancel it: gpuswitchctl cancel {gpu}",
                        gpu=self.gpu.address,
                        target=target,
                        other=running.target,
                        id=running.id,
                    )
                )
            if not self.runner.busy:
                await self.runner.turns.take(_TURN_SECONDS)
            try:
                machine = requester.machine if requester.service else ""
                preparation = await self._preparation(options, machine=machine, at_boot=requester.at_boot)
                self._admission.refuse_owned(target)
                self._admission.refuse_trial(options)
                self._admission.refuse_kept(requester)
                if not self._admission.is_at(target):
                    return await self._begun(preparation, target, requester)
                self._admission.refuse_unusable(target)
                self._promise(target, options, requester)
                if target is State.VFIO:
                    self.record.let_stay()
                    self._rested()
            finally:
                if not self.runner.busy:
                    self.runner.turns.end()
                    # Whoever is refused finds the machine as it was.
                    await self._arbiter.awake.let_go(self.gpu.address, Why.SWITCH)
            return self._there(Switch(target, 0, options, requester))

    async def recover(self, options: Options = AS_CONFIGURED, requester: Requester = THE_SERVICE) -> Switch:
        """Look for a known-good state: home, else vfio-pci, else by what the configuration allows besides.

        Where it is in one, the switch that comes back is finished and had no steps; a recovery that runs is joined.

        Raises:
            GpuswitchError: it is wedged, absent, or on its way; nothing was changed.
        """
        async with self._deciding:
            self._admission.refuse_retired()
            self.see(await self._seen())
            if (running := self._admission.running()) is not None:
                if running.recovery:
                    return self._admission.join(running, options)
                raise InProgress(
                    Sentence(
                        "{gpu} is on its way to {other} (switch {id}): wait for that first, or cancel it: gpuswitchctl "
                        "cancel {gpu}",
                        gpu=self.gpu.address,
                        other=running.target,
                        id=running.id,
                    )
                )
            self._admission.refuse_owned(State.HOST)
            if found := blockers(self.gpu, State.HOST, self.state, self.record.facts, self.record.config):
                raise refusal(found)
            if self.state.stable and not self.record.stays_out:
                return self._there(Switch(self.state, 0, options, requester))
            switch = Switch(State.HOST, 0, options, requester, recovery=True)
            self._recovery.start(switch, "", starting=False)
            return switch

    def cancel(self, id: str, requester: Requester) -> None:  # noqa: A002 -- as on the bus
        """Take the running switch of this id back, once the step that runs is over; `result` says what came of it.

        Raises:
            GpuswitchError: it cannot be taken back, or not any more, and goes on.
        """
        record = self.record
        engine = cancellable(
            record.gpu.address, record.state, record.place(), record.known_switch(id), self.runner.engine
        )
        engine.stop(Sentence("cancelled by {requester}", requester=requester))

    # What the service does by itself ----------------------------------------------------------------------------------

    def see(self, facts: HostFacts, gpu: Gpu | None = None) -> Drift | None:
        """Take in a look at the host; what somebody else did to this GPU since the last one.

        Nothing follows from it while a switch runs or the kernel has not returned.
        """
        if self.runner.busy:
            return None
        record = self.record
        known = (record.gpu, record.gpu.present(record.facts), record.state)
        drift = record.take_in(facts, gpu or record.gpu)
        if known != (record.gpu, record.gpu.present(facts), record.state):
            record.tell()
        if drift is not None:
            self._observer.drifted(record, drift)
        return drift

    async def adopt(self) -> None:
        """Take up what a dead service left: find what the kernel still has, and bring home what was under way.

        A GPU at rest is left alone, and so is one that somebody else moved meanwhile.
        """
        record = self.record
        self.see(await seen(self._host))
        stuck = self.runner.left_behind()
        if stuck is not None:
            self.runner.wedge(StuckError(stuck, None))
            self.runner.launch(self._restore_after_stall(self.runner.new_engine(())))
            return
        before = record.page.entry.stuck
        record.page.write_if_possible(replace(record.page.entry, stuck=None))
        if (left := record.page.entry.unfinished) is not None:
            await self._recovery.resume(left, before).wait()
        elif record.restore_state.functions and self.state in {State.HOST, State.UNKNOWN, State.ABSENT}:
            text = f"{State.VFIO} → {self.state}: {whereabouts(self.gpu, record.facts)}, while the service was away"
            self._observer.drifted(record, Drift(State.VFIO, self.state, text, record.since))

    async def restore_deferred(self) -> None:
        """Give back what the start of the service could not wait for, and what no switch of this GPU will."""
        record = self.record
        if record.restore_state and self.state is State.HOST and not record.awaited:
            await self._bring_home()
        elif self.state is State.ABSENT and record.has_shared_to_restore and not record.owned:
            await self._restore_shared()
        elif not self.runner.busy and not record.owned:
            # A switch that was cut short left it behind, and nothing of ours needs it.
            await self._arbiter.awake.settled_if_possible(self.gpu.address)

    async def restore_deferred_at_start(self) -> None:
        """The same, once the service has started: now there are ways home that could not be gone before."""
        try:
            if self.record.stays_out and await self.try_again("the service has started"):
                return
        except GpuswitchError as error:
            _log.warning("%s", error, extra=told(GPU=self.gpu.address))
        await self.restore_deferred()

    async def try_again(self, why: str) -> bool:
        """What did not come home is brought there once more; `why` that may work now. False: not now, says who refuses.

        Raises:
            NotViable, InvalidArgument: nor later.
        """
        _log.info("%s is to come home once more: %s", self.gpu.address, why, extra=told(GPU=self.gpu.address))
        try:
            switch = await (self.recover() if self.state is State.FAILED else self.request(State.HOST))
        except (NotViable, InvalidArgument):
            raise
        except GpuswitchError as error:
            _log.warning("%s", error, extra=told(GPU=self.gpu.address))
            return False
        await switch.wait()
        return True

    def own(self, owner: Owner | None, *, again: bool = False) -> None:
        """As `GpuRecord.own`."""
        self.record.own(owner, again=again)
        if self.record.stays_out or self.record.trial is not None:
            # Nobody has it any more, and somebody has to see to it; or a machine may get it, and nobody is to.
            self._rested()

    def give_up_trial(self, why: str) -> None:
        """As `GpuRecord.give_up_trial`."""
        self.record.give_up_trial(why)
        self._rested()

    def keep(self) -> None:
        """As `GpuRecord.keep`."""
        if self.record.trial is not None:
            self.record.keep()
            self._rested()

    async def _bring_home(self) -> None:
        try:
            switch = await self.request(State.HOST)
            await switch.wait()
        except Wedged:
            return
        except GpuswitchError as error:
            self.record.note(f"cannot bring {self.gpu.address} back to the host: {error}")

    async def _restore_shared(self) -> None:
        """Give back what it shares with others where no GPU comes home with that."""
        record = self.record
        shared = record.restore_state.shared
        await restore_for_absent(record.gpu.address, shared, self._host, self._arbiter, record.config.deadlines)
        # A member that is still there may have its driver to get back.
        left = record.restore_state.without(shared)
        record.page.write_if_possible(replace(record.page.entry, restore_state=left))

    def retire(self, reason: str) -> None:
        """No switch begins from here on."""
        self.record.retired = reason

    def leave(self, reason: str) -> None:
        """It is nobody's any more."""
        self.retire(reason)
        self.record.page.close()

    async def stop(self, reason: str) -> None:
        """The service stops: a running switch ends its step and reverts. What the kernel has is left to it."""
        self.retire(reason)
        runner = self.runner
        async with self._deciding:
            if runner.engine is not None:
                runner.engine.stop(reason, leaving=True)
        while runner.busy and self.state is not State.WEDGED:
            await runner.rest()
        self.record.page.close()
        if runner.task is not None:
            runner.task.cancel()

    def _is_over(self) -> None:
        """A switch is."""
        record = self.record
        if record.as_wanted:
            # Whoever waits for the end is answered first.
            self._rested_as_wanted()
        else:
            self._rested()
        if record.removed_late and record.state is State.HOST and record.restore_state and not record.retired:
            self._restoring = asyncio.create_task(self.restore_deferred())

    # Deciding ---------------------------------------------------------------------------------------------------------

    def _promise(self, target: State, options: Options, requester: Requester) -> None:
        """What no step of a switch says: whether it goes home from vfio by itself. Raises as `GpuRecord.promise`."""
        if options.trial_seconds is not None:
            self.record.promise(options.trial_seconds)
        elif target is State.VFIO and not requester.vm:
            self.record.keep()

    def _there(self, switch: Switch) -> Switch:
        """It was where it should be: nothing has happened that anybody would look up later."""
        self.record.needless.append(switch)
        switch.finish(Result.DONE, "")
        return switch

    async def _seen(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        """Whoever asked is answered, whatever can be seen."""
        return await seen_within(self.record.config.deadlines.capture, self._host, only)

    async def _preparation(
        self, options: Options, *, asking: bool = False, machine: str = "", at_boot: bool = False
    ) -> Preparation:
        self.see(await self._seen())
        return self._planner.preparation(self.state, options, asking=asking, machine=machine, at_boot=at_boot)

    async def _begun(self, preparation: Preparation, target: State, requester: Requester) -> Switch:
        plan = await self._prepared(preparation, target)
        switch = Switch(target, len(plan.steps), preparation.options, requester)
        record = self.record
        try:
            self._admission.refuse_retired()
            # The way home depends on nobody else's functions.
            own = record.gpu.functions
            self.see(await self._seen() if target is State.VFIO else record.facts.renewed(await self._seen(own), own))
            if not preparation.is_still_valid(record.gpu, record.state, record.facts, record.restore_state):
                raise Failed(
                    Sentence(
                        "somebody else moved {gpu} at the same moment; nothing was changed; try again",
                        gpu=self.gpu.address,
                    )
                )
            self.runner.start(switch, plan, preparation, self._recovery.after_failure)
        except GpuswitchError:
            await self._release_holds(preparation)
            raise
        return switch

    async def _prepared(self, preparation: Preparation, target: State) -> Plan:
        try:
            return await self._planner.plan(preparation, target)
        except StuckError as stuck:
            self._await_kernel(stuck, preparation)
            raise Wedged(str(stuck)) from None
        except GpuswitchError:
            await self._release_holds(preparation)
            raise

    async def _release_holds(self, preparation: Preparation) -> None:
        """No switch follows from it: give back what it holds."""
        if not preparation.held_groups:
            return
        try:
            await self.runner.new_engine(tuple(preparation.held_groups), begun=True).back()
        except StepError as error:
            _log.warning("%s", error, extra=told(GPU=self.gpu.address))
        except StuckError as stuck:
            self._await_kernel(stuck, preparation)

    def _await_kernel(self, stuck: StuckError, preparation: Preparation) -> None:
        """The kernel has not returned, and no switch had begun: give back what is held if ever it does."""
        engine = self.runner.new_engine(tuple(preparation.held_groups), begun=True)
        self.runner.wedge(stuck)
        self.runner.patience = 2 * engine.longest
        self.runner.launch(self._restore_after_stall(engine))

    async def _restore_after_stall(self, engine: Engine) -> None:
        await self._recovery.recover_after_stall(engine)
        await self.restore_deferred()
