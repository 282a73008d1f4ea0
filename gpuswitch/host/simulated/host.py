"""The port, on a machine in memory."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from gpuswitch.errors import KernelError
from gpuswitch.host.operation import Request
from gpuswitch.host.port import Host, Kernel, KernelLog, Pending
from gpuswitch.host.simulated.device_nodes import SimulatedDeviceNodes
from gpuswitch.host.simulated.faults import Call, Faults
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.host.simulated.libvirt import SimulatedLibvirt
from gpuswitch.host.simulated.processes import SimulatedProcesses
from gpuswitch.host.simulated.systemd import SimulatedSystemd
from gpuswitch.host.simulated.workers import Worker
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import kernel_name
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.holders import Process
from gpuswitch.runtime.apart import apart

T = TypeVar("T")


class SimulatedHost(Host):
    """A host whose kernel is `machine`; `faults` are what is to go wrong with it.

    `machine` has what the port has not, since others do it: `open` and `close` of a device, `start_vm`, `unplug` ...
    A second host on the same machine is the next run of the service: it has the first one's workers no more, but those
    that the kernel has.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._kernels: dict[str, SimulatedKernel] = {}
        self._readers: dict[str, SimulatedKernel] = {}
        self._watchers: list[Callable[[], None]] = []
        self._told = False
        self.processes = SimulatedProcesses(machine, machine.processes)
        self.device_nodes: SimulatedDeviceNodes = SimulatedDeviceNodes(machine)
        self.systemd = SimulatedSystemd(machine, machine.units)
        self.libvirt = SimulatedLibvirt(machine, machine.libvirt)
        self.kernel_log = SimulatedKernelLog(machine)
        for worker in list(machine.workers.values()):
            worker.let_go()
        machine.uevent = self._announce

    @property
    def faults(self) -> Faults:
        return self.machine.faults

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        if number := self._blind():
            raise Call("look at", "the host").error(number)
        if only is None:
            return self.machine.look()
        devices = self.machine.devices
        seen = {address: devices[address].seen() for address in only if address in devices}
        return HostFacts(seen, iommu=False, vfio_available=False)

    def installed(self, module: str) -> bool:
        return module in {kernel_name(name) for name in self.machine.drivers.modules}

    def _blind(self) -> int:
        """Why this look does not see everything; 0: it does."""
        return self.faults.strike("look", "").errno

    def kernel(self, gpu: str) -> SimulatedKernel:
        if gpu not in self._kernels:
            self._kernels[gpu] = SimulatedKernel(self.machine, gpu)
        return self._kernels[gpu]

    def reader(self, gpu: str) -> SimulatedKernel:
        if gpu not in self._readers:
            self._readers[gpu] = SimulatedKernel(self.machine, gpu, "reader")
        return self._readers[gpu]

    def boottime(self) -> float:
        # A machine in memory never sleeps: its clock is that of whoever runs it.
        return asyncio.get_running_loop().time()

    async def until(self, boottime: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(boottime):
                await asyncio.Event().wait()

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        # Wrapped, so that the same callable may watch twice, and each stops itself only.
        def watcher() -> None:
            changed()

        self._watchers.append(watcher)

        def stop() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        return stop

    async def close(self) -> None:
        for kernel in (*self._kernels.values(), *self._readers.values()):
            kernel.let_go()

    def _announce(self) -> None:
        """Tell the watchers in the next turn of the loop, once for all that happens until then."""
        if self._watchers and not self._told:
            self._told = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._told = False
        for watcher in list(self._watchers):
            watcher()


class SimulatedKernelLog(KernelLog):
    """What the machine's kernel said, in order; a mark is how many lines there were."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def mark(self) -> float:
        return len(self._machine.log)

    async def said(self, functions: Collection[PciAddress], names: Collection[str], mark: float) -> tuple[str, ...]:  # noqa: ARG002 -- each line is about a device
        return tuple(text for function, text in self._machine.log[int(mark) :] if function in functions)


class SimulatedKernel(Kernel):
    """The kernel operations of one GPU. Each runs to its end, whatever becomes of its caller.

    `role`: what the process that does them is called.
    """

    def __init__(self, machine: Machine, gpu: str, role: str = "worker") -> None:
        self._machine = machine
        self._gpu = gpu
        self._role = role
        self._held: set[int] = set()
        self._worker: Worker | None = None

    def prepare(self) -> None:
        """A worker that is needed is there at once."""

    async def perform(self, request: Request) -> Any:
        work = partial(_done, self._machine, request)
        return await self._run(work, Call(request.words.verb, request.words.subject, request.words.whole, request))

    async def unbind(self, function: PciAddress, driver: str) -> None:
        if lost := self._lost:
            nodes = ", ".join(f"/dev/vfio/{group}" for group in sorted(lost))
            raise KernelError("unbind", str(function), errno.EIO, f"the worker that held {nodes} is gone")
        await super().unbind(function, driver)

    async def hold_group(self, group: int) -> None:
        await super().hold_group(group)
        self._held.add(group)

    async def release_group(self, group: int) -> None:
        await super().release_group(group)
        self._held.discard(group)

    @property
    def worker(self) -> Process | None:
        return self._worker.process if self._worker is not None else None

    def adopt(self, pending: Pending) -> bool:
        process = pending.worker
        if process is not None and (number := self._machine.faults.strike("adopt", process.pid).errno):
            raise Call("find", f"process {process.pid}").error(number)
        worker = self._machine.workers.get(process) if process is not None else None
        if worker is None or worker.pending is None:
            return False
        self._worker = worker
        return True

    @property
    def pending(self) -> Pending | None:
        return self._worker.pending if self._worker is not None else None

    async def returned(self) -> None:
        if self._worker is not None:
            await self._worker.returned()

    @property
    def _lost(self) -> set[int]:
        """The groups that were held by a worker that is gone."""
        user = self._worker.user if self._worker is not None else ""
        return {number for number in self._held if self._machine.group(number).opened_by != user}

    def let_go(self) -> None:
        """An idle worker ends, and with it what it has open. One that the kernel has does so when that returns."""
        if self._worker is not None:
            self._worker.let_go()

    def _running_worker(self) -> Worker:
        if self._worker is None or self._worker.ended:
            self._worker = self._machine.worker(self._gpu, self._role)
        return self._worker

    async def _run(self, work: Callable[[Call], Coroutine[Any, Any, T]], call: Call) -> T:
        """Give one operation to the kernel. Cancelled, we only stop waiting for it."""
        if (pending := self.pending) is not None:
            message = f"the kernel has not returned from this: {pending.what}"
            raise KernelError(call.verb, call.subject, errno.EBUSY, message, whole=call.whole)
        worker = self._running_worker()
        return said(worker, call, await apart(worker.give(work, call)))


def said(worker: Worker, call: Call, result: T) -> T:
    """What a worker says of what it did: one that died of it says nothing."""
    if worker.died:
        raise KernelError(call.verb, call.subject, errno.EIO, "its worker died")
    return result


def parts_of(machine: Machine) -> tuple[object, ...]:
    """Who does the operations that write no attribute, by methods of their names."""
    return machine, machine.modules, machine.frame_buffers, machine.hotplug


async def _done(machine: Machine, request: Request, call: Call) -> Any:
    """What the machine's kernel does, and returns."""
    operation = request.operation
    if operation.attribute:
        [values] = request.arguments.values()
        return await machine.write(operation.name, operation.attribute, values, call)
    part = next(part for part in parts_of(machine) if hasattr(part, operation.name))
    return await getattr(part, operation.name)(**request.arguments, call=call)
