"""The port, on the machine that we run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from gpuswitch.host.linux import clock, uevents
from gpuswitch.host.linux.device_nodes import LinuxDeviceNodes
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.linux.kernellog import LinuxKernelLog
from gpuswitch.host.linux.libvirt import LinuxLibvirt
from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.sysfs import Roots, Sysfs
from gpuswitch.host.linux.systemd import LinuxSystemd
from gpuswitch.host.port import Host
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts


class LinuxHost(Host):
    """A real host. `roots` say where its files lie; a test may have them elsewhere."""

    def __init__(self, roots: Roots | None = None) -> None:
        self._roots = roots or Roots()
        self._sysfs = Sysfs(self._roots)
        self.processes = LinuxProcesses(self._roots)
        self.device_nodes = LinuxDeviceNodes(self._roots)
        self.systemd = LinuxSystemd(self._roots.tools)
        self.libvirt = LinuxLibvirt(self._roots.libvirt)
        self.kernel_log = LinuxKernelLog(self._roots.tools)
        self._kernels: dict[str, LinuxKernel] = {}
        self._readers: dict[str, LinuxKernel] = {}
        self._watchers: dict[object, Callable[[], None]] = {}
        self._unwatch: Callable[[], None] | None = None

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        return self._sysfs.look(only)

    def installed(self, module: str) -> bool:
        return self._sysfs.installed(module)

    def kernel(self, gpu: str) -> LinuxKernel:
        if gpu not in self._kernels:
            self._kernels[gpu] = LinuxKernel(gpu, self._roots)
        return self._kernels[gpu]

    def reader(self, gpu: str) -> LinuxKernel:
        if gpu not in self._readers:
            self._readers[gpu] = LinuxKernel(gpu, self._roots, "reader")
        return self._readers[gpu]

    def boottime(self) -> float:
        return clock.boottime()

    async def until(self, boottime: float) -> None:
        await clock.until(boottime)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        # One pair of sockets for all: steps come and go by the second, and each would start with a search for libudev.
        if self._unwatch is None:
            self._unwatch = uevents.watch(self._tell)
        watcher = object()
        self._watchers[watcher] = changed
        return lambda: self._forget(watcher)

    def _tell(self) -> None:
        for changed in list(self._watchers.values()):
            changed()

    def _forget(self, watcher: object) -> None:
        self._watchers.pop(watcher, None)
        if not self._watchers and self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    async def close(self) -> None:
        kernels = (kernel.close() for kernel in (*self._kernels.values(), *self._readers.values()))
        await asyncio.gather(self.processes.close(), self.systemd.close(), *kernels)
