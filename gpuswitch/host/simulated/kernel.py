"""A simulated machine: its devices, modules, consoles, processes and units, and what its kernel does, errno by errno.

Sources: drivers/base/bus.c, drivers/pci/pci-driver.c and pci-sysfs.c, drivers/vfio/group.c of Linux 6.1; the contract
tests hold it to what a real one does. What happens between operations (others open and close devices, a VM starts, a
card is pulled) is a plain method call.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gpuswitch.errors import KernelError
from gpuswitch.host.port import ATTRIBUTES, Captured
from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.consoles import FrameBuffers
from gpuswitch.host.simulated.device_nodes import NodeAccess
from gpuswitch.host.simulated.devices import Device, Trouble
from gpuswitch.host.simulated.drivers import Module, PciDriver
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.hotplug import Hotplug
from gpuswitch.host.simulated.libvirt import Books
from gpuswitch.host.simulated.modules import Modules
from gpuswitch.host.simulated.processes import MOMENT, ProcessTable, Program
from gpuswitch.host.simulated.systemd import Units
from gpuswitch.host.simulated.workers import Worker
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer, HostFacts, Kind
from gpuswitch.model.gpu import harmless
from gpuswitch.model.holders import Process, Unit

IN_FLIGHT = "a descriptor in flight"
"""Who has something open that `Machine.hide` hid."""
# sysfs hands a store function one page at most, and driver_set_override() refuses what fills it.
_LONGEST_VALUE = 4096 - 2
_PERSISTENT = "nvidia"
"""The kind of `Card`, and the PCI driver, that persistence is about."""
_DAEMON = "nvidia-persistenced"
"""Asked for persistence, nvidia's library has this daemon see to it; where it does not run, the driver does."""


class Machine(Bus):
    """One computer, and the operations of its kernel. An operation is given the `Call` that it tells its waits to.

    `modules` are installed; those named in `loaded` are in the kernel, and have bound what they match, in this order.
    `builtin` drivers are registered before them. `boot_framebuffers` are what the firmware left, each with its driver;
    `console_map` the frame buffers that `fbcon=map:` names. Not `vfio_groups`: its kernel has no `/dev/vfio/GROUP`
    (CONFIG_VFIO_GROUP is not set); `vfio_devices`: it has `/dev/vfio/devices/vfioN` (CONFIG_VFIO_DEVICE_CDEV).
    `direct_regions`: see `HostFacts`.
    """

    def __init__(
        self,
        devices: Iterable[Device],
        modules: Iterable[Module],
        *,
        loaded: Iterable[str] = (),
        builtin: Iterable[PciDriver] = (),
        boot_framebuffers: Iterable[BootFramebuffer] = (),
        console_map: Sequence[int] | None = None,
        iommu: bool = True,
        vfio_groups: bool = True,
        vfio_devices: bool = False,
        direct_regions: Mapping[int, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(devices, modules, builtin, iommu=iommu)
        self.access = NodeAccess(self)
        self._vfio_groups = vfio_groups
        self.vfio_devices = vfio_devices
        self._direct_regions = direct_regions or {}
        self.frame_buffers = FrameBuffers(self, boot_framebuffers, console_map)
        self.modules = Modules(self, self.frame_buffers)
        self.processes = ProcessTable(self, self.modules, self.frame_buffers)
        self.units = Units(self, self.processes)
        self.libvirt = Books(self, self.units)
        self.workers: dict[Process, Worker] = {}
        self.hotplug = Hotplug(self, self.modules)
        self.bind_all()
        for name in loaded:
            self.modules.at_boot(name)

    # What can be seen without a lock.

    def look(self) -> HostFacts:
        if self._facts is None:
            self._facts = HostFacts(
                functions={address: device.seen() for address, device in self.devices.items()},
                iommu=self.iommu,
                vfio_available=self.drivers.vfio_available(),
                pci_drivers=self.drivers.registered(),
                registrations=self.drivers.registrations(),
                vfio_aliases=self.drivers.vfio_aliases,
                vfio_nodes=frozenset(self._vfio_nodes()),
                modules=self.modules.seen(),
                boot_framebuffers=self.frame_buffers.boot(),
                console_map=self.frame_buffers.console_map,
                autoprobe=self.autoprobe,
                modules_on_disk=bool(self.drivers.modules),
                direct_regions=self._direct_regions,
            )
        return self._facts

    def changed(self, device: Device | None, *, uevent: bool = False) -> None:
        super().changed(device, uevent=uevent)
        self.access.lost()

    def worker(self, gpu: str, role: str = "worker") -> Worker:
        """Start a worker process of a GPU; `role` is what it is called."""
        process = self.processes.new_process()
        user = f"the {role} of {gpu}"
        if any(worker.user == user for worker in self.workers.values()):
            user = f"{user} ({process.pid})"
        self.workers[process] = Worker(process, user, self._worker_ended)
        return self.workers[process]

    def _worker_ended(self, worker: Worker) -> None:
        del self.workers[worker.process]
        self.processes.close_all(worker.user)

    def users(self, function: PciAddress) -> frozenset[str]:
        """Who has the function open."""
        binding = self.devices[function].binding
        return frozenset(binding.users if binding else ())

    # What others do.

    def run(
        self,
        name: str,
        *,
        command: str = "",
        uid: int = 0,
        unit: Unit | None = None,
        session: str = "",
        opens: str = "",
        polite: bool = False,
        stubborn: bool = False,
        restarts: bool = False,
        lives_by: Unit | None = None,
        machine: bool = False,
    ) -> Process:
        """A process starts, under a name that no other has; as part of `unit`, which is active then, and of `session`.

        The rest is told in `Program`.
        """
        if self.processes.named(name) is not None:
            raise ValueError(f"there is a process {name!r} already")
        program = Program(
            name, command or name, uid, unit, session, polite, stubborn, restarts, opens, lives_by, machine
        )
        self.units.run(program)
        return program.process

    def set_autoprobe(self, *, on: bool, later: bool = False) -> None:
        """Somebody writes to `drivers_autoprobe` of the PCI bus: off, neither modules nor rescans bind anything.

        Since Linux 6.17; before, a rescan does all the same. `later`: it is a kernel that may bind later what it finds.
        """
        self.autoprobe, self.probes_later = on, later
        self.changed(None)

    def set_unloading(self, *, on: bool) -> None:
        """It is a kernel that unloads modules, or one that does not (CONFIG_MODULE_UNLOAD)."""
        self.modules.unloads = on
        self.changed(None)

    def open(self, function: PciAddress, user: str, kind: str = "") -> None:
        """A process opens a device node of the function; one that does not run yet is started. It has it open once.

        `kind`: what the node is of (`Card`); "": one that a look shows, if there is any.

        Raises:
            KernelError: ENOENT, it has no node (ready); ENODEV, its driver is letting go of it.
        """
        card = self.open_card(function, user, kind)
        if self.processes.named(user) is None:
            self.run(user)
        if (program := self.processes.named(user)) is not None:
            program.opened.add((function, card.kind))

    def hide(self, function: PciAddress, kind: str = "") -> None:
        """A descriptor is on its way in a message: no process has it, and the device is open. `close` IN_FLIGHT."""
        self.open_card(function, IN_FLIGHT, kind)

    def close(self, function: PciAddress, user: str) -> None:
        """Somebody closes all that he has open of the function; nothing to do where he has nothing open."""
        if (program := self.processes.named(user)) is not None:
            program.opened = {(opened, kind) for opened, kind in program.opened if opened != function}
        self.processes.close(function, user)

    def open_group(self, number: int, user: str) -> None:
        """A process opens /dev/vfio/GROUP, and does nothing with it.

        Raises:
            KernelError: ENOENT, there is no such node; EBUSY, somebody has it open.
        """
        self._take_group(number, user)
        if self.processes.named(user) is None:
            self.run(user)

    def close_group(self, number: int, user: str) -> None:
        """Close what `open_group` opened; nothing to do where this user does not have it open."""
        group = self.group(number)
        if group.opened_by == user:
            group.opened_by = None
            self.processes.stir(None, [f"/dev/vfio/{number}"])

    def start_vm(self, name: str, functions: Iterable[PciAddress], *, iommufd: bool = False) -> None:
        """A VM takes the groups of these functions, owns their DMA, and opens the functions.

        `iommufd`: it opens their own nodes, binds them to that, and leaves the groups alone; nobody can open them then.

        Raises:
            KernelError: ENODEV, a function is not on vfio; EBUSY, somebody has a group open; EPERM, a group is not
                viable, or has memory that the firmware claims. Nothing is taken then.
        """
        taken = [self.device(Call("open", function), function) for function in functions]
        groups = self._free_groups(taken)
        if self.processes.named(name) is None:
            self.run(name, command="qemu-system-x86")
        for number in groups:
            self.group(number).dma_owner = name
            if not iommufd:
                self.group(number).opened_by = name
        for device in taken:
            if iommufd:
                self.open(device.address, name, "vfio")
            elif device.binding is not None:
                device.binding.cards[0].users.add(name)
                self.changed(device)

    def to_the_front(self) -> None:
        """Another session comes to the front: logind has udev look at each node of the seat anew (systemd 258).

        A sound card looks new to who follows udev, whatever was announced of it: a `change` of its node becomes one of
        the card (78-sound-card.rules). A DRM node is opened for a moment by what udev's rules run, as those of
        switcheroo-control 3.0 do.
        """
        for function, card in list(self.cards()):
            if card.kind == "sound":
                self.processes.announced(function, card.kind, "add")
            elif card.kind == "drm":
                self.later(self._look_of_udev(function))

    async def _look_of_udev(self, function: PciAddress) -> None:
        name = f"udev's look at {function}"
        if self.processes.named(name) is None:
            self.run(name, command="switcheroo-control-check-discrete-amdgpu", unit=Unit("systemd-udevd.service"))
        with suppress(KernelError):
            self.open(function, name, "drm")
        await asyncio.sleep(MOMENT)
        self.end(name)

    def end(self, name: str) -> None:
        """A VM, or any process, ends: all that it has open is closed."""
        if (program := self.processes.named(name)) is not None:
            self.processes.end(program)
        else:
            self.processes.close_all(name)

    async def unplug(self, slot: str) -> None:
        """Pull the card in a slot (`0000:01:00`): last function first; waits where a driver's remove() waits."""
        await self.hotplug.unplug(slot)

    def replug(self, slot: str) -> None:
        """Put it back. The devices are new: no override, power/control as at boot, bound by what matches."""
        self.hotplug.replug(slot)

    # The operations of the kernel, by their names; others are in `modules`, `frame_buffers` and `hotplug`.

    async def write(self, name: str, attribute: str, values: Mapping[PciAddress, str | None], call: Call) -> None:
        """An operation that writes one attribute of each function."""
        for function, value in values.items():
            device = self.device(call.about(function), function)
            strike = self.faults.strike(name, function)
            if value is not None and len(value) > _LONGEST_VALUE:
                raise call.error(errno.EINVAL)
            async with self.locked(device, call):
                if await strike.land(call):
                    device.settings[attribute] = value or ""
                    self.changed(device)

    async def capture(self, functions: Sequence[PciAddress], call: Call) -> dict[PciAddress, Captured]:
        captured = {}
        for function in functions:
            device = self.device(call.about(function), function)
            strike = self.faults.strike("capture", function)
            async with self.locked(device, call):
                await strike.land(call)
                settings: dict[str, Any] = {
                    name: device.settings[attribute.path] or None for name, attribute in ATTRIBUTES.items()
                }
                captured[function] = Captured(device.link, **settings)
        return captured

    async def attribute(self, function: PciAddress, path: str, call: Call) -> str | None:
        device = self.device(call, function)
        await self.faults.strike("attribute", function).land(call)
        return device.settings.get(path)

    async def set_attribute(self, function: PciAddress, path: str, value: str, call: Call) -> None:
        device = self.device(call, function)
        if path not in device.settings:
            raise call.error(errno.ENOENT)
        if await self.faults.strike("set_attribute", function).land(call):
            device.settings[path] = value
            self.changed(device)

    async def keep_awake(self, functions: Sequence[PciAddress], call: Call) -> None:
        await self.write("keep_awake", "power/control", dict.fromkeys(functions, "on"), call)

    async def unbind(self, function: PciAddress, driver: str, call: Call) -> None:
        device = self.device(call, function)
        strike = self.faults.strike("unbind", function)
        # Looked at without the lock: a second unbind, while the first one waits, gets past this and queues.
        if device.bound_to(driver) is None:
            raise call.error(errno.ENODEV)
        async with self.locked(device, call):
            if (binding := device.bound_to(driver)) is not None:
                await self.let_go(device, binding, call, strike)

    async def probe(self, function: PciAddress, driver: str, call: Call) -> None:  # noqa: ARG002 -- in its words
        device = self.device(call, function)
        strike = self.faults.strike("probe", function)
        # Looked at without the lock (bus_rescan_devices_helper): while an unbind waits, a probe has nothing to do.
        if device.binding is not None:
            await strike.land(call)
            return
        async with self.locked(device, call):
            await self.attach(device, call, strike)

    async def lost(self, functions: Sequence[PciAddress], call: Call) -> tuple[PciAddress, ...]:
        found = []
        for function in functions:
            device = self.device(call.about(function), function)
            await self.faults.strike("lost", function).land(call)
            if device.trouble is Trouble.LOST:
                found.append(function)
        return tuple(found)

    async def hold_group(self, group: int, call: Call) -> None:
        if await self.faults.strike("hold_group", group).land(call) and self.group(group).opened_by != call.user:
            self._take_group(group, call.user)

    async def release_group(self, group: int, call: Call) -> None:
        if await self.faults.strike("release_group", group).land(call):
            self.close_group(group, call.user)

    async def announce(self, functions: Sequence[PciAddress], subsystem: str, action: str, call: Call) -> None:
        """ENODEV: there is no such function. Where it has no such card, nobody is told anything."""
        for function in functions:
            device = self.device(call.about(function), function)
            if not await self.faults.strike("announce", function).land(call):
                continue
            if device.binding is not None and any(card.kind == subsystem for card in device.binding.cards):
                self.processes.announced(function, subsystem, action)
                self.uevent()

    async def persistence(self, function: PciAddress, call: Call) -> bool | None:
        device = self.device(call, function)
        await self.faults.strike("persistence", function).land(call)
        if device.bound_to(_PERSISTENT) is None:
            return None
        return device.persistent or _DAEMON in self.users(function)

    async def set_persistence(self, function: PciAddress, on: bool, call: Call) -> None:
        """The daemon, where it runs, keeps open the GPUs that are to be persistent, and no others."""
        device = self.device(call, function)
        strike = self.faults.strike("set_persistence", function)
        if device.bound_to(_PERSISTENT) is None:
            raise call.error(errno.ENODEV)
        if not await strike.land(call):
            return
        if not on:
            device.persistent = False
            self.processes.close(function, _DAEMON, _PERSISTENT)
        elif self.processes.named(_DAEMON) is not None:
            self.open_card(function, _DAEMON, _PERSISTENT)
        else:
            device.persistent = True

    def _vfio_nodes(self) -> Iterator[str]:
        if self._vfio_groups and self.drivers.vfio_registered():
            yield "vfio"
            for device in self.devices.values():
                if device.shape.iommu_group is not None and device.on_vfio:
                    yield str(device.shape.iommu_group)

    def _free_groups(self, devices: Iterable[Device]) -> list[int]:
        """The groups of these, which a VM can have; raises as `start_vm` does."""
        for device in devices:
            if not device.on_vfio:
                raise Call("open", device.address).error(errno.ENODEV)
        groups = sorted({d.shape.iommu_group for d in devices if d.shape.iommu_group is not None})
        for number in groups:
            if self.group(number).taken:
                raise Call("open", f"/dev/vfio/{number}").error(errno.EBUSY)
            if number in self._direct_regions:
                # As Intel's driver says; the devices are on vfio all the same.
                raise Call("attach", f"/dev/vfio/{number}").error(errno.EPERM)
            if not all(harmless(f) for f in self.look().group(number) if f.kind is not Kind.BRIDGE):
                raise Call("attach", f"/dev/vfio/{number}").error(errno.EPERM)
        return groups

    def _take_group(self, number: int, user: str) -> None:
        call = Call("open", f"/dev/vfio/{number}")
        if str(number) not in self.look().vfio_nodes:
            raise call.error(errno.ENOENT)
        if self.group(number).taken:
            raise call.error(errno.EBUSY)
        self.group(number).opened_by = user
