"""Waits until libvirt has cleared up after a machine: before that, what the machine had stays on vfio (`books`).

This goes by the books for as long as libvirt's daemon is there. Where it is not, it is started, and only one that
cannot be had is not waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.owner import Owner
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.books import machines_with, watching
from gpuswitch.switch.host import Host
from gpuswitch.switch.pause import Pause

_log = logging.getLogger(__name__)

_SOCKETS = {Unit("virtqemud.socket"): Unit("virtqemud.service"), Unit("libvirtd.socket"): Unit("libvirtd.service")}
"""The units of whoever may have the books, by the sockets that tell which of them this machine runs."""


class ClearingUp:
    """After `owner`, which had `functions`.

    `may_start` is set when libvirt may be started: its unit is ordered after ours, so not before READY.
    """

    def __init__(
        self,
        host: Host,
        arbiter: Arbiter,
        may_start: asyncio.Event,
        owner: Owner,
        functions: Callable[[], Collection[PciAddress]],
    ) -> None:
        self._libvirt = host.libvirt
        self._systemd = host.systemd
        self._arbiter = arbiter
        self._may_start = may_start
        self._owner = owner
        self._functions = functions
        self._pause = Pause()
        self._left = 0.0

    def is_over(self) -> bool:
        """Whether libvirt has none of it in its books.

        Raises:
            KernelError: nobody can tell.
        """
        return self._owner not in machines_with(self._libvirt, self._functions()).values()

    async def wait(self, patience: float) -> bool:
        """Until it is over; False once the daemon that would do it was away for `patience` seconds in all."""
        self._left = patience
        while self._left > 0:
            with watching(self._libvirt, self._pause) as change:
                try:
                    if self.is_over():
                        return True
                    there = self._libvirt.running()
                except KernelError as error:
                    # For as long as nobody can tell, it is as if the daemon were away.
                    _log.warning("%s", error)
                    await self._spend(change.within_a_while())
                else:
                    if there:
                        await change.come()
                    else:
                        await self._may_start.wait()
                        await self._spend(self._bring())
        return False

    async def _spend(self, work: Coroutine[Any, Any, None]) -> None:
        """Of the patience that is left."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._left):
                await work
        self._left -= loop.time() - begun

    async def _bring(self) -> None:
        """Have the daemon started. Where it dies, or cannot be started, that is tried again, more and more rarely."""
        try:
            if not await self._arbiter.system_stopping():
                for unit in await self._units():
                    _log.warning("libvirt is not there to clear up after %s: %s is started", self._owner, unit)
                    await self._systemd.start(unit)
            if self._libvirt.running():
                return
        except KernelError as error:
            _log.warning("%s", error)
        await self._pause.wait()

    async def _units(self) -> tuple[Unit, ...]:
        """The service to start: the one whose socket is active, else any that is installed."""
        active = await self._systemd.active(_SOCKETS)
        missing = await self._systemd.missing(_SOCKETS.values())
        chosen = [service for socket, service in _SOCKETS.items() if socket in active]
        return tuple([*chosen, *(service for service in _SOCKETS.values() if service not in missing)][:1])
