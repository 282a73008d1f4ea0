"""The managers of units and sessions, behind the port that `host/port.py` owns. Each call goes to its manager."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.logind import Inhibitors, Sessions
from gpuswitch.host.linux.systemunits import SystemUnits
from gpuswitch.host.linux.userunits import UserUnits
from gpuswitch.host.port import StartJob, Systemd
from gpuswitch.model.holders import Unit

log = logging.getLogger(__name__)

_LEFT_BEHIND_SECONDS = 10.0


class LinuxSystemd(Systemd):
    """systemd, the users' instances of it, and logind, as they are on this machine.

    `tools`: the folders that may have systemctl and systemd-inhibit, joined by colons; `run` is /run, or what a test
    has for it. The system bus is the one that DBUS_SYSTEM_BUS_ADDRESS names, where it is set.
    """

    def __init__(self, tools: str, run: Path = Path("/run")) -> None:
        self._left_behind: set[asyncio.Task[None]] = set()
        self._system = SystemUnits(run, self._in_background)
        self._users = UserUnits(tools, run, self._in_background)
        self._sessions = Sessions()
        self._inhibitors = Inhibitors(tools)

    async def active(self, units: Collection[Unit]) -> frozenset[Unit]:
        names = await self._system.active([unit.name for unit in units if unit.user is None])
        others = [unit for unit in units if unit.user is not None and await self._users.active(unit)]
        return frozenset([*map(Unit, names), *others])

    async def missing(self, units: Collection[Unit]) -> frozenset[Unit]:
        return frozenset(map(Unit, await self._system.missing([unit.name for unit in units if unit.user is None])))

    async def canonical(self, unit: Unit) -> Unit:
        return unit if unit.user is not None else Unit(await self._system.canonical(unit.name))

    async def sockets(self, unit: Unit) -> tuple[Unit, ...]:
        if unit.user is None:
            names = await self._system.triggers(unit.name)
        else:
            names = await self._users.triggers(unit)
        return tuple(sorted(await self.active([Unit(name, unit.user) for name in names])))

    async def stop(self, unit: Unit) -> None:
        if unit.user is None:
            await self._system.stop(unit.name)
        else:
            await self._users.stop(unit)

    async def start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        if unit.user is None:
            await self._system.start(unit.name, job)
        else:
            await self._users.start(unit, job)

    async def queue_start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        if unit.user is None:
            await self._system.queue_start(unit.name, job)
        else:
            await self._users.queue_start(unit, job)

    async def sessions(self, uid: int) -> tuple[str, ...]:
        return await self._sessions.of(uid)

    async def end_session(self, session: str) -> None:
        await self._sessions.end(session)

    async def stopping(self) -> bool:
        return await self._system.stopping()

    async def booting(self) -> bool:
        return await self._system.booting()

    async def inhibit(self, gpu: str) -> None:
        await self._inhibitors.inhibit(gpu)

    async def uninhibited(self, gpu: str) -> None:
        await self._inhibitors.uninhibited(gpu)

    async def release(self, gpu: str) -> None:
        await self._inhibitors.release(gpu)

    async def close(self) -> None:
        """Wait until the jobs of callers that were cancelled are cancelled too; ten seconds at most."""
        await asyncio.gather(*self._left_behind)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        async def best_effort() -> None:
            try:
                async with asyncio.timeout(_LEFT_BEHIND_SECONDS):
                    await work
            except (KernelError, TimeoutError) as error:
                log.warning("%s", error if isinstance(error, KernelError) else "the job of a unit is not cancelled")

        task = asyncio.get_running_loop().create_task(best_effort())
        self._left_behind.add(task)
        task.add_done_callback(self._left_behind.discard)
