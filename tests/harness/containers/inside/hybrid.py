"""gpuswitchd on a simulated machine, but for its units, sessions and inhibitors, which are those of the real one.

hybrid.py OPTION...       as gpuswitchd takes them, --simulate among them

A simulated machine begins anew with the service. Where the file ON_VFIO is, the GeForce is on vfio-pci then, as a real
one still is after a switch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from unittest import mock

from gpuswitch import service
from gpuswitch.host.linux.libvirt import LinuxLibvirt
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.linux.systemd import LinuxSystemd
from gpuswitch.host.port import Host
from gpuswitch.host.simulated import scenarios
from gpuswitch.host.simulated.host import SimulatedHost, SimulatedKernel
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts


class Hybrid(Host):
    def __init__(self, simulated: SimulatedHost) -> None:
        self._simulated = simulated
        self.processes = simulated.processes
        self.device_nodes = simulated.device_nodes
        self.systemd = LinuxSystemd(Roots().tools)
        self.libvirt = LinuxLibvirt(Roots().libvirt)
        self.kernel_log = simulated.kernel_log
        # for those who make something go wrong with it
        self.machine, self.faults = simulated.machine, simulated.faults

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        return self._simulated.look(only)

    def installed(self, module: str) -> bool:
        return self._simulated.installed(module)

    def kernel(self, gpu: str) -> SimulatedKernel:
        return self._simulated.kernel(gpu)

    def reader(self, gpu: str) -> SimulatedKernel:
        return self._simulated.reader(gpu)

    def boottime(self) -> float:
        return self._simulated.boottime()

    async def until(self, boottime: float) -> None:
        await self._simulated.until(boottime)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        return self._simulated.watch(changed)

    async def close(self) -> None:
        await self._simulated.close()
        await self.systemd.close()


ON_VFIO = Path("/run/harness/on-vfio")
GEFORCE = [(0x10DE, device) for device in (0x2484, 0x228B, 0x1AD8, 0x1AD9)]


def hybrid(scenario: Callable[..., SimulatedHost]) -> Callable[[], Host]:
    return lambda: Hybrid(scenario(vfio_ids=GEFORCE if ON_VFIO.exists() else ()))


if __name__ == "__main__":
    hybrids = {name: hybrid(scenario) for name, scenario in scenarios.SCENARIOS.items()}
    with mock.patch.object(scenarios, "SCENARIOS", hybrids):
        sys.exit(service.main())
