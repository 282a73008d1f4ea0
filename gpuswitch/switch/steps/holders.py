"""The steps that have holders let go of a GPU: end what may be ended, wait for it, and look once more."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from signal import SIGKILL, SIGTERM, Signals

from gpuswitch.errors import Failed, KernelError
from gpuswitch.model.holders import Holder, HolderQuery, Process, Unit
from gpuswitch.model.policy import Busy
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import in_the_way, is_machine, never_ended, stoppable_unit
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.steps.step import RESCAN_SECONDS, HeldError, Step, StepContext, StepError, side_by_side
from gpuswitch.switch.steps.uevents import Announced, Reminder


@dataclass(frozen=True)
class EndSession(Step):
    """End a logind session that has the GPU open: for desktops that outlive their display manager, and startx."""

    kind = "sessions"
    interruptible = True
    session: str

    @property
    def title(self) -> str:
        return Sentence("end session {session}", session=self.session)

    @property
    def stops(self) -> tuple[str, ...]:
        return (f"session {self.session}",)

    async def apply(self, context: StepContext) -> None:
        try:
            await context.host.systemd.end_session(self.session)
        except KernelError as error:
            # Its display manager may have ended it a moment ago.
            if error.errno != errno.ENOENT:
                raise


@dataclass(frozen=True)
class AwaitHolders(Step):
    """Have the GPU free of holders: wait for them, or end them first, as the policy says.

    `seconds`: how long to wait; `grace` (seconds): how long those that were asked to end may take before they are
    killed. Nobody is told to end who was not a holder a moment ago, and nobody is told twice. Who has one of the cards
    that were `announced` as gone is reminded of it.
    """

    kind = "release"
    interruptible = True
    query: HolderQuery
    policy: Busy
    seconds: float
    grace: float
    announced: Announced = ()

    @property
    def title(self) -> str:
        match self.policy:
            case Busy.TERMINATE | Busy.KILL:
                return Sentence("end the programs that have it open")
            case _:
                return Sentence("wait until nobody has it open")

    @property
    def ends_programs(self) -> bool:
        return self.policy.ends_programs

    def deadline(self, deadlines: Mapping[str, float]) -> float:
        # Stopping units takes what systemd gives them; the seconds of the policy are counted by ourselves.
        ends = deadlines["units"] + 2 * self.grace if self.ends_programs else 0.0
        return deadlines[self.kind] + self.seconds + ends

    def deadline_back(self, deadlines: Mapping[str, float]) -> float:
        # What it takes back is the stop of units.
        return deadlines["units"]

    async def apply(self, context: StepContext) -> None:
        holders = await context.holders(self.query)
        if holders and self.ends_programs:
            holders = await self._end(context, holders)
        elif holders:
            holders = await _gone(context, self.query, self.seconds, self.announced)
        if holders:
            raise HeldError(in_the_way(context.gpu, holders))

    async def _end(self, context: StepContext, holders: tuple[Holder, ...]) -> tuple[Holder, ...]:
        """Those that are still there after all that the policy allows."""
        left_behind = await self._stop_units(context, holders)
        await self._signal(context, SIGTERM, left_behind)
        left = await _gone(context, self.query, self.grace, self.announced)
        if left and self.policy is Busy.KILL:
            await self._signal(context, SIGKILL, left_behind)
            left = await _gone(context, self.query, self.grace, self.announced)
        return left

    async def _stop_units(self, context: StepContext, holders: Collection[Holder]) -> frozenset[Unit]:
        """Through their manager, and what would start them again first; those that do not run any more.

        What such a unit left behind (KillMode=process) is not ended by its manager, and nobody starts it again.
        """
        units = {unit for holder in holders if not never_ended(holder) and (unit := stoppable_unit(holder))}
        units -= {stoppable_unit(holder) for holder in holders if is_machine(holder)}
        try:
            running = sorted(await context.host.systemd.active(units), key=str)
            context.waits_for(f"{', '.join(map(str, running))}: not stopped")
            await side_by_side(self._stop_unit(context, unit) for unit in running)
        except (KernelError, Failed) as error:
            raise StepError(str(error)) from error
        return frozenset(units.difference(running))

    async def _stop_unit(self, context: StepContext, unit: Unit) -> None:
        for each in (*await context.host.systemd.sockets(unit), unit):
            context.record_restore(RestoreState(units=(each,)))
            context.stopped.append(each)
            await context.arbiter.stop(context.gpu, each)

    async def revert(self, context: StepContext) -> None:
        stopped, context.stopped = context.stopped, []
        await side_by_side(
            context.arbiter.start(context.gpu, unit, wait=not context.leaving) for unit in reversed(stopped)
        )

    async def _signal(self, context: StepContext, number: Signals, left_behind: frozenset[Unit]) -> None:
        """To each process that has it open at this moment. Those of units got theirs from their manager."""
        for holder in await context.holders(self.query):
            managed = number is SIGTERM and stoppable_unit(holder) not in {None, *left_behind}
            if holder.process is not None and not managed and not never_ended(holder):
                self._send(context, holder.process, number)

    def _send(self, context: StepContext, process: Process, number: Signals) -> None:
        try:
            context.host.processes.signal(process, number)
        except KernelError as error:
            raise StepError(str(error)) from error


@dataclass(frozen=True)
class CheckHolders(Step):
    """Look for holders once more, right before what cannot be undone: an unbind waits for them, maybe for ever.

    `seconds`: how long those may take that have it open for a moment only. udev's programs, PipeWire and many a daemon
    do, to see what it is or to close it properly, and most of all when a session has just ended. `announced` are the
    cards that were announced as gone: who takes one up all the same has not heard of it.
    """

    kind = "holders"
    interruptible = True
    query: HolderQuery
    seconds: float = 0.0
    announced: Announced = ()

    @property
    def title(self) -> str:
        return Sentence("see that nobody has it open")

    def deadline(self, deadlines: Mapping[str, float]) -> float:
        return deadlines[self.kind] + self.seconds

    async def apply(self, context: StepContext) -> None:
        if holders := await _gone(context, self.query, self.seconds, self.announced):
            raise HeldError(in_the_way(context.gpu, holders))


async def _gone(context: StepContext, query: HolderQuery, seconds: float, announced: Announced) -> tuple[Holder, ...]:
    """Wait until there are none, this long at most; those that are left."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    reminder = Reminder(announced, loop.time())
    looked = False
    while True:
        # Between two looks, whoever is waited for is what people want to know.
        context.waits_for("the look for programs that have it open is not over", told=not looked)
        holders = await context.holders(query)
        looked = True
        left = until - loop.time()
        if reminder.settled and (left <= 0 or not holders):
            return holders
        if holders:
            context.waits_for(in_the_way(context.gpu, holders), until)
        # A GPU that is pulled meanwhile shows its nodes no more, and they are open all the same.
        query = replace(query, numbers=context.numbers)
        await reminder.remind(context, holders, loop.time(), left)
        await context.wait_for_change(holders, max(left, RESCAN_SECONDS))
