"""Waits until libvirt has cleared up after a machine: before that, what the machine had stays on vfio (`books`).

This goes by the books for as long as libvirt's daemon is there. Where it is not, it is started, and only one that
cannot be had is not waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.port import Host
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.owner import Owner
from gpuswitch.runtime.pause import Pause
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.books import LOOK_SECONDS, Change, machines_with, watching

_log = logging.getLogger(__name__)

_SOCKETS = {Unit("libvirtd.socket"): Unit("libvirtd.service"), Unit("virtqemud.socket"): Unit("virtqemud.service")}
"""The units of whoever may have the books, by the sockets that tell which of them this machine runs."""
_MANAGER_SECONDS = 5.0
_NOTHING_SECONDS = 0.001
"""Too short to be waited for: what is left of a sum of seconds may be less than the clock can tell."""
_COMING_SECONDS = 600.0
"""How long a daemon whose unit is active may take until it has its books: it has told systemd that it is ready before
(remote_daemon.c), and may wait for a storage pool, say."""


class ClearingUp:
    """After `owner`, or any machine but the one named `besides`, that had `functions`.

    `may_start` is set when libvirt may be started. That is not before our own READY: its unit is ordered after ours.
    """

    def __init__(
        self,
        host: Host,
        arbiter: Arbiter,
        functions: Callable[[], Collection[PciAddress]],
        *,
        owner: Owner | None = None,
        besides: str = "",
        may_start: asyncio.Event | None = None,
    ) -> None:
        self._libvirt = host.libvirt
        self._systemd = host.systemd
        self._arbiter = arbiter
        self._functions = functions
        self._owner = owner
        self._besides = besides
        self._may_start = may_start
        self._untold = Pause()
        self._rest = Pause()
        self._next_start = float("-inf")
        self._starting: asyncio.Task[None] | None = None

    def is_over(self) -> bool:
        """Whether libvirt has nothing of it in its books.

        Raises:
            KernelError: nobody can tell.
        """
        found = machines_with(self._libvirt, self._functions(), besides=self._besides)
        return self._owner not in found if self._owner is not None else not found

    async def wait(self, patience: float) -> bool:
        """Until it is over; False once the daemon that would do it was away for `patience` seconds in all."""
        try:
            return await self._waited(patience)
        finally:
            if self._starting is not None:
                self._starting.cancel()

    async def _waited(self, patience: float) -> bool:
        loop = asyncio.get_running_loop()
        away, coming = patience, _COMING_SECONDS
        while True:
            with watching(self._libvirt, self._untold) as change:
                over, there = self._seen()
                if over:
                    return True
                if there:
                    await change.come(LOOK_SECONDS)
                    continue
                if min(away, coming) < _NOTHING_SECONDS:
                    return False
                if self._may_start is not None and not self._may_start.is_set():
                    await _first(change.event.wait(), self._may_start.wait())
                    continue
                begun = loop.time()
                active = await self._brought(change, away)
                spent = loop.time() - begun
                away, coming = (away, coming - spent) if active else (away - spent, coming)

    def _seen(self) -> tuple[bool, bool]:
        """Whether it is over, and whether the daemon is there. What nobody can tell is not so."""
        over = there = False
        try:
            there = self._libvirt.running()
            over = self.is_over()
        except KernelError as error:
            _log.warning("%s", error)
        return over, there

    async def _brought(self, change: Change, seconds: float) -> bool:
        """Have the daemon started, and wait for what comes of it; whether its unit is active all the same."""
        loop = asyncio.get_running_loop()
        if self._starting is not None and self._starting.done():
            self._starting = None
        active = await self._active()
        if not active and self._starting is None and loop.time() >= self._next_start:
            # Where it dies, or cannot be started, that is tried again, more and more rarely.
            self._next_start = loop.time() + self._rest.seconds()
            self._starting = asyncio.create_task(self._start())
        seconds = min(seconds, max(self._next_start - loop.time(), 1.0))
        if self._starting is None:
            await change.come(seconds)
        else:
            await _first(change.come(seconds), asyncio.wait({self._starting}))
        return active

    async def _active(self) -> bool:
        try:
            async with asyncio.timeout(_MANAGER_SECONDS):
                return bool(await self._systemd.active(_SOCKETS.values()))
        except (KernelError, TimeoutError):
            return False

    async def _start(self) -> None:
        """The one whose socket is active, else any that is installed."""
        try:
            if await self._arbiter.system_stopping():
                return
            sockets = await self._systemd.active(_SOCKETS)
            missing = await self._systemd.missing(_SOCKETS.values())
            there = [unit for unit in _SOCKETS.values() if unit not in missing]
            for unit in [*(_SOCKETS[socket] for socket in _SOCKETS if socket in sockets), *there][:1]:
                whom = self._owner or "a virtual machine"
                _log.warning("libvirt is not there to clear up after %s: %s is started", whom, unit)
                await self._systemd.start(unit)
        except KernelError as error:
            _log.warning("%s", error)


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Until the first of them is over; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
