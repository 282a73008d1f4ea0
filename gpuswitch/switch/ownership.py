"""Ownership: one GPU in the hands of one virtual machine, from its request until nobody has the GPU open any more.

Who has it open is told by the process that does (pidfd), not by what anybody says: libvirt may have died before it
could say that a machine ended, and it may say so while QEMU is still at it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from gpuswitch.errors import GpuswitchError, KernelError, Owned
from gpuswitch.model.holders import Holder, Sought
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Release
from gpuswitch.model.states import State
from gpuswitch.switch.actor import Actor
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.host import Processes
from gpuswitch.switch.record import Asker, Result
from gpuswitch.switch.step import RESCAN_SECONDS
from gpuswitch.tables import Defaults

_log = logging.getLogger(__name__)


class Ownership:
    """`actor`'s GPU, owned by `owner`."""

    def __init__(self, actor: Actor, owner: Owner, processes: Processes, arbiter: Arbiter) -> None:
        self.actor = actor
        self.owner = owner
        self.letting_go = False
        """Nobody has it open any more, and it is on its way to wherever it goes then."""
        self._processes = processes
        self._arbiter = arbiter
        self._reason = ""
        self._released = asyncio.Event()
        self._opened = asyncio.Event()
        self._over = False
        self._task: asyncio.Task[None] | None = None

    # What it is told ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """It was handed over: from here on, see what becomes of it."""
        self._task = asyncio.create_task(self._follow())

    def opened(self) -> None:
        """Its machine runs, says libvirt."""
        self._opened.set()

    def released(self, reason: str) -> None:
        """Its machine is gone, says libvirt; `reason` is its word for it (docs/hooks.rst: `shutdown`, `saved`, ...)."""
        self._reason = reason
        self._released.set()
        self._opened.set()

    def over(self) -> None:
        """Another one takes its place, or the service stops."""
        self._over = True
        # A switch that is asked for is not torn apart: whoever comes next cancels it, or waits for it.
        if self._task is not None and not self.letting_go:
            self._task.cancel()

    # What follows ---------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        opened, waited = await self._until_opened(), False
        while self._mine:
            while holders := await self._holders():
                opened, waited = True, False
                self.actor.awaited = False
                await self._stirred(holders)
            self.actor.awaited = False
            if opened and not waited and not self._released.is_set():
                await self._until_released()
                # Whoever opened it meanwhile has it: look again.
                waited = True
                continue
            if not opened and not self._released.is_set():
                _log.warning("%s has not opened %s in all this time", self.owner, self.actor.gpu.address)
            if await self._let_go():
                return

    @property
    def _mine(self) -> bool:
        return self.actor.owner == self.owner and not self._over

    async def _until_opened(self) -> bool:
        """Whether somebody has it open, as soon as libvirt says so, and no later than the grace allows."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rules.start_grace):
                while not self._released.is_set():
                    await self._opened.wait()
                    if not self._released.is_set():
                        self._opened.clear()
                        if await self._holders():
                            return True
        return False

    async def _until_released(self) -> None:
        """QEMU is gone; libvirt says so in a moment, unless it is gone as well."""
        try:
            async with asyncio.timeout(self._rules.release_grace):
                await self._released.wait()
        except TimeoutError:
            _log.warning("%s has let go of %s, and nobody said so", self.owner, self.actor.gpu.address)

    async def _holders(self) -> tuple[Holder, ...] | None:
        """Who has it open by vfio; one nameless holder where nobody can tell."""
        groups = tuple(f"vfio/{number}" for number in self.actor.gpu.groups(self.actor.facts))
        try:
            async with asyncio.timeout(self.actor.config.deadlines.holders):
                return (await self._processes.scan(Sought(self.actor.gpu.functions, groups))).holders
        except (KernelError, TimeoutError) as error:
            _log.warning("cannot tell whether %s still has %s: %s", self.owner, self.actor.gpu.address, error)
            return (Holder(None, "somebody"),)

    async def _stirred(self, holders: tuple[Holder, ...]) -> None:
        """Until something may have become of them. What is no process makes no event: look again each second."""
        known = all(holder.process is not None for holder in holders)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if known else RESCAN_SECONDS):
                await self._processes.stirred(holders)

    # The end --------------------------------------------------------------------------------------------------------

    async def _let_go(self) -> bool:
        """Send it where the configuration says; False where somebody has opened it a moment ago."""
        if self._where_to() is Release.HOST and self.actor.state is not State.ABSENT:
            self.letting_go = True
            try:
                switch = await self.actor.request(State.HOST, asker=Asker(service=True, vm=self.owner.name))
                await switch.wait()
                await self.actor.rest()
                if switch.result is not Result.DONE:
                    _log.warning("%s did not come home from %s: %s", self.actor.gpu.address, self.owner, switch.reason)
            except Owned as error:
                _log.info("%s", error)
                self.letting_go = False
                return not self._mine
            except GpuswitchError as error:
                self._complain(error)
        if self._mine and not self.actor.awaited:
            self.actor.own(None)
            if self.actor.state in {State.VFIO, State.ABSENT}:
                await self.actor.pay()
        return True

    def _complain(self, error: GpuswitchError) -> None:
        if self._mine:
            self.actor.note(f"{self.owner} is done with {self.actor.gpu.address}, which stays where it is: {error}")
        _log.warning("%s stays where %s left it: %s", self.actor.gpu.address, self.owner, error)

    def _where_to(self) -> Release:
        rules = self._rules
        own = {"saved": rules.on_saved, "migrated": rules.on_migrated}.get(self._reason)
        return own or rules.on_release

    @property
    def _rules(self) -> Defaults:
        return self.actor.config.gpu(self.actor.gpu.address).rules
