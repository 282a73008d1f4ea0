"""The port, on the machine that we run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpuswitch.host.linux import uevents
from gpuswitch.host.linux.sysfs import Roots, Sysfs
from gpuswitch.host.linux.worker import LinuxKernel
from gpuswitch.model.facts import HostFacts
from gpuswitch.switch.host import Host


class LinuxHost(Host):
    """A real host. `roots` say where its files lie; a test may have them elsewhere."""

    def __init__(self, roots: Roots | None = None) -> None:
        self._roots = roots or Roots()
        self._sysfs = Sysfs(self._roots)
        self._kernels: dict[str, LinuxKernel] = {}

    def look(self) -> HostFacts:
        return self._sysfs.look()

    def kernel(self, gpu: str) -> LinuxKernel:
        if gpu not in self._kernels:
            self._kernels[gpu] = LinuxKernel(gpu, self._roots)
        return self._kernels[gpu]

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        return uevents.watch(changed)

    async def close(self) -> None:
        await asyncio.gather(*(kernel.close() for kernel in self._kernels.values()))
