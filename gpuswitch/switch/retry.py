"""What becomes of a GPU whose way home ended elsewhere: it is tried once more after each event that may change that.

Another user of it is gone; its driver is registered anew, by a module that was loaded. (The service starts, or somebody
asks for it: those are others' affair.) What our own attempt does is none of them: they are counted from its end on.
"""

from __future__ import annotations

import asyncio
import logging

from gpuswitch.errors import Failed, KernelError
from gpuswitch.model.facts import HostFacts
from gpuswitch.switch.actor import Actor
from gpuswitch.switch.host import Host
from gpuswitch.switch.pause import Pause

_log = logging.getLogger(__name__)


class Retry:
    """Of one GPU, from the end of one attempt until it is home, or somebody's, or moved by somebody."""

    def __init__(self, actor: Actor, host: Host) -> None:
        self._actor = actor
        self._host = host
        self._registration = self._now(actor.facts)
        self._registered = asyncio.Event()
        # However fast the events come, the attempts do not.
        self._pause: Pause | None = None
        self._task = asyncio.create_task(self._watched())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def see(self, facts: HostFacts) -> None:
        """Take in a look at the host."""
        if self._actor.busy:
            return
        now = self._now(facts)
        if now is not None and now != self._registration:
            self._registered.set()
        self._registration = now

    def stop(self) -> None:
        """An attempt that has begun is a switch like any other, and goes on."""
        self._task.cancel()

    async def _watched(self) -> None:
        """Follow it, whatever goes wrong meanwhile."""
        while self._actor.stays_out:
            try:
                await self._once()
            except Exception as fault:  # noqa: BLE001 -- whatever it was, it goes on, and is told
                _log.critical("a fault of gpuswitch itself: %s is watched anew", self._actor.gpu, exc_info=fault)

    async def _once(self) -> None:
        events = {
            asyncio.create_task(self._until_a_user_is_gone()): "another user of it is gone",
            asyncio.create_task(self._registered.wait()): "its driver's module was loaded anew",
        }
        try:
            done, _ = await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in events:
                task.cancel()
        if self._pause is not None:
            await self._pause.wait()
        self._pause = self._pause or Pause()
        if not self._actor.stays_out:
            return
        await self._actor.try_again(events[done.pop()])
        await self._actor.rest()
        self._registration = self._now(self._actor.facts)
        self._registered.clear()

    async def _until_a_user_is_gone(self) -> None:
        pause, before = Pause(), frozenset[object]()
        while True:
            try:
                holders = await self._actor.holders()
            except Failed as error:
                _log.warning("%s", error)
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
                await self._host.processes.stirred(holders)
            except KernelError:
                await pause.wait()

    def _now(self, facts: HostFacts) -> int | None:
        return facts.registrations.get(self._actor.host_driver or "")
