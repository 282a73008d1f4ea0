"""Where one GPU stands: what it is, its state and since when, and what is owed to it. Moved by its actor alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from gpuswitch.config import Config
from gpuswitch.errors import Failed, InvalidArgument, KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder, Sought
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.awake import Why
from gpuswitch.switch.engine import Status, StepEvent, StuckError
from gpuswitch.switch.host import Host
from gpuswitch.switch.journal import Entry, Journal, Page, Unfinished
from gpuswitch.switch.looking import seen
from gpuswitch.switch.machine import SEEN, SETTLE, START, GpuMachine
from gpuswitch.switch.needs import everything
from gpuswitch.switch.observe import explain, observe, whereabouts
from gpuswitch.switch.owed import NOTHING, Owed
from gpuswitch.switch.plan import Plan
from gpuswitch.switch.record import Drift, Result, Switch
from gpuswitch.switch.recovery import still_failed
from gpuswitch.switch.wedged import first_words, report
from gpuswitch.tables import Defaults

_log = logging.getLogger(__name__)


class Standing:
    """What a GPU is (`gpu`, `facts`) and where it is (`state`, `reason`, `since`).

    `facts` is the last look; `noted` is what else whoever looks at this GPU should know, until it moves; `since` is
    when it came there, in seconds since the epoch. `progress` is when anything last happened here, on the loop's clock.
    `switch` is its last switch, `recent` are its last ones, `needless` the last that had nothing to do, which are known
    by their ids alone. `changed` is called when any of it did, later than whoever asked could have told.
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
        changed: Callable[[], None],
    ) -> None:
        self.gpu = gpu
        self.facts = facts
        self.config = config
        self._why = self.noted = ""
        self.since = time.time()
        self.progress = asyncio.get_running_loop().time()
        self.switch: Switch | None = None
        self.recent: deque[Switch] = deque(maxlen=16)
        self.needless: deque[Switch] = deque(maxlen=16)
        self._host = host
        self._kernel = host.kernel(str(gpu.address))
        self._page = Page(journal, gpu.address)
        self._arbiter = arbiter
        self._changed = changed
        self._looking = asyncio.Lock()
        self._explaining: asyncio.Task[None] | None = None
        self._machine = GpuMachine()
        self.home_driver = ""
        """The driver that its last way home led to, or was to lead to."""
        self.awaited = False
        """Its owner has yet to open it: nobody else may take it back meanwhile."""
        self.asked_with: frozenset[PciAddress] = frozenset()
        """What its owner asked for in the same request: that machine is to have all of it, or has none."""
        arbiter.claim(gpu.address, self._owed)
        self._kept()
        self._take_in(facts, gpu)
        if self._entry.failed and self.state is State.UNKNOWN:
            self._fire("left_failed")
            self.reason = self._entry.failed
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
    def owner(self) -> Owner | None:
        """The virtual machine that it was handed to, or that waits for it."""
        return self._entry.owner

    @property
    def owned(self) -> bool:
        return self.owner is not None

    @property
    def stays_out(self) -> str:
        """Why the last way home ended elsewhere, where it still is; "" where none did, or it is somebody's."""
        out = self.state in {State.VFIO, State.FAILED} and not self.owned
        return self._entry.stays_out if out else ""

    @property
    def _along(self) -> frozenset[PciAddress]:
        """Functions of others that go to the machine that this GPU goes to."""
        return self.asked_with if self.owned else frozenset()

    @property
    def facts_now(self) -> HostFacts:
        """As `facts`; of one that is under way, its own functions as they are at this moment."""
        return self._own_look_now() if self.state.moving else self.facts

    async def _at_rest(self) -> bool:
        """Whether it is in a known-good state now, by a fresh look."""
        return observe(self.gpu, await self._own_look(), self._owed).stable

    @property
    def _rules(self) -> Defaults:
        return self.config.gpu(self.gpu.address).rules

    @property
    def host_driver(self) -> str | None:
        """The driver of the display function at home, None where it has none or nobody knows it yet."""
        display = self.facts.functions.get(self.gpu.address)
        if captured := self._owed.functions.get(self.gpu.address):
            return captured.driver.name if captured.driver else None
        if display is not None and not display.on_vfio:
            return display.driver_name
        return self.config.gpu(self.gpu.address).host_driver or None

    # Looking --------------------------------------------------------------------------------------------------------

    def _take_in(self, facts: HostFacts, gpu: Gpu) -> Drift | None:
        """Take in a look; what somebody else did to it since the last one."""
        before, seen_before, drift = self.state, (self.gpu, self.facts), None
        self.facts, self.gpu = facts, gpu
        now = observe(gpu, facts, self._owed)
        if now is not self.state and self._machine.can(SEEN[now]):
            self._fire(SEEN[now])
            self.reason = ""
            drift = Drift(before, now, f"{before} → {now}: {whereabouts(gpu, facts)}", self.since)
            # The first look of a service finds it where the one before left it.
            found = before is State.UNKNOWN and now is State.VFIO and not self._entry.failed
            out = self._entry.stays_out if found else ""
            self._keep_if_possible(replace(self._entry, failed="", stays_out=out, owner=self._owner_at(now)))
        if self.state is State.UNKNOWN and not (self._why and explain(gpu, facts) == explain(*seen_before)):
            self._why = explain(gpu, facts)
        if not gpu.present(facts):
            # The overrides and power settings that we owed went with the device.
            self._owe_units_only()
        return drift

    async def _own_look(self) -> HostFacts:
        return self.facts.renewed(await seen(self._host, self.gpu.functions), self.gpu.functions)

    def _own_look_now(self) -> HostFacts:
        """For whoever is only to be told: what was seen last, where no look sees everything now."""
        try:
            return self.facts.renewed(self._host.look(self.gpu.functions), self.gpu.functions)
        except KernelError as error:
            _log.warning("%s", error)
            return self.facts

    async def _settle(
        self, result: Result, reason: str, reached: Plan | None, owed_before: Owed, story: str = ""
    ) -> tuple[Result, str]:
        """Enter the state that a fresh look shows; what is owed is forgotten once all of it was given back.

        `reached` is the plan whose steps are all done, None where everything was taken back; `story` is why it was
        `failed` before, "" where it was not.
        """
        self.facts = await self._own_look()
        where = observe(self.gpu, self.facts, self._owed)
        if where is State.ABSENT:
            self._fire("seen_gone")
        else:
            if (self.state, where) not in SETTLE:
                self._fire("fault")
            self._fire(SETTLE[self.state, where])
        if reached is not None and result is Result.DONE and where is not reached.target:
            result, reason = Result.FAILED, f"somebody else moved it meanwhile: {explain(self.gpu, self.facts)}"
            reached = None
        self.reason = reason if result is not Result.DONE else ""
        if self.state is State.FAILED:
            if result is Result.REVERTED:
                # All is as before, and that was no known-good state.
                result = Result.FAILED
            self.reason = still_failed(story, self.reason or explain(self.gpu, self.facts))
        owed = self._owed_after(result, reached, owed_before)
        failed = self.reason if self.state is State.FAILED else ""
        owner = self._owner_at(self.state)
        self._keep_if_possible(Entry(owed, owner=owner, failed=failed, stays_out=self._out_after(result)))
        return result, reason

    def _out_after(self, result: Result) -> str:
        """Why it stays out from here on, as far as it does."""
        if result is Result.CANCELLED:
            return self._entry.stays_out
        switch, owner = self.switch, self.owner
        to_come_home = self.state is State.VFIO and switch is not None and switch.target is State.HOST
        # Of one that belongs to a machine, only that one's end is to bring it home.
        anothers = owner is not None and (switch is None or switch.asker.vm != owner.name)
        if anothers or result is Result.DONE or not (to_come_home or self.state is State.FAILED):
            return ""
        return self.reason

    def let_stay(self) -> None:
        """It is where somebody wants it: whatever brought it there, nothing is to bring it home."""
        if self._entry.stays_out:
            self._keep_if_possible(replace(self._entry, stays_out=""))
            self.reason = self._entry.failed or (self._why if self.state is State.UNKNOWN else "")
            self._changed()

    def _owed_after(self, result: Result, reached: Plan | None, owed_before: Owed) -> Owed:
        if reached is not None:
            # With the units that a policy stopped on the way, and consoles that were unbound since it was planned.
            ended = tuple(unit for unit in self._owed.units if unit not in reached.owed.units)
            unbound = tuple(name for name in self._owed.vtconsoles if name not in reached.owed.vtconsoles)
            return Owed(units=ended, vtconsoles=unbound).and_before(reached.afterwards)
        if not self.gpu.present(self.facts):
            return Owed(units=self._owed.units)
        if result in {Result.REVERTED, Result.CANCELLED} and not owed_before:
            return NOTHING
        return self._owed

    async def holders(self) -> tuple[Holder, ...]:
        """Who has it open, on whatever driver it is.

        Raises:
            Failed: nobody can tell.
        """
        try:
            # One look at a time: anyone may ask.
            async with self._looking, asyncio.timeout(self.config.deadlines.holders):
                return (await self._host.processes.scan(everything(self.gpu, self.facts))).holders
        except KernelError as error:
            raise Failed(f"nobody can tell who has {self.gpu.address} open: {error}") from error
        except TimeoutError:
            raise Failed(
                f"nobody can tell who has {self.gpu.address} open: the look for them took longer than "
                f"{self.config.deadlines.holders:g} s"
            ) from None

    @property
    def owes_units(self) -> bool:
        """Some are to be started again, when it is home or gone for good."""
        return bool(self._owed.units)

    # What is kept ---------------------------------------------------------------------------------------------------

    @property
    def _entry(self) -> Entry:
        return self._page.entry

    @property
    def _owed(self) -> Owed:
        return self._entry.owed

    def _keep(self, entry: Entry) -> None:
        """Keep this from now on, durably.

        Raises:
            Failed: it could not be written; nothing has changed then.
        """
        self._page.write(entry)
        self._kept()

    def _keep_if_possible(self, entry: Entry) -> None:
        """Keep this: should it not be written, a service that starts anew gives back more than it need."""
        self._page.write_if_possible(entry)
        self._kept()

    def _kept(self) -> None:
        """What others share with it follows from what it is owed, and from whose it is."""
        self._arbiter.keep(self.gpu.address, self._owed)
        self._arbiter.awake.need(self.gpu.address, Why.OWNER, needed=self.owned)

    def _owe(self, more: Owed) -> None:
        """Owe this, too.

        Raises:
            Failed: that could not be written.
        """
        self._keep(replace(self._entry, owed=more.and_before(self._owed)))

    def _owe_units_only(self) -> None:
        """What was owed to the device went with it; the host still gets its units back."""
        if self._owed:
            self._keep_if_possible(replace(self._entry, owed=Owed(units=self._owed.units)))

    def own(self, owner: Owner | None, *, again: bool = False) -> None:
        """It belongs to this virtual machine from now on, or to none any more. `again`: it did, before it was claimed.

        Raises:
            Failed: that could not be written, and is not so: only where it is new.
        """
        before = self.owner
        if owner is None or again:
            self._keep_if_possible(replace(self._entry, owner=owner))
        else:
            self._keep(replace(self._entry, owner=owner))
        if owner != before:
            self.asked_with = frozenset()
        self._changed()

    def _owner_at(self, state: State) -> Owner | None:
        """Who owns it now that it is there: at home nobody, but who waits for it."""
        return self.owner if self.awaited or state is not State.HOST else None

    def _begin_journal(self, switch: Switch, owed: Owed) -> None:
        """From here on, a service that starts anew knows that this switch is under way, and what is owed for it.

        Raises:
            Failed: that could not be written; nothing was changed.
        """
        unfinished = Unfinished(switch.id, switch.target, switch.asker, switch.started, count=switch.count)
        self._page.reserve()
        try:
            self._keep(replace(self._entry, owed=owed, unfinished=unfinished, stuck=None, failed=""))
        except Failed as error:
            raise Failed(f"{error}, so nothing was changed") from error

    def _intend(self, event: StepEvent) -> None:
        """This step is begun next, or taken back.

        Raises:
            Failed: that could not be written.
        """
        if (unfinished := self._entry.unfinished) is None:
            return
        back = event.status is Status.REVERTING
        unfinished = unfinished.at(event.index, event.count, event.step.title, back=back, worker=self._kernel.worker)
        # What brings it home does not wait for a disk.
        keep = self._keep_if_possible if back or self.state is State.RECOVERING else self._keep
        keep(self._entry.at(unfinished))

    async def _start_units(self) -> None:
        """Give back what is owed where no GPU comes home with it."""
        units = self._owed.units
        await self._arbiter.give_back(self.gpu.address, units, self.config.deadlines)
        # A member that is still there may be owed its driver.
        left = replace(self._owed, units=tuple(unit for unit in self._owed.units if unit not in units))
        self._keep_if_possible(replace(self._entry, owed=left))

    def _fire_start(self, target: State, trigger: str = "") -> None:
        self._fire(trigger or ("recover" if self.state is State.FAILED else START[target]))

    def _fire(self, trigger: str) -> None:
        self._machine.fire(trigger)
        self.since = time.time()
        self.progress = asyncio.get_running_loop().time()

    # A kernel that does not return --------------------------------------------------------------------------------

    def _say_stuck(self, stuck: StuckError, numbers: tuple[str, ...]) -> None:
        """It is wedged; `numbers` are those of its device nodes, which sysfs may not show any more."""
        self._fire("stuck")
        self.facts = self._own_look_now()
        self.reason = first_words(self.gpu.address, stuck)
        _log.critical(
            "%s: %s%s", self.gpu.address, stuck, "".join(f"\n  {function}" for function in stuck.pending.stack)
        )
        try:
            self._keep(replace(self._entry, stuck=stuck.pending))
        except Failed as error:
            _log.error("a service that starts anew will not know that %s is wedged: %s", self.gpu.address, error)
        self._explaining = asyncio.create_task(self._explain(stuck, numbers))

    async def _explain(self, stuck: StuckError, numbers: tuple[str, ...]) -> None:
        """Find out who could make it return."""
        holders: tuple[Holder, ...] | None = None
        try:
            async with asyncio.timeout(self.config.deadlines.holders):
                holders = (await self._host.processes.scan(Sought(self.gpu.functions, numbers=numbers))).holders
        except (KernelError, TimeoutError) as error:
            _log.warning("cannot tell who has %s open: %s", self.gpu.address, error)
        nvidia = self.facts.modules.get("nvidia")
        self.reason = report(self.gpu.address, stuck, holders, nvidia.version if nvidia else "")
        self._changed()

    def known_switch(self, id: str) -> Switch:  # noqa: A002 -- as on the bus
        """One of the last switches by its id.

        Raises:
            InvalidArgument: it is none of them.
        """
        for switch in (*self.recent, *self.needless):
            if switch.id == id:
                return switch
        raise InvalidArgument(f"{self.gpu.address} knows of no switch {id[:80]!r}")
