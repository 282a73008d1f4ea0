"""What a service sees of the simulated host, for as long as it lives. Whatever it has sent goes on when it is killed.

Every word to the kernel, to systemd, to a process and to the journal passes here: a killed service gets none through.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from signal import Signals
from typing import Any, NamedTuple, Protocol, TypeVar

from gpuswitch.errors import KernelError
from gpuswitch.host.port import StartJob
from gpuswitch.host.simulated.device_nodes import SimulatedDeviceNodes
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.host import SimulatedHost, SimulatedKernel, said
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.host.simulated.processes import SimulatedProcesses
from gpuswitch.host.simulated.systemd import SimulatedSystemd
from gpuswitch.model.access import UserAccess
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.holders import Holder, HolderQuery, Process, Scan, Unit
from gpuswitch.runtime.apart import apart
from tests.harness.simulation.loop import LIFE, Killed, Life, SimulatedLoop

T = TypeVar("T")
SEND = "send"
WRITE, WRITTEN = "write", "written"
"""Points that a life reaches: right before it sends an operation, before and after it writes to the journal."""


class At(NamedTuple):
    """Where in a switch something happens: at which step of whose, and whether that is taken back."""

    gpu: str
    step: str
    back: bool = False


NOWHERE = At("", "")
AT: ContextVar[At] = ContextVar("AT", default=NOWHERE)
"""Set by the step that runs; what it sends to the kernel inherits it."""
FROM: ContextVar[str] = ContextVar("FROM", default="")
"""Who has sent the operation that runs: the worker of this GPU, or `_SERVICE`; "" is somebody else."""
_SERVICE = "the service"


@dataclass
class Senses:
    """What keeps a service from seeing: so many looks at the host from now on fail, so many waits for holders."""

    blind: int = 0
    deaf: int = 0

    blinded: bool = False
    """The last look has failed."""

    def sees(self) -> bool:
        self.blinded = bool(self.blind)
        self.blind = max(0, self.blind - 1)
        return not self.blinded

    def hears(self) -> bool:
        self.deaf = max(0, self.deaf - 1) if (deaf := self.deaf) else 0
        return not deaf


INHIBIT_SECONDS = 0.1
"""Until the process that is to have the lock has started."""
RELEASE_SECONDS = 0.05
"""From when the process that has a lock is told to end until it is gone: less than a service takes to start again."""


class Watcher(Protocol):
    """Hears of what a service does, as it does it."""

    def sends(self, gpu: str, call: Call) -> None: ...
    def scans(self, query: HolderQuery, scan: Scan) -> None: ...
    def signals(self, process: Process, number: Signals) -> None: ...
    def ends_session(self, session: str) -> None: ...


class ServiceHost(SimulatedHost):
    """The host, as one life of the service has it."""

    def __init__(self, machine: Machine, life: Life, watcher: Watcher, senses: Senses) -> None:
        super().__init__(machine)
        self._life = life
        self._senses = senses
        self._watcher = watcher
        self._loop = _loop()
        self.deaf = False
        self.processes: ServiceProcesses = ServiceProcesses(machine, machine.processes)
        self.processes.of(life, watcher, senses)
        self.device_nodes: ServiceDeviceNodes = ServiceDeviceNodes(machine, life)
        self.systemd: ServiceSystemd = ServiceSystemd(machine, machine.units)
        self.systemd.of(life, watcher)

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        self._life.check()
        return super().look(only)

    def _blind(self) -> int:
        return 0 if self._senses.sees() else errno.EMFILE

    def kernel(self, gpu: str) -> SimulatedKernel:
        if gpu not in self._kernels:
            self._kernels[gpu] = ServiceKernel(self.machine, gpu).of(self._life, self._watcher)
        return self._kernels[gpu]

    def reader(self, gpu: str) -> SimulatedKernel:
        if gpu not in self._readers:
            self._readers[gpu] = ServiceKernel(self.machine, gpu, "reader").of(self._life, self._watcher)
        return self._readers[gpu]

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        def told() -> None:
            if self._life.alive and not self.deaf:
                self._loop.tell(self._life, changed)

        return super().watch(told)

    async def close(self) -> None:
        if self._life.alive:
            await super().close()


class ServiceDeviceNodes(SimulatedDeviceNodes):
    """The nodes of vfio, as one life of the service has them: it may end before it changes anything about them."""

    def __init__(self, machine: Machine, life: Life) -> None:
        super().__init__(machine)
        self._life = life

    def give(self, access: UserAccess) -> None:
        self._life.reached(SEND)
        super().give(access)

    def take(self, access: UserAccess) -> None:
        self._life.reached(SEND)
        super().take(access)


class ServiceKernel(SimulatedKernel):
    """The worker of one GPU."""

    def of(self, life: Life, watcher: Watcher) -> ServiceKernel:
        self._life, self._watcher, self._loop = life, watcher, _loop()
        return self

    async def _run(self, work: Callable[[Call], Coroutine[Any, Any, T]], call: Call) -> T:
        self._life.reached(SEND)
        if (pending := self.pending) is not None:
            message = f"the kernel has not returned from this: {pending.what}"
            raise KernelError(call.verb, call.subject, errno.EBUSY, message, whole=call.whole)
        self._watcher.sends(self._gpu, call)
        worker = self._loop.run_as(None, self._running_worker)
        result: T = await apart(self._loop.run_as(None, self._give, work, call))
        return said(worker, call, result)

    def _give(self, work: Callable[[Call], Coroutine[Any, Any, T]], call: Call) -> asyncio.Task[T]:
        FROM.set(self._gpu)
        return self._running_worker().give(work, call)


class ServiceProcesses(SimulatedProcesses):
    """A look for holders is made by a process of its own."""

    def of(self, life: Life, watcher: Watcher, senses: Senses) -> None:
        self._life, self._watcher, self._senses, self._loop = life, watcher, senses, _loop()

    async def scan(self, query: HolderQuery) -> Scan:
        self._life.reached(SEND)
        work = self._scanned(super().scan(query), query)
        return await apart(self._loop.run_as(None, _started, work))

    async def _scanned(self, work: Coroutine[Any, Any, Scan], query: HolderQuery) -> Scan:
        scan = await work
        # Before anybody else opens or closes anything.
        self._watcher.scans(query, scan)
        return scan

    async def wait_for_change(self, holders: Sequence[Holder]) -> None:
        self._life.check()
        if not self._senses.hears():
            raise KernelError("watch", "the holders", errno.EMFILE, os.strerror(errno.EMFILE))
        await super().wait_for_change(holders)

    def signal(self, process: Process, number: Signals) -> bool:
        self._life.reached(SEND)
        self._watcher.signals(process, number)
        return self._loop.run_as(None, super().signal, process, number)


class ServiceSystemd(SimulatedSystemd):
    """Jobs are cancelled with those who asked for them, but not by their death."""

    def of(self, life: Life, watcher: Watcher) -> None:
        self._life, self._watcher, self._loop = life, watcher, _loop()

    async def _job(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._life.reached(SEND)
        except Killed:
            work.close()
            raise
        job = self._loop.run_as(None, _started, work)
        try:
            return await apart(job)
        except asyncio.CancelledError:
            if self._life.alive:
                job.cancel()
            raise

    async def active(self, units: Collection[Unit]) -> frozenset[Unit]:
        return await self._job(super().active(units))

    async def sockets(self, unit: Unit) -> tuple[Unit, ...]:
        return await self._job(super().sockets(unit))

    async def stop(self, unit: Unit) -> None:
        await self._job(super().stop(unit))

    async def start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        if LIFE.get() is None:
            await super().start(unit, job)
        else:
            await self._job(super().start(unit, job))

    async def queue_start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        await self._job(super().queue_start(unit, job))

    async def end_session(self, session: str) -> None:
        self._watcher.ends_session(session)
        await self._job(super().end_session(session))

    async def inhibit(self, gpu: str) -> None:
        await self._job(self._begun(partial(super().inhibit, gpu)))

    async def _begun(self, inhibit: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await asyncio.sleep(INHIBIT_SECONDS)
        await inhibit()

    async def release(self, gpu: str) -> None:
        await self._job(self._ended(partial(super().release, gpu)))

    async def _ended(self, release: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """While it is at its end, it is still to be seen, and keeps the machine awake."""
        try:
            await asyncio.sleep(RELEASE_SECONDS)
        except asyncio.CancelledError:
            # It was told to end, and does so whoever waits for it.
            self._loop.call_later(RELEASE_SECONDS, lambda: self._loop.begin(None, release()))
            raise
        await release()


@dataclass
class Disk:
    """Where the journal is kept: it lives as long as the machine.

    `full`: nothing can be written but where room was reserved; `read_only`: nothing at all. `failing`: so many writes
    from now on fail with EIO. `stale` are the pages that the service could not write, or remove, when it last tried.
    `notes` are beside the pages, and about no GPU.
    """

    pages: dict[str, bytes]
    aside: list[bytes]
    reserved: set[str]
    full: bool = False
    read_only: bool = False
    failing: int = 0
    stale: set[str] = field(default_factory=set)
    notes: dict[str, bytes] = field(default_factory=dict)

    def kept(self, name: str) -> dict[str, bytes]:
        """Where what has this name is."""
        return self.notes if name == "at_boot" else self.pages

    @classmethod
    def empty(cls) -> Disk:
        return cls({}, [], set())

    def healthy(self) -> None:
        self.full, self.read_only, self.failing = False, False, 0


class ServiceStore:
    """The journal's store (`gpuswitch.switch.journal.store`), as one life of the service has it.

    Each write happens whole, or not at all: that is what a store has to promise.
    """

    def __init__(self, disk: Disk, life: Life) -> None:
        self._disk = disk
        self._life = life

    def names(self) -> list[str]:
        self._life.check()
        return sorted(self._disk.pages)

    def where(self, name: str) -> str:
        return f"page {name}"

    def read(self, name: str) -> bytes:
        self._life.check()
        if name not in self._disk.kept(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._disk.kept(name)[name]

    def reserve(self, name: str) -> None:
        self._write(name)
        if self._disk.full and name not in self._disk.reserved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._disk.reserved.add(name)
        self._life.reached(WRITTEN)

    def replace(self, name: str, content: bytes) -> None:
        self._write(name)
        if self._disk.full:
            if name not in self._disk.reserved:
                self._disk.stale.add(name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # What the old page leaves is not enough to reserve as much again.
            self._disk.reserved.discard(name)
        self._disk.kept(name)[name] = content
        self._disk.stale.discard(name)
        self._life.reached(WRITTEN)

    def remove(self, name: str) -> None:
        self._write(name)
        self._disk.pages.pop(name, None)
        self._disk.stale.discard(name)
        self._disk.reserved.discard(name)
        self._life.reached(WRITTEN)

    def set_aside(self, name: str) -> None:
        self._write(name)
        self._disk.aside.append(self._disk.pages.pop(name))
        self._life.reached(WRITTEN)

    def _write(self, name: str) -> None:
        self._life.reached(WRITE)
        if self._disk.read_only:
            self._disk.stale.add(name)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self._disk.failing:
            self._disk.failing -= 1
            self._disk.stale.add(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def _started(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    FROM.set(_SERVICE)
    return asyncio.get_running_loop().create_task(work)


def _loop() -> SimulatedLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    return loop
