"""The port, on a machine in memory."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.faults import Call, Faults, Operation
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, HostFacts
from gpuswitch.switch.host import Host, Kernel, Pending

T = TypeVar("T")


class SimulatedHost(Host):
    """A host whose kernel is `machine`; `faults` are what is to go wrong with it.

    `machine` has what the port has not, since others do it: `open` and `close` of a device, `start_vm`, `unplug` ...
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._kernels: dict[str, SimulatedKernel] = {}
        self._watchers: list[Callable[[], None]] = []
        self._told = False
        machine.announce = self._announce

    @property
    def faults(self) -> Faults:
        return self.machine.faults

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        facts = self.machine.look()
        if only is None:
            return facts
        return HostFacts({a: f for a, f in facts.functions.items() if a in only}, iommu=False, vfio_available=False)

    def kernel(self, gpu: str) -> SimulatedKernel:
        if gpu not in self._kernels:
            self._kernels[gpu] = SimulatedKernel(self.machine, gpu)
        return self._kernels[gpu]

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
        for kernel in self._kernels.values():
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


class SimulatedKernel(Kernel):
    """The kernel operations of one GPU. Each runs to its end, whatever becomes of its caller."""

    def __init__(self, machine: Machine, gpu: str) -> None:
        self._machine = machine
        self._user = f"the worker of {gpu}"
        self._call: Call | None = None
        self._task: asyncio.Task[Any] | None = None

    def prepare(self) -> None:
        """There is no worker to start."""

    async def capture(self, functions: Sequence[PciAddress]) -> Mapping[PciAddress, Captured]:
        async def each(call: Call) -> dict[PciAddress, Captured]:
            return {function: await self._machine.capture(function, call.about(function)) for function in functions}

        return await self._run(each, Call("read the settings of", _names(functions)))

    async def candidates(self, function: PciAddress) -> tuple[str, ...]:
        return await self._run(partial(self._machine.candidates, function), Call("find the modules for", function))

    async def load(self, module: str) -> None:
        await self._run(partial(self._machine.load, module), Call("load", module))

    async def keep_awake(self, functions: Sequence[PciAddress]) -> None:
        await self._set_power("keep_awake", dict.fromkeys(functions, "on"))

    async def set_power_control(self, control: Mapping[PciAddress, str]) -> None:
        await self._set_power("set_power_control", control)

    async def _set_power(self, operation: Operation, control: Mapping[PciAddress, str]) -> None:
        async def each(call: Call) -> None:
            for function, value in control.items():
                await self._machine.set_power(operation, function, value, call.about(function))

        await self._run(each, Call("set power/control of", _names(control)))

    async def set_override(self, overrides: Mapping[PciAddress, str | None]) -> None:
        async def each(call: Call) -> None:
            for function, driver in overrides.items():
                await self._machine.set_override(function, driver, call.about(function))

        await self._run(each, Call("set driver_override of", _names(overrides)))

    async def unbind(self, function: PciAddress, driver: str) -> None:
        what = f"unbind {function} from {driver}"
        await self._run(partial(self._machine.unbind, function, driver), Call("unbind", function, what))

    async def probe(self, function: PciAddress) -> None:
        await self._run(partial(self._machine.probe, function), Call("probe", function))

    async def hold_group(self, group: int) -> None:
        work = partial(self._machine.hold_group, group, self._user)
        await self._run(work, Call("open", f"/dev/vfio/{group}"))

    async def release_group(self, group: int) -> None:
        work = partial(self._machine.release_group, group, self._user)
        await self._run(work, Call("close", f"/dev/vfio/{group}"))

    @property
    def pending(self) -> Pending | None:
        call = self._call
        if call is None:
            return None
        return Pending(call.what, process_state=call.process_state, kernel_wait=call.kernel_wait)

    async def returned(self) -> None:
        while self._task is not None:
            await asyncio.wait([self._task])

    def let_go(self) -> None:
        """An idle worker ends, and with it what it has open. One that the kernel has stays."""
        if self._task is None:
            self._machine.end(self._user)

    async def _run(self, work: Callable[[Call], Coroutine[Any, Any, T]], call: Call) -> T:
        """Give one operation to the kernel. Cancelled, we only stop waiting for it."""
        if self._call is not None:
            message = f"the kernel has not returned from this: {self._call.what}"
            raise KernelError(call.verb, call.subject, errno.EBUSY, message)
        task = asyncio.get_running_loop().create_task(work(call))
        self._call, self._task = call, task
        task.add_done_callback(self._returned)
        return await asyncio.shield(task)

    def _returned(self, task: asyncio.Task[Any]) -> None:
        self._call = self._task = None
        if not task.cancelled():
            # Nobody may be left to take it.
            task.exception()


def _names(functions: Mapping[PciAddress, object] | Sequence[PciAddress]) -> str:
    return ", ".join(str(function) for function in functions)
