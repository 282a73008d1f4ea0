"""The kernel of a simulated machine: what its driver core, its vfio and its module loader do, errno by errno.

Sources: drivers/base/bus.c and dd.c, drivers/pci/pci-driver.c, drivers/vfio/group.c of Linux 6.1; the contract tests
hold it to what a real one does. Where kernels differ it waits as 6.1 does: later ones only wait less. What happens
between operations (others open and close devices, a VM starts, a card is pulled) is a plain method call.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.devices import Binding, Device, Group, Numbers, nodes_of
from gpuswitch.host.simulated.drivers import Drivers, Module, PciDriver, matches
from gpuswitch.host.simulated.faults import Call, Faults, Operation, Strike
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, Captured, HostFacts, Kind
from gpuswitch.model.gpu import harmless

# sysfs hands a store function one page at most, and driver_set_override() refuses what fills it.
_LONGEST_OVERRIDE = 4096 - 2


class Machine:
    """Devices, drivers, modules, users and VMs of one computer, and the operations of its kernel.

    `modules` are installed; those named in `loaded` are in the kernel, and have bound what they match, in this order.
    `builtin` drivers are registered before them. An operation is given the `Call` that it tells its waits to.
    """

    def __init__(
        self,
        devices: Iterable[Device],
        modules: Iterable[Module],
        *,
        loaded: Iterable[str] = (),
        builtin: Iterable[PciDriver] = (),
        iommu: bool = True,
    ) -> None:
        self.devices = {device.address: device for device in sorted(devices, key=lambda d: d.address)}
        self.drivers = Drivers(modules, builtin)
        self.iommu = iommu
        self.faults = Faults()
        self.announce: Callable[[], None] = lambda: None
        """Called when the kernel sends a uevent."""
        self._groups: dict[int, Group] = {}
        self._numbers = Numbers()
        self._orphans: dict[PciAddress, list[Binding]] = {}
        self._pulled: dict[str, list[Device]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts: HostFacts | None = None
        self._bind_all()
        for name in loaded:
            if self._finds_a_device(self.drivers.modules[name]):
                self.drivers.register(name)
                self._bind_all()

    # What can be seen without a lock.

    def look(self) -> HostFacts:
        if self._facts is None:
            self._facts = HostFacts(
                functions={address: device.seen() for address, device in self.devices.items()},
                iommu=self.iommu,
                vfio_available=self.drivers.vfio_available(),
                pci_drivers=self.drivers.registered(),
                vfio_nodes=frozenset(
                    device.shape.iommu_group
                    for device in self.devices.values()
                    if device.shape.iommu_group is not None and device.bound_to(VFIO_DRIVER) is not None
                ),
            )
        return self._facts

    def users(self, function: PciAddress) -> frozenset[str]:
        """Who has the function open."""
        binding = self.devices[function].binding
        return frozenset(binding.users if binding else ())

    # What others do.

    def open(self, function: PciAddress, user: str) -> None:
        """Somebody opens a device node of the function; a name has it open once, however often it opens it.

        Raises:
            KernelError: ENOENT, it has no node (ready); ENODEV, its driver is letting go of it.
        """
        device = self._device(Call("open", function), function)
        binding = device.binding
        if binding is None or not binding.nodes or not binding.ready:
            raise Call("open", function).error(errno.ENOENT)
        if device.link is None:
            raise Call("open", function).error(errno.ENODEV)
        binding.users.add(user)
        self._changed(device)

    def close(self, function: PciAddress, user: str) -> None:
        """Somebody closes all that he has open of the function, or dies; nothing to do where he has nothing open."""
        device = self.devices.get(function)
        if device is not None and device.binding is not None:
            device.binding.close(user)
            self._changed(device)
        orphans = self._orphans.pop(function, [])
        for binding in orphans:
            binding.close(user)
        for binding in orphans:
            self._retire(function, binding)

    def open_group(self, number: int, user: str) -> None:
        """Somebody opens /dev/vfio/GROUP, and does nothing with it.

        Raises:
            KernelError: ENOENT, there is no such node; EBUSY, somebody has it open.
        """
        call = Call("open", f"/dev/vfio/{number}")
        if number not in self.look().vfio_nodes:
            raise call.error(errno.ENOENT)
        group = self._group(number)
        if group.opened_by is not None:
            raise call.error(errno.EBUSY)
        group.opened_by = user

    def close_group(self, number: int, user: str) -> None:
        """Close what `open_group` opened; nothing to do where this user does not have it open."""
        group = self._group(number)
        if group.opened_by == user:
            group.opened_by = None

    def start_vm(self, name: str, functions: Iterable[PciAddress]) -> None:
        """A VM takes the groups of these functions, owns their DMA, and opens the functions.

        Raises:
            KernelError: ENODEV, a function is not on vfio-pci; EBUSY, somebody has a group open; EPERM, a group is not
                viable. Nothing is taken then.
        """
        taken = [self._device(Call("open", function), function) for function in functions]
        groups = sorted({d.shape.iommu_group for d in taken if d.shape.iommu_group is not None})
        for device in taken:
            if device.bound_to(VFIO_DRIVER) is None:
                raise Call("open", device.address).error(errno.ENODEV)
        for number in groups:
            if self._group(number).opened_by is not None:
                raise Call("open", f"/dev/vfio/{number}").error(errno.EBUSY)
            if not all(harmless(f) for f in self.look().group(number) if f.kind is not Kind.BRIDGE):
                raise Call("attach", f"/dev/vfio/{number}").error(errno.EPERM)
        for number in groups:
            self._group(number).opened_by = self._group(number).dma_owner = name
        for device in taken:
            if device.binding is not None:
                device.binding.users.add(name)
                self._changed(device)

    def end(self, name: str) -> None:
        """A VM, or whoever has something open, ends: all that it has open is closed."""
        for group in self._groups.values():
            if group.opened_by == name:
                group.opened_by = group.dma_owner = None
        for address in self.devices:
            self.close(address, name)

    async def unplug(self, slot: str) -> None:
        """Pull the card in a slot (`0000:01:00`): last function first; waits where a driver's remove() waits."""
        call = Call("remove", slot)
        pulled = [device for device in self.devices.values() if device.address.slot_name == slot]
        for device in reversed(pulled):
            async with self._locked(device, call):
                if device.binding is not None:
                    await self._let_go(device, device.binding, call, None)
                del self.devices[device.address]
            self._changed(None, uevent=True)
        self._pulled.setdefault(slot, []).extend(pulled)

    def replug(self, slot: str) -> None:
        """Put it back. The devices are new: no override, power/control as at boot, bound by what matches."""
        for old in self._pulled.pop(slot, []):
            device = Device(old.shape, old.first_control)
            self.devices = dict(sorted([*self.devices.items(), (device.address, device)]))
            self._bind_first_match(device)
            self._changed(device, uevent=True)

    # The operations of the kernel.

    async def capture(self, function: PciAddress, call: Call) -> Captured:
        device = self._device(call, function)
        strike = self.faults.strike("capture", function)
        async with self._locked(device, call):
            await strike.land(call)
            return Captured(device.link, device.override, device.power_control)

    async def candidates(self, function: PciAddress, call: Call) -> tuple[str, ...]:
        device = self._device(call, function)
        await self.faults.strike("candidates", function).land(call)
        return self.drivers.candidates(device.shape.modalias)

    async def load(self, name: str, call: Call) -> None:
        """ENOENT: no such module is installed (modprobe ends with 1, says `not found`). ENODEV: it found no device."""
        strike = self.faults.strike("load", name)
        if name not in self.drivers.modules:
            raise call.error(errno.ENOENT)
        if not await strike.land(call) or self.drivers.loaded(name):
            return
        if not self._finds_a_device(self.drivers.modules[name]):
            raise call.error(errno.ENODEV)
        new = self.drivers.register(name)
        self._changed(None, uevent=bool(new))
        for driver in new:
            for device in list(self.devices.values()):
                if matches(driver, device.shape.modalias, device.override):
                    # A device that cannot be bound does not keep a driver from being registered.
                    with suppress(KernelError):
                        async with self._locked(device, call):
                            self._bind_first_match(device)

    async def set_power(self, operation: Operation, function: PciAddress, control: str, call: Call) -> None:
        device = self._device(call, function)
        strike = self.faults.strike(operation, function)
        if control not in {"auto", "on"}:
            raise call.error(errno.EINVAL)
        async with self._locked(device, call):
            if await strike.land(call):
                device.power_control = control
                self._changed(device)

    async def set_override(self, function: PciAddress, driver: str | None, call: Call) -> None:
        device = self._device(call, function)
        strike = self.faults.strike("set_override", function)
        if driver is not None and len(driver) > _LONGEST_OVERRIDE:
            raise call.error(errno.EINVAL)
        async with self._locked(device, call):
            if await strike.land(call):
                device.override = driver or None

    async def unbind(self, function: PciAddress, driver: str, call: Call) -> None:
        device = self._device(call, function)
        strike = self.faults.strike("unbind", function)
        # Looked at without the lock: a second unbind, while the first one waits, gets past this and queues.
        if device.bound_to(driver) is None:
            raise call.error(errno.ENODEV)
        async with self._locked(device, call):
            if (binding := device.bound_to(driver)) is not None:
                await self._let_go(device, binding, call, strike)

    async def probe(self, function: PciAddress, call: Call) -> None:
        device = self._device(call, function)
        strike = self.faults.strike("probe", function)
        # Looked at without the lock (bus_rescan_devices_helper): while an unbind waits, a probe has nothing to do.
        if device.binding is not None:
            await strike.land(call)
            return
        async with self._locked(device, call):
            await self._attach(device, call, strike)

    async def hold_group(self, number: int, user: str, call: Call) -> None:
        if await self.faults.strike("hold_group", number).land(call) and self._group(number).opened_by != user:
            self.open_group(number, user)

    async def release_group(self, number: int, user: str, call: Call) -> None:
        if await self.faults.strike("release_group", number).land(call):
            self.close_group(number, user)

    # How they work.

    def _device(self, call: Call, function: PciAddress) -> Device:
        device = self.devices.get(function)
        if device is None:
            raise call.error(errno.ENODEV)
        return device

    @asynccontextmanager
    async def _locked(self, device: Device, call: Call) -> AsyncIterator[None]:
        """Have the device lock; ENODEV: the device left the bus while we waited."""
        if device.lock.locked():
            await call.wait_in(device.lock.acquire(), "D")
        else:
            await device.lock.acquire()
        try:
            if self.devices.get(device.address) is not device:
                raise call.error(errno.ENODEV)
            yield
        finally:
            device.lock.release()

    def _group(self, number: int) -> Group:
        return self._groups.setdefault(number, Group())

    def _finds_a_device(self, module: Module) -> bool:
        """Whether a module that refuses to load without a device of its own would load."""
        return not module.needs_device or any(
            device.binding is None and matches(driver, device.shape.modalias, device.override)
            for device in self.devices.values()
            for driver in module.drivers
        )

    def _bind_all(self) -> None:
        for device in self.devices.values():
            self._bind_first_match(device)

    def _bind_first_match(self, device: Device) -> None:
        driver = self.drivers.first_match(device.shape.modalias, device.override)
        if device.binding is None and driver is not None and self._may_bind(device, driver):
            self._bind(device, driver)

    def _may_bind(self, device: Device, driver: PciDriver) -> bool:
        """Whether the group's DMA is free for this driver."""
        number = device.shape.iommu_group
        return driver.manages_dma or number is None or self._group(number).dma_owner is None

    async def _attach(self, device: Device, call: Call, strike: Strike) -> None:
        """A probe, under the device lock. The `driver` link is there from its start, and goes again if it fails."""
        driver = self.drivers.first_match(device.shape.modalias, device.override) if device.binding is None else None
        if driver is not None and not self._may_bind(device, driver):
            raise call.error(errno.EINVAL)
        if driver is not None and driver.name == VFIO_DRIVER and device.shape.iommu_group is None:
            # vfio-pci turns it down. That is no error of drivers_probe: some other driver might have liked it.
            driver = None
        if driver is None:
            await strike.land(call)
            return
        device.link = self.drivers.link(driver)
        self._changed(device)
        bound = False
        try:
            bound = await strike.land(call)
        finally:
            device.link = None
            self._changed(device)
        if bound:
            self._bind(device, driver)

    def _bind(self, device: Device, driver: PciDriver) -> None:
        binding = Binding(driver)
        if driver.makes:
            binding.number = self._numbers.take(driver.makes)
            binding.nodes = nodes_of(driver, binding.number)
            strike = self.faults.strike("nodes", device.address)
            if strike.hits:
                binding.ready = False
                self._later(self._make_nodes(device, binding, strike))
        if driver.allows:
            device.power_control = "auto"
        device.binding = binding
        device.link = self.drivers.link(driver)
        self._changed(device, uevent=True)

    async def _make_nodes(self, device: Device, binding: Binding, strike: Strike) -> None:
        binding.ready = await strike.land(Call("nodes", device.address))
        self._changed(device, uevent=True)

    async def _let_go(self, device: Device, binding: Binding, call: Call, strike: Strike | None) -> None:
        """A driver's remove(), under the device lock. The `driver` link goes first, and says nothing about the end."""
        if strike is not None and strike.fails:
            await strike.land(call)
            return
        device.link = None
        self._changed(device, uevent=bool(binding.nodes))
        if strike is not None:
            await strike.land(call)
        if binding.driver.waits and binding.users:
            await call.wait_in(binding.until_idle(), binding.driver.waits, binding.driver.kernel_wait)
        if binding.driver.allows:
            device.power_control = "on"
        device.binding = None
        self._retire(device.address, binding)
        self._changed(device, uevent=True)

    def _retire(self, function: PciAddress, binding: Binding) -> None:
        """Give its number back, once nobody has it open any more."""
        if binding.users:
            self._orphans.setdefault(function, []).append(binding)
        elif binding.number is not None:
            self._numbers.give(binding.driver.makes, binding.number)

    def _changed(self, device: Device | None, *, uevent: bool = False) -> None:
        if device is not None:
            device.changed()
        self._facts = None
        if uevent:
            self.announce()

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
