"""The emulated PC of the VM tests, once more, in memory."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from gpuswitch.host.port import Host
from gpuswitch.host.simulated.catalogue import AUDIO, ETHERNET, INTEL, MODULES, VGA, Slot, alias, port
from gpuswitch.host.simulated.drivers import Module, PciDriver
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.host.simulated.scenarios import boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from tests.host_contract.harness import ContractHarness, ExternalActivity

BOCHS = 0x1234
GPU = PciAddress.parse("0000:01:00.0")
LONE_GPU = PciAddress.parse("0000:02:00.0")
CROWDED_GPU = PciAddress.parse("0000:05:01.0")
CONTRACT_MODULES = (
    *MODULES,
    Module("bochs", (PciDriver("bochs-drm", (alias(BOCHS, 0x03),), makes="drm", render=False),)),
    Module("e1000", (PciDriver("e1000", (alias(INTEL, 0x02, 0x00),)),)),
)


def contract_host() -> SimulatedHost:
    """A boot display, a GPU with sound, one without, and one that shares its IOMMU group with a network card."""
    slot = Slot("0000:01:00", 3, "0000:00:05.0")
    return boot(
        [
            Slot("0000:00:02", 1).function(0, BOCHS, 0x1111, VGA, boot_display=True),
            port("0000:00:05.0", 2),
            slot.function(0, BOCHS, 0x1111, VGA, reset_errno=errno.ENOTTY),
            slot.function(1, INTEL, 0x2668, AUDIO, reset_errno=errno.ENOENT),
            port("0000:00:06.0", 6),
            Slot("0000:02:00", 7, "0000:00:06.0").function(0, BOCHS, 0x1111, VGA),
            port("0000:00:09.0", 4),
            Slot("0000:05:01", 5, "0000:04:00.0").function(0, BOCHS, 0x1111, VGA),
            Slot("0000:05:02", 5, "0000:04:00.0").function(0, INTEL, 0x100E, ETHERNET),
        ],
        modules=CONTRACT_MODULES,
    )


class SimulatedExternalActivity(ExternalActivity):
    """What others do to a simulated host."""

    command = "somebody"

    def __init__(self, host: SimulatedHost) -> None:
        self._machine = host.machine
        self._slot = ""

    async def open(self, function: PciAddress) -> int:
        self._machine.open(function, self.command)
        return self._pid()

    async def close(self, function: PciAddress) -> None:
        self._machine.close(function, IN_FLIGHT)
        self._machine.end(self.command)

    async def let_go(self, function: PciAddress) -> None:
        self._machine.close(function, self.command)

    async def map(self, function: PciAddress) -> int:
        return await self.open(function)

    async def hide(self, function: PciAddress) -> None:
        self._machine.hide(function)

    async def open_group(self, group: int) -> int:
        self._machine.open_group(group, self.command)
        return self._pid()

    async def close_group(self, group: int) -> None:
        self._machine.close_group(group, self.command)

    def _pid(self) -> int:
        [pid] = [program.process.pid for program in self._machine.processes.running() if program.name == self.command]
        return pid

    async def start_vm(self, functions: Sequence[PciAddress]) -> None:
        self._machine.start_vm("vm", functions)

    async def stop_vm(self) -> None:
        self._machine.end("vm")

    async def unplug(self, functions: Sequence[PciAddress]) -> None:
        self._slot = functions[0].slot_name
        await self._machine.unplug(self._slot)

    async def replug(self) -> None:
        self._machine.replug(self._slot)

    async def set_autoprobe(self, *, on: bool) -> None:
        self._machine.set_autoprobe(on=on)

    async def add_unit(self, function: PciAddress | None = None, *, fails: bool = False) -> Unit:
        unit = Unit("contract.service")
        if fails:
            self._machine.faults.add(Errno(errno.EIO), operation="start_unit", subject=unit)
        if function is not None:
            self._machine.run("in a unit", unit=unit)
            self._machine.open(function, "in a unit")
            self._machine.units.stop(unit)
        else:
            self._machine.units.add(unit, active=False)
        return unit

    async def add_socket(self, unit: Unit) -> Unit:
        socket = Unit("contract.socket")
        self._machine.units.add(unit, active=False, triggered_by=[socket])
        return socket

    async def inhibitors(self, gpu: str) -> int:
        return int(gpu in self._machine.units.inhibitors)

    async def end_inhibitors(self, gpu: str) -> None:
        self._machine.units.uninhibit(gpu)

    def next_run(self) -> Host:
        return SimulatedHost(self._machine)


def contract_harness() -> ContractHarness:
    host = contract_host()
    return ContractHarness.of(host, SimulatedExternalActivity(host), GPU, CROWDED_GPU, LONE_GPU)
