"""How devices of a simulated machine leave the PCI bus and come back, and how they are reset.

Sources: drivers/pci/pci-sysfs.c, remove.c and probe.c of Linux 6.1.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.devices import Device, Trouble
from gpuswitch.host.simulated.faults import Call, Strike
from gpuswitch.host.simulated.modules import Modules
from gpuswitch.model.address import PciAddress


class Hotplug:
    """What is off the bus of one machine: removed from it, and still in its slot; or pulled."""

    def __init__(self, bus: Bus, modules: Modules) -> None:
        self._bus = bus
        self._modules = modules
        self._removed: dict[PciAddress, Device] = {}
        self._pulled: dict[str, list[Device]] = {}
        self._lock = asyncio.Lock()

    # What people do.

    async def unplug(self, slot: str) -> None:
        call = Call("remove", slot)
        async with self._locked(call):
            there = [device for device in self._bus.devices.values() if device.address.slot_name == slot]
            for device in reversed(there):
                await self._leave(device, call, None)
        for address in [address for address in self._removed if address.slot_name == slot]:
            self._pulled.setdefault(slot, []).append(self._removed.pop(address))

    def replug(self, slot: str) -> None:
        cards = self._pulled.pop(slot, [])
        for device in cards:
            # It had no power.
            device.trouble = None
        self._found(cards)

    # The operations of the kernel.

    async def reset(self, function: PciAddress, call: Call) -> None:
        """What was set in sysfs stays, and so does a driver."""
        device = self._bus.device(call, function)
        strike = self._bus.faults.strike("reset", function)
        if device.reset_errno == errno.ENOENT:
            raise KernelError(call.verb, call.subject, errno.ENOENT, "it has no reset method")
        async with self._bus.locked(device, call):
            if not await strike.land(call):
                return
            if device.reset_errno:
                raise call.error(device.reset_errno)
            if device.trouble is Trouble.HUNG:
                device.trouble = None

    async def remove(self, functions: Sequence[PciAddress], call: Call) -> None:
        """Everybody else who removes or scans waits until the driver has let go (pci_lock_rescan_remove())."""
        for function in functions:
            strike = self._bus.faults.strike("remove", function)
            async with self._locked(call.about(function)):
                if (device := self._bus.devices.get(function)) is not None:
                    await self._leave(device, call, strike)
                else:
                    await strike.land(call)

    async def rescan(self, functions: Sequence[PciAddress], call: Call) -> None:
        """Of the buses of these functions, with all that is on them. A silent fault: this one does not answer."""
        buses = {_bus_of(function) for function in functions}
        for function in functions:
            if not any(_bus_of(known) == _bus_of(function) for known in (*self._bus.devices, *self._removed)):
                raise KernelError(call.verb, _bus_of(function), errno.ENODEV, "there is no such bus any more")
        strikes = [(function, self._bus.faults.strike("rescan", function)) for function in functions]
        async with self._locked(call):
            dead = {function for function, strike in strikes if not await strike.land(call.about(function))}
            here = [a for a in self._removed if _bus_of(a) in buses and a not in dead]
            self._found([self._removed.pop(address) for address in sorted(here)])

    # How they work.

    async def _leave(self, device: Device, call: Call, strike: Strike | None) -> None:
        """Its driver lets go of it, under the device lock; then it is gone, and all that was set of it."""
        if strike is not None and strike.fails:
            await strike.land(call)
            return
        # Whoever was quicker has done it.
        with suppress(KernelError):
            async with self._bus.locked(device, call):
                if device.binding is not None:
                    await self._bus.let_go(device, device.binding, call, strike)
                elif strike is not None:
                    await strike.land(call)
                del self._bus.devices[device.address]
                self._removed[device.address] = device
        self._bus.changed(None, uevent=True)

    def _found(self, old: Iterable[Device]) -> None:
        """New devices: without override, power/control as at boot, bound by what matches; udev loads the rest."""
        for device in [each.anew() for each in old]:
            self._bus.devices = dict(sorted([*self._bus.devices.items(), (device.address, device)]))
            self._bus.found(device)
            self._bus.changed(device, uevent=True)
            if device.binding is None:
                self._bus.later(self._modules.found(device))

    @asynccontextmanager
    async def _locked(self, call: Call) -> AsyncIterator[None]:
        """Only one at a time, in the whole machine, removes devices or looks for new ones."""
        if self._lock.locked():
            await call.wait_in(self._lock.acquire(), "D", "pci_lock_rescan_remove")
        else:
            await self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()


def _bus_of(function: PciAddress) -> str:
    """`0000:01`."""
    return str(function).rpartition(":")[0]
