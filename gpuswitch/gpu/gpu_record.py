"""What is known of one GPU: what it is, where it is and since when, and what is kept of that on disk.

It moves nothing and knows nobody who does: those that move the GPU tell it what they found, and it tells the observer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import replace
from typing import NamedTuple, Protocol

from gpuswitch.config.schema import Attempt, Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import InvalidArgument, KernelError
from gpuswitch.gpu.machine import SEEN, SETTLE, GpuMachine
from gpuswitch.gpu.observe import explain, observe, place, whereabouts
from gpuswitch.gpu.strategies import still_failed
from gpuswitch.host.looking import seen
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.model.trial import Trial
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.journal.journal import Entry, Journal, Page
from gpuswitch.switch.planning.plan import Plan
from gpuswitch.switch.record import Drift, Result, Switch
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.awake import Why

_log = logging.getLogger(__name__)


class GpuObserver(Protocol):
    """Who hears of what happens to one GPU. Called on the event loop, in order; must return at once and not raise.

    `waits`: what the step under way waits for has changed (`Switch.waiting_for`). `returned`: the kernel has, of a
    switch that is long over, and the GPU is at rest (`Switch.returned`). `recovered`: a recovery is over,
    and has led to `host`, `vfio` or, known-good nowhere, `failed`.
    """

    def changed(self, record: GpuRecord) -> None: ...
    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None: ...
    def waits(self, record: GpuRecord) -> None: ...
    def finished(self, record: GpuRecord, switch: Switch) -> None: ...
    def returned(self, record: GpuRecord, switch: Switch) -> None: ...
    def drifted(self, record: GpuRecord, drift: Drift) -> None: ...
    def recovered(self, record: GpuRecord) -> None: ...


class Outcome(NamedTuple):
    """How a switch ended, and why.

    `reached` is the plan whose steps are all done, None where everything was taken back.
    """

    result: Result
    reason: str
    reached: Plan | None = None


class _FailedWay(NamedTuple):
    """Of a way that led to no known-good state: the titles of the `steps` that did not work, what was `allowed`."""

    steps: frozenset[str]
    allowed: tuple[Attempt, Attempt]


def _allowed(rules: Defaults) -> tuple[Attempt, Attempt]:
    return rules.reset_on_failure, rules.rescan_on_failure


class GpuRecord:
    """What a GPU is (`gpu`, `facts`), where it is (`state`, `reason`, `since`), and what the journal keeps (`page`).

    `facts` is the last look; `noted` is what else whoever looks at this GPU should know, until it moves; `since` is
    when it came there, in seconds since the epoch. `progress` is when anything last happened here, on the loop's clock.
    `switch` is its last switch, `recent` are its last ones, `needless` the last that had nothing to do, which are known
    by their ids alone.
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
        observer: GpuObserver,
    ) -> None:
        self.gpu = gpu
        self.facts = facts
        self.config = config
        self._why = self.noted = ""
        self._before_vfio: tuple[Trial | None] | None = None
        """What was promised before the switch to vfio that is under way; None: there is none."""
        self.since = time.time()
        self.progress = asyncio.get_running_loop().time()
        self.switch: Switch | None = None
        self.recent: deque[Switch] = deque(maxlen=16)
        self.needless: deque[Switch] = deque(maxlen=16)
        self.awaited = False
        """Its owner has yet to open it: nobody else may take it back meanwhile."""
        self.asked_with: frozenset[PciAddress] = frozenset()
        """What its owner asked for in the same request: that machine is to have all of it, or has none."""
        self.home_driver = ""
        """The driver that its last way home led to, or was to lead to."""
        self.removed_late = False
        """Whether it may have come home by itself, so that all else is still to be restored."""
        self.missed_at_boot = False
        """Whether it could not be brought where it is wanted at boot, and nobody has moved it since."""
        self.retired = ""
        """Why nothing new begins here."""
        self._last_way: _FailedWay | None = None
        self._failed_twice = False
        self._moved = asyncio.Event()
        self._host = host
        self._arbiter = arbiter
        self._observer = observer
        self._machine = GpuMachine()
        self.page = Page(journal, gpu.address, self._share)
        arbiter.claim(gpu.address, self.restore_state)
        self._share(self.page.entry)
        self.take_in(facts, gpu)
        if self.page.entry.failed and self.state is State.UNKNOWN:
            self.fire("left_failed")
            self.reason = self.page.entry.failed
        elif self.stays_out:
            self.reason = self.stays_out

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def reason(self) -> str:
        """Why the GPU is where it is, when that is not where somebody wanted it, and what was noted beside that.

        To set it is to say why, once more from the beginning.
        """
        return "; ".join(filter(None, (self._why, self.noted)))

    @reason.setter
    def reason(self, why: str) -> None:
        self._why, self.noted = why, ""

    @property
    def own_config(self) -> GpuConfig:
        """What the configuration says of it."""
        return self.config.gpu(self.gpu.address)

    @property
    def rules(self) -> Defaults:
        return self.own_config.rules

    @property
    def restore_state(self) -> RestoreState:
        return self.page.entry.restore_state

    @property
    def has_shared_to_restore(self) -> bool:
        """Something that it shares with others is to be given back, when it is home or gone for good."""
        return bool(self.restore_state.shared)

    @property
    def owner(self) -> Owner | None:
        """The virtual machine, or the process, that it was handed to, or that waits for it."""
        return self.page.entry.owner

    @property
    def owned(self) -> bool:
        return self.owner is not None

    @property
    def along(self) -> frozenset[PciAddress]:
        """Functions of others that go to the machine that this GPU goes to."""
        return self.asked_with if self.owned else frozenset()

    @property
    def stays_out(self) -> str:
        """Why the last way home ended elsewhere, where it still is; "" where none did, or it is somebody's."""
        out = self.state in {State.VFIO, State.FAILED} and not self.owned
        return self.page.entry.stays_out if out else ""

    @property
    def failed_at(self) -> frozenset[str]:
        """The steps, by title, that did not work on the last way to a known-good state; none where that led there."""
        return self._last_way.steps if self._last_way is not None else frozenset()

    @property
    def failed_alike(self) -> bool:
        """Whether the last two ways have failed at the same steps, and nothing more is allowed since."""
        last = self._last_way
        return self._failed_twice and last is not None and last.allowed == _allowed(self.rules)

    @property
    def trial(self) -> Trial | None:
        """The promise that it goes home by itself; None: nobody was given one, or it is home."""
        return self.page.entry.trial

    @property
    def trial_is_over(self) -> bool:
        """It is to go home now."""
        return self.trial is not None and self.trial.is_over(self._host.boottime())

    @property
    def trial_ends(self) -> float:
        """When it goes home by itself, in seconds since the epoch as the clock of the host is now; 0: it does not."""
        if self.trial is None or self.trial.ends is None:
            return 0.0
        return time.time() + self.trial.ends - self._host.boottime()

    @property
    def host_driver(self) -> str | None:
        """The driver of the display function at home, None where it has none or nobody knows it yet."""
        display = self.facts.functions.get(self.gpu.address)
        if captured := self.restore_state.functions.get(self.gpu.address):
            return captured.driver.name if captured.driver else None
        if display is not None and not display.on_vfio:
            return display.driver_name
        return self.own_config.host_driver or None

    # Looking --------------------------------------------------------------------------------------------------------

    async def fresh_facts(self) -> HostFacts:
        """The facts, with its own functions as they are now."""
        return self.facts.renewed(await seen(self._host, self.gpu.functions), self.gpu.functions)

    def fresh_facts_if_possible(self) -> HostFacts:
        """For whoever is only to be told: what was seen last, where no look sees everything now."""
        try:
            return self.facts.renewed(self._host.look(self.gpu.functions), self.gpu.functions)
        except KernelError as error:
            _log.warning("%s", error, extra=told(GPU=self.gpu.address))
            return self.facts

    @property
    def facts_now(self) -> HostFacts:
        """As `facts`; of one that is under way, its own functions as they are at this moment."""
        return self.fresh_facts_if_possible() if self.state.moving else self.facts

    def place(self) -> str:
        """Where it is now, in words."""
        return place(self.gpu, self.fresh_facts_if_possible())

    @property
    def as_wanted(self) -> bool:
        """Whether it is where somebody wants it, with nothing left to restore at home: nothing follows from it."""
        home = self.state is State.HOST and not self.restore_state
        return (home or self.state is State.VFIO) and not self.stays_out and self.trial is None

    async def is_at_rest(self) -> bool:
        """Whether it is in a known-good state now, by a fresh look."""
        return observe(self.gpu, await self.fresh_facts(), self.restore_state).stable

    # Where it is ----------------------------------------------------------------------------------------------------

    def take_in(self, facts: HostFacts, gpu: Gpu) -> Drift | None:
        """Take in a look; what somebody else did to it since the last one."""
        before, seen_before, drift = self.state, (self.gpu, self.facts), None
        self.facts, self.gpu = facts, gpu
        now = observe(gpu, facts, self.restore_state)
        if now is not self.state and self._machine.can(SEEN[now]):
            self.fire(SEEN[now])
            self.reason = ""
            self.missed_at_boot = False
            drift = Drift(before, now, f"{before} → {now}: {whereabouts(gpu, facts)}", self.since)
            # The first look of a service finds it where the one before left it.
            entry = self.page.entry
            found = before is State.UNKNOWN and now is State.VFIO and not entry.failed
            out = entry.stays_out if found else ""
            trial = entry.trial if now in {State.VFIO, State.UNKNOWN} else None
            entry = replace(entry, failed="", stays_out=out, owner=self._owner_at(now), trial=trial)
            self.page.write_if_possible(entry)
        if self.state is State.UNKNOWN and not (self._why and explain(gpu, facts) == explain(*seen_before)):
            self._why = explain(gpu, facts)
        if not gpu.present(facts):
            # The overrides and power settings that we had to restore went with the device.
            self._keep_shared_only()
        return drift

    async def settle(self, outcome: Outcome, restore_state_before: RestoreState, story: str = "") -> Outcome:
        """Enter the state that a fresh look shows; the restore state is forgotten once all of it was restored.

        `story` is why it was `failed` before, "" where it was not.
        """
        result, reason, reached = outcome
        self.facts = await self.fresh_facts()
        where = observe(self.gpu, self.facts, self.restore_state)
        if where is State.ABSENT:
            self.fire("seen_gone")
        else:
            if (self.state, where) not in SETTLE:
                self.fire("fault")
            self.fire(SETTLE[self.state, where])
        if reached is not None and result is Result.DONE and where is not reached.target:
            result, reason = Result.FAILED, f"somebody else moved it meanwhile: {explain(self.gpu, self.facts)}"
            reached = None
        self.reason = reason if result is not Result.DONE else ""
        if self.state is State.FAILED:
            if result is Result.REVERTED:
                # All is as before, and that was no known-good state.
                result = Result.FAILED
            self.reason = still_failed(story, self.reason or explain(self.gpu, self.facts))
        restore_state = self._restore_state_after(result, reached, restore_state_before)
        failed = self.reason if self.state is State.FAILED else ""
        owner = self._owner_at(self.state)
        out = self._out_after(result)
        trial = self._trial_after(result, out)
        self.page.write_if_possible(Entry(restore_state, owner=owner, failed=failed, stays_out=out, trial=trial))
        self._remember_way(failed=bool(failed or out))
        return Outcome(result, reason, reached)

    def _remember_way(self, *, failed: bool) -> None:
        """Where the switch that ends has failed, if it has."""
        way = None
        if failed and self.switch is not None:
            steps = frozenset(step.title for step in self.switch.steps if step.status is Status.FAILED)
            way = _FailedWay(steps, _allowed(self.rules))
        self._failed_twice = way is not None and bool(way.steps) and way == self._last_way
        self._last_way = way

    def _out_after(self, result: Result) -> str:
        """Why it stays out from here on, as far as it does."""
        if result is Result.CANCELLED:
            return self.page.entry.stays_out
        switch, owner = self.switch, self.owner
        if switch is None and owner is None and self.state is State.VFIO:
            # Nothing of this run of the service has moved it.
            return self.page.entry.stays_out
        to_come_home = self.state is State.VFIO and switch is not None and switch.target is State.HOST
        # Of one that belongs to a machine, only that one's end is to bring it home.
        anothers = owner is not None and (switch is None or switch.requester.vm != owner.name)
        if anothers or result is Result.DONE or not (to_come_home or self.state is State.FAILED):
            return ""
        return self.reason

    def let_stay(self) -> None:
        """It is where somebody wants it: whatever brought it there, nothing is to bring it home."""
        if self.page.entry.stays_out:
            self.page.write_if_possible(replace(self.page.entry, stays_out=""))
        why = self.page.entry.failed or (self._why if self.state is State.UNKNOWN else "")
        if why != self.reason:
            self.say_why(why)

    def aims_home(self, plan: Plan) -> None:
        """This plan is next."""
        captured = plan.restore_state.functions.get(self.gpu.address)
        if plan.target is State.HOST and captured is not None and captured.driver is not None:
            self.home_driver = captured.driver.name

    def _restore_state_after(
        self, result: Result, reached: Plan | None, restore_state_before: RestoreState
    ) -> RestoreState:
        if reached is not None:
            # With what steps have recorded since then: units that a policy stopped, consoles that were unbound.
            since = self.restore_state.without(reached.restore_state)
            return replace(since.shared, vtconsoles=since.vtconsoles).and_before(reached.afterwards)
        if not self.gpu.present(self.facts):
            return self.restore_state.shared
        if result in {Result.REVERTED, Result.CANCELLED} and not restore_state_before:
            return NOTHING_TO_RESTORE
        return self.restore_state

    def fire(self, trigger: str) -> None:
        """Take the edge of that name (`model/states.py`)."""
        self._machine.fire(trigger)
        self.since = time.time()
        self.progress = asyncio.get_running_loop().time()
        self._moved.set()
        self._moved = asyncio.Event()

    async def until_moved(self) -> None:
        """Until it enters another state than this one."""
        await self._moved.wait()

    def tell(self) -> None:
        """Something of all this has changed."""
        self._observer.changed(self)

    def say_why(self, reason: str) -> None:
        """Why it is where it is, told."""
        self.reason = reason
        self.tell()

    def note(self, text: str) -> None:
        """Something that whoever looks at this GPU should know, beside why it is where it is; "" for no more of it."""
        self.noted = text
        self.tell()

    # Its trial ------------------------------------------------------------------------------------------------------

    def promise(self, seconds: float) -> None:
        """It goes home by itself so many seconds after it came to vfio; where it is there already, from now on.

        Raises:
            Failed: that could not be written, and is not so.
        """
        trial = Trial(seconds)
        if self.state is State.VFIO:
            trial = trial.begun(self._host.boottime())
        self.page.write(replace(self.page.entry, trial=trial))
        self.tell()

    def keep(self) -> None:
        """It is wanted on vfio: it does not go home by itself."""
        if self.trial is not None:
            self.page.write_if_possible(replace(self.page.entry, trial=None))
            self.tell()

    def trial_during(self, switch: Switch) -> Trial | None:
        """What is promised while this switch is under way; what was so before is so again where it is undone."""
        self._before_vfio = (self.trial,) if switch.target is State.VFIO else None
        if (seconds := switch.options.trial_seconds) is not None:
            return Trial(seconds)
        # A machine that asks for it may not get it after all.
        kept = switch.target is State.VFIO and not switch.requester.vm
        return None if kept else self.trial

    def give_up_trial(self, why: str) -> None:
        """It was to go home by itself, and `why` that cannot be now; events that may change it are waited for."""
        self.page.write_if_possible(replace(self.page.entry, trial=None, stays_out=why))
        self.say_why(why)

    def _trial_after(self, result: Result, out: str) -> Trial | None:
        """What is promised from here on; `out` is why it stays out, if it does: then that is to bring it home."""
        before, self._before_vfio = self._before_vfio, None
        if self.state is not State.VFIO:
            return None
        if before is not None and result in {Result.REVERTED, Result.CANCELLED}:
            return before[0]
        if self.trial is None:
            return None
        # Whoever cancels the way home keeps it; a service that stops leaves it to the next.
        ended = out or (result is Result.CANCELLED and not self.retired)
        if self.trial_is_over and not self.owned and ended:
            return None
        return self.trial.begun(self._host.boottime())

    # Its switches ---------------------------------------------------------------------------------------------------

    def make_current(self, switch: Switch) -> None:
        """This switch is the last one from here on."""
        self.missed_at_boot = False
        self.switch = switch
        self.recent.append(switch)

    def known_switch(self, id: str) -> Switch:  # noqa: A002 -- as on the bus
        """One of the last switches by its id.

        Raises:
            InvalidArgument: it is none of them.
        """
        for switch in (*self.recent, *self.needless):
            if switch.id == id:
                return switch
        raise InvalidArgument(Sentence("{gpu} knows of no switch {id}", gpu=self.gpu.address, id=repr(id[:80])))

    # What is kept ---------------------------------------------------------------------------------------------------

    def _share(self, entry: Entry) -> None:
        """What others share with it follows from what it has to restore, and from who owns it."""
        self._arbiter.set_restore_state(self.gpu.address, entry.restore_state)
        self._arbiter.awake.need(self.gpu.address, Why.OWNER, needed=entry.owner is not None)

    def record_restore(self, more: RestoreState) -> None:
        """Add this to the restore state, durably.

        Raises:
            Failed: that could not be written.
        """
        self.page.write(replace(self.page.entry, restore_state=more.and_before(self.restore_state)))

    def record_restored(self, restored: RestoreState) -> None:
        """This was given back, outside of a switch."""
        self.page.write_if_possible(replace(self.page.entry, restore_state=self.restore_state.without(restored)))

    def _keep_shared_only(self) -> None:
        """What was to be restored on the device went with it; what others share with it did not."""
        if self.restore_state:
            self.page.write_if_possible(replace(self.page.entry, restore_state=self.restore_state.shared))

    def own(self, owner: Owner | None, *, again: bool = False) -> None:
        """It belongs to this owner from now on, or to none any more. `again`: it did, before it was claimed.

        Raises:
            Failed: that could not be written, and is not so: only where it is new.
        """
        before = self.owner
        if owner is None or again:
            self.page.write_if_possible(replace(self.page.entry, owner=owner))
        else:
            self.page.write(replace(self.page.entry, owner=owner))
        if owner != before:
            self.asked_with = frozenset()
        self.tell()

    def _owner_at(self, state: State) -> Owner | None:
        """Who owns it now that it is there: at home nobody, but who waits for it."""
        return self.owner if self.awaited or state is not State.HOST else None
