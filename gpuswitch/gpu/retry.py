"""What becomes of a GPU whose way home ended elsewhere: it is tried once more after each event that may change that.

Another user of it is gone; its driver is registered anew, by a module that was loaded. (The service starts, or somebody
asks for it: those are others' affair.) What an attempt of ours does is none of them: they count from its end on.
"""

from __future__ import annotations

import asyncio
import logging

from gpuswitch.errors import Failed, GpuswitchError, KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.facts import HostFacts
from gpuswitch.runtime.pause import Pause, whatever_happens

_log = logging.getLogger(__name__)


class Pace:
    """Of the attempts for one GPU: the first one is made at once; the others, however fast the events come, are not."""

    def __init__(self) -> None:
        self._pause = Pause()
        self._begun = False

    async def wait(self) -> None:
        if self._begun:
            await self._pause.wait()
        self._begun = True


class Retry:
    """One more attempt for one GPU, from the end of the last one on: over when it was made, or is not needed."""

    def __init__(self, actor: Actor, host: Host, pace: Pace) -> None:
        self.actor = actor
        self.made = False
        """From here on, it is a switch like any other."""
        self._after = actor.switch
        self._host = host
        self._pace = pace
        self._registration = self._now(actor.record.facts)
        self._registered = asyncio.Event()
        self._task = asyncio.create_task(whatever_happens(self._once, actor.gpu))

    @property
    def is_needed(self) -> bool:
        """Whether nothing has changed but what it waits for."""
        return bool(self.actor.record.stays_out) and self.actor.switch is self._after and not self._task.done()

    def see(self, facts: HostFacts) -> None:
        """Take in a look at the host."""
        now = self._now(facts)
        if now is not None and now != self._registration:
            self._registered.set()
        self._registration = now

    def stop(self) -> None:
        """Wait no longer. An attempt that has begun goes on."""
        if not self.made:
            self._task.cancel()

    async def _once(self) -> None:
        why = await self._event()
        await self._pace.wait()
        self.made = True
        pause = Pause()
        try:
            # Who refuses it now may not do so later, and that makes no event.
            while self.is_needed and not await self.actor.try_again(why):
                await pause.wait()
        except GpuswitchError as error:
            _log.warning("%s", error, extra=told(GPU=self.actor.gpu.address))

    async def _event(self) -> str:
        """Wait for one; which it is."""
        events = {
            asyncio.create_task(self._until_a_user_is_gone()): "another user of it is gone",
            asyncio.create_task(self._registered.wait()): "its driver's module was loaded anew",
        }
        try:
            done, _ = await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            task = done.pop()
            task.result()
            return events[task]
        finally:
            for task in events:
                task.cancel()

    async def _until_a_user_is_gone(self) -> None:
        pause, before = Pause(), frozenset[object]()
        while True:
            try:
                holders = await self.actor.holders()
            except Failed as error:
                _log.warning("%s", error, extra=told(GPU=self.actor.gpu.address))
                await pause.wait()
                continue
            now = frozenset(holder.process or holder.doubt for holder in holders)
            if before - now:
                return
            before = now
            if not now:
                # Who opens it from here on has it from somebody who knows how it is.
                await asyncio.Event().wait()
            if not all(holder.process for holder in holders):
                # No event tells of the kernel's own use.
                await pause.wait()
                continue
            try:
                await self._host.processes.wait_for_change(holders)
            except KernelError:
                await pause.wait()

    def _now(self, facts: HostFacts) -> int | None:
        return facts.registrations.get(self.actor.record.home_driver or self.actor.record.host_driver or "")
