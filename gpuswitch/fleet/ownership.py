"""Ownership: one GPU that belongs to one virtual machine, or process, until nobody has the GPU open any more.

Who has it open is told by the process that does (pidfd), not by what anybody says: libvirt may have died before it
could say that a machine ended, and it may say so while QEMU is still at it. What belongs to a process does so until
that has ended, too: it may never open it, and leave it to others.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Protocol

from gpuswitch.config.schema import Defaults
from gpuswitch.errors import GpuswitchError, InvalidArgument, KernelError, NotViable, Owned
from gpuswitch.fleet.access import VfioAccess
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.port import Processes
from gpuswitch.log.fields import about
from gpuswitch.model.holders import Holder, HolderQuery
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Release
from gpuswitch.model.states import State
from gpuswitch.runtime.pause import Pause, whatever_happens, within
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import in_the_way
from gpuswitch.switch.record import THE_SERVICE, Result
from gpuswitch.switch.shared.clearing_up import ClearingUp
from gpuswitch.switch.steps.step import RESCAN_SECONDS

_log = logging.getLogger(__name__)

_MAY_OPEN = Sentence(
    "a user whose command has ended may open it still: the access could not be taken back; the log says why"
)
_NOT_ON_VFIO = frozenset({State.HOST, State.UNKNOWN, State.ABSENT, State.FAILED})
"""Where a GPU is that nobody can have by vfio, and that nobody moves."""


class Ended(Protocol):
    def __call__(self, ownership: Ownership, *, cut_short: bool) -> None:
        """It is over; `cut_short`: by the end of the service, or by another one in its place."""


class Ownership:
    """`actor`'s GPU, owned by `owner`. `back_to` is where it goes should the owner not get it after all.

    `ready`: the service is; what an earlier run of it handed over goes nowhere before that.
    """

    def __init__(
        self,
        actor: Actor,
        owner: Owner,
        *,
        processes: Processes,
        clearing_up: ClearingUp,
        access: VfioAccess,
        back_to: Release,
        ready: asyncio.Event,
        ended: Ended,
    ) -> None:
        self.actor = actor
        self.owner = owner
        self.back_to = back_to
        self.letting_go = False
        """Nobody has it open any more, and it is on its way to wherever it goes then."""
        self.reason = ""
        self.is_released = asyncio.Event()
        self.waits_for_another = False
        """Whoever had it before may still have it open, and is done with it."""
        self._ready = ready
        self._tell_ended = ended
        self._to: Release | None = None
        self._processes = processes
        self._clearing_up = clearing_up
        self._access = access
        self._opened = asyncio.Event()
        self._was_open = False
        self._untold = Pause()
        self._groups: list[int] = []
        """Those that it was seen in: a device that has left the bus may be open all the same."""
        self._over = False
        self._task: asyncio.Task[None] | None = None

    # What it is told ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """It was handed over: from here on, see what becomes of it. Who is not watched owns it for ever."""
        self._task = asyncio.create_task(whatever_happens(self._follow, self.actor.gpu))
        self._task.add_done_callback(lambda task: self._tell_ended(self, cut_short=task.cancelled()))

    def opened(self) -> None:
        """Its machine runs, says libvirt, or may do so."""
        self._opened.set()

    def released(self, reason: str) -> None:
        """Its machine is gone, says libvirt; `reason` is its word for it (docs/hooks.rst: `shutdown`, `saved`, ...)."""
        self.reason = reason
        self.is_released.set()
        self._opened.set()

    def given_up(self) -> None:
        """Its machine did not get it: it goes back to where it was, or was going."""
        self._to = self.back_to
        self.released("failed")
        self.follow()

    def over(self) -> None:
        """Another one takes its place, or the service stops."""
        self._over = True
        # A switch that is asked for is not torn apart: whoever comes next cancels it, or waits for it.
        if self._task is not None and not self.letting_go:
            self._task.cancel()

    @property
    def where_to(self) -> Release:
        """Where it goes when nobody has it open any more."""
        rules = self._rules
        own = {"saved": rules.on_saved, "migrated": rules.on_migrated}.get(self.reason)
        return self._to or own or rules.on_release

    # What follows ---------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        about(GPU=self.actor.gpu.address, OWNER=self.owner.label)
        process = self.owner.process
        if process is not None:
            if not self.is_released.is_set():
                await self._while_it_runs(Holder(process, self.owner.name))
            await self._take_access_back()
        if self._to is Release.STAY and not self.waits_for_another:
            # Nothing is to be moved, so whoever has it open is in nobody's way; and he has it from somebody else.
            self.actor.record.awaited = False
            await self._send_home()
            return
        if process is None:
            self._was_open = self._was_open or await self._until_opened()
        else:
            await self._ready.wait()
        # Of a process libvirt knows nothing.
        cleared, pause = process is not None, Pause()
        while self._mine:
            while (holders := await self.holders()) and self._mine:
                self._was_open, cleared = True, process is not None
                self.actor.record.let_stay()
                self.actor.keep()
                pause.over()
                self.actor.record.awaited = False
                await self._wait_for_change(holders, None if _all_known(holders) else RESCAN_SECONDS)
            if not cleared and not self.is_released.is_set():
                cleared = await self._until_cleared_up()
                # Whoever opened it meanwhile has it: look again.
                continue
            if not self._mine:
                # It came home, or another machine asked for it, while we looked.
                break
            self.actor.record.awaited = False
            self.letting_go = True
            if await self._send_home():
                return
            # Something that no look shows is in the way, or something that passes: it makes no event.
            await pause.wait()
        if not (self._over or self.actor.record.owned):
            await self.actor.restore_deferred()

    @property
    def _mine(self) -> bool:
        return self.actor.owner == self.owner and not self._over

    async def _until_opened(self) -> bool:
        """Whether somebody has it open, as soon as libvirt says so, and no later than the grace allows."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rules.start_grace):
                while not self.is_released.is_set():
                    await self._opened.wait()
                    if not self.is_released.is_set():
                        self._opened.clear()
                        if await self.holders():
                            return True
        return False

    async def _while_it_runs(self, owner: Holder) -> None:
        """Until it has ended, or somebody else has taken the GPU from vfio, so that there is nothing for it to have."""
        ending = asyncio.create_task(self._until_ended(owner))
        try:
            while not ending.done() and self.actor.state not in _NOT_ON_VFIO:
                moved = asyncio.create_task(self.actor.record.until_moved())
                await asyncio.wait({ending, moved}, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
        finally:
            ending.cancel()

    async def _take_access_back(self) -> None:
        """Before it is anybody else's. Whatever keeps it from being taken makes no event when that is over."""
        pause, record = Pause(), self.actor.record
        while not await self._access.take_back(record):
            record.note(_MAY_OPEN)
            await pause.wait()
        if record.noted == _MAY_OPEN:
            record.note("")

    async def _until_ended(self, owner: Holder) -> None:
        pause = Pause()
        while True:
            try:
                return await self._processes.wait_for_change([owner])
            except KernelError as error:
                _log.warning("%s", error)
                await pause.wait()

    async def _until_cleared_up(self) -> bool:
        """QEMU is gone, or never had it; libvirt says so in a moment, unless it is gone as well.

        Whatever it says, it is not done before it has cleared up. False: look again, QEMU may have opened it just now.
        """
        gpu, told = self.actor.gpu.address, ""
        if self._opened.is_set() and not self.is_released.is_set():
            self._opened.clear()
            return False
        if self._was_open:
            await within(self._rules.release_grace, self.is_released)
        if not self.is_released.is_set() and self._in_the_books():
            how = "is gone" if self._was_open else f"has not opened {gpu}"
            told = f"{self.owner} {how}, and libvirt is not done with it: {gpu} stays on vfio until it is"
            self.actor.record.note(told)
        clearing = asyncio.create_task(self._clearing_up.wait(self._rules.libvirt_patience))
        others = {asyncio.create_task(event.wait()) for event in (self.is_released, self._opened)}
        try:
            await asyncio.wait({clearing, *others}, return_when=asyncio.FIRST_COMPLETED)
            if told and self.actor.record.noted == told:
                self.actor.record.note("")
            if not clearing.done():
                return self.is_released.is_set()
            if told and clearing.result():
                # Its word, and why the machine ended, comes right after that.
                await within(self._rules.release_grace, self.is_released)
            self._say_how_it_ended(cleared=clearing.result())
            return True
        finally:
            for task in (clearing, *others):
                task.cancel()

    def _in_the_books(self) -> bool:
        try:
            return not self._clearing_up.is_over()
        except KernelError:
            return True

    def _say_how_it_ended(self, *, cleared: bool) -> None:
        if self.is_released.is_set():
            return
        if not cleared:
            _log.error("%s is gone, and libvirt cannot be had to clear up after it: it goes on without", self.owner)
        elif self._was_open:
            _log.warning("%s has let go of %s, and nobody said so", self.owner, self.actor.gpu.address)
        else:
            _log.warning("%s has not opened %s in all this time", self.owner, self.actor.gpu.address)

    async def until_free(self) -> None:
        """Until nobody else has it open any more.

        Raises:
            Owned: somebody has, who has not said that he is done with it.
        """
        while holders := await self.holders():
            if not self.waits_for_another:
                raise Owned(in_the_way(self.actor.gpu.address, holders))
            await self._wait_for_change(holders, None if _all_known(holders) else RESCAN_SECONDS)

    async def holders(self) -> tuple[Holder, ...]:
        """Who has it open by vfio; one nameless holder where nobody can tell."""
        await self.actor.runner.unwedged()
        await self.actor.runner.rest()
        there = [f for f in self.actor.gpu.present(self.actor.record.facts) if f.on_vfio]
        if not there and self.actor.state is not State.ABSENT:
            # At home it is open to others.
            return ()
        if there:
            self._groups = sorted({f.iommu_group for f in there if f.iommu_group is not None})
        try:
            async with asyncio.timeout(self.actor.record.config.deadlines.holders):
                query = HolderQuery(tuple(f.address for f in there), tuple(f"vfio/{number}" for number in self._groups))
                return (await self._processes.scan(query)).holders
        except (KernelError, TimeoutError) as error:
            _log.warning("cannot tell whether %s still has %s: %s", self.owner, self.actor.gpu.address, error)
            return (Holder(None, "somebody"),)

    async def _wait_for_change(self, holders: tuple[Holder, ...], seconds: float | None) -> None:
        """Until something may have become of them, this long at most; where no event would tell, for a while."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._processes.wait_for_change(holders)
            self._untold.over()
        except KernelError as error:
            _log.warning("%s", error)
            await self._untold.wait()

    # The end --------------------------------------------------------------------------------------------------------

    async def _send_home(self) -> bool:
        """Send it where it goes now; False where it did not work yet, and may work later."""
        if self.where_to is Release.HOST and self.actor.state not in {State.HOST, State.ABSENT}:
            try:
                switch = await self.actor.request(State.HOST, requester=THE_SERVICE.on_behalf_of(self.owner))
            except (NotViable, InvalidArgument) as error:
                self._complain(error)
            except GpuswitchError as error:
                self._complain(error)
                return not self._mine
            else:
                await switch.wait()
                await self.actor.runner.rest()
                if switch.result is Result.WEDGED:
                    return not self._mine
                if switch.result is not Result.DONE and self._mine:
                    _log.warning("%s did not come home from %s: %s", self.actor.gpu.address, self.owner, switch.reason)
        if self._mine and self._to is None and self.where_to is Release.STAY:
            self.actor.record.let_stay()
        if self._mine and not self.actor.record.awaited:
            self.actor.own(None)
        if not self.actor.record.owned:
            await self.actor.restore_deferred()
        return True

    def _complain(self, error: GpuswitchError) -> None:
        text = f"{self.owner} is done with {self.actor.gpu.address}, which stays where it is: {error}"
        if self._mine and self.actor.record.noted != text:
            self.actor.record.note(text)
            _log.warning("%s", text)

    @property
    def _rules(self) -> Defaults:
        return self.actor.record.rules


def _all_known(holders: tuple[Holder, ...]) -> bool:
    """Whether their end makes an event: that of what is no process does not."""
    return all(holder.process is not None for holder in holders)
