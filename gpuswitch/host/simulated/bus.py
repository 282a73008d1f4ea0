"""The PCI bus of a simulated machine: its devices, and how drivers take them and let them go.

Sources: drivers/base/bus.c and dd.c, drivers/pci/pci-driver.c of Linux 6.1. Where kernels differ it waits as 6.1 does:
later ones only wait less.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Iterable, Iterator

from gpuswitch.host.simulated.devices import Binding, Card, Device, Group, Numbers
from gpuswitch.host.simulated.drivers import Drivers, Module, PciDriver, matches
from gpuswitch.host.simulated.faults import Call, Faults, Strike
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts

_BY_AND_BY = 0.1
"""Seconds."""

CardListener = Callable[[Device, Card], None]


class _Locked:
    """`Bus.locked`."""

    def __init__(self, bus: Bus, device: Device, call: Call) -> None:
        self._bus = bus
        self._device = device
        self._call = call

    async def __aenter__(self) -> None:
        lock = self._device.lock
        if lock.locked():
            await self._call.wait_in(lock.acquire(), "D")
        else:
            await lock.acquire()
        if self._bus.devices.get(self._device.address) is not self._device:
            lock.release()
            raise self._call.error(errno.ENODEV)

    async def __aexit__(self, *_: object) -> None:
        self._device.lock.release()


class Bus:
    """Devices, drivers and IOMMU groups of one computer.

    `made`, `ready`, `leaving` and `gone` are told of each card: that a driver made it, that its nodes are there for
    use, that they are there no more, and that the driver let go of it. `uevent` is called when the kernel sends one.
    """

    def __init__(
        self, devices: Iterable[Device], modules: Iterable[Module], builtin: Iterable[PciDriver], *, iommu: bool
    ) -> None:
        self.devices = {device.address: device for device in sorted(devices, key=lambda d: d.address)}
        self.drivers = Drivers(modules, builtin)
        self.iommu = iommu
        self.vfio_devices = False
        """Each device on vfio has a node of its own, too (CONFIG_VFIO_DEVICE_CDEV)."""
        self.autoprobe = True
        self.probes_later = False
        """What a rescan finds is bound by and by."""
        self.faults = Faults()
        self.numbers = Numbers()
        self.uevent: Callable[[], None] = lambda: None
        self.made: list[CardListener] = []
        self.ready: list[CardListener] = []
        self.leaving: list[CardListener] = []
        self.gone: list[CardListener] = []
        self.log: list[tuple[PciAddress, str]] = []
        """What the kernel said of which device."""
        self._groups: dict[int, Group] = {}
        self._orphans: dict[PciAddress, list[Card]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts: HostFacts | None = None

    def device(self, call: Call, function: PciAddress) -> Device:
        device = self.devices.get(function)
        if device is None:
            raise call.error(errno.ENODEV)
        return device

    def locked(self, device: Device, call: Call) -> _Locked:
        """Have the device lock; ENODEV: the device left the bus while we waited."""
        return _Locked(self, device, call)

    def group(self, number: int) -> Group:
        return self._groups.setdefault(number, Group())

    def groups(self) -> Iterator[tuple[int, Group]]:
        """Those that somebody had to do with."""
        yield from sorted(self._groups.items())

    def cards(self) -> Iterator[tuple[PciAddress, Card]]:
        """All that drivers made, also what users have left of a driver that is gone."""
        for address, device in self.devices.items():
            if device.binding is not None:
                for card in device.binding.cards:
                    yield address, card
        for address, orphans in self._orphans.items():
            for card in orphans:
                yield address, card

    def finds_a_device(self, module: Module) -> bool:
        """Whether a module that refuses to load without a device of its own would load."""
        if not module.needs_device:
            return True
        return self.autoprobe and any(
            device.binding is None
            and device.trouble is None
            and matches(driver, device.shape.modalias, device.override)
            for device in self.devices.values()
            for driver in module.drivers
        )

    def say_why(self, module: Module) -> None:
        """Such a module found no device: its drivers have tried each that is for them."""
        for device in self.devices.values():
            for driver in module.drivers:
                if device.binding is None and matches(driver, device.shape.modalias, device.override):
                    self._fails(device, driver)

    def bind_all(self) -> None:
        for device in self.devices.values():
            if device.binding is None:
                self.bind_first_match(device)

    def found(self, device: Device) -> None:
        """A device is new on the bus."""
        if self.autoprobe and self.probes_later:
            self.later(self._bind_later(device))
        elif self.autoprobe:
            self.bind_first_match(device)

    async def _bind_later(self, device: Device) -> None:
        async with device.lock:
            await asyncio.sleep(_BY_AND_BY)
            if self.devices.get(device.address) is device:
                self.bind_first_match(device)
                self.changed(device, uevent=True)

    def bind_first_match(self, device: Device) -> None:
        driver = self.drivers.first_match(device.shape.modalias, device.override) if device.binding is None else None
        if driver is not None and self._may_bind(device, driver) and not self._fails(device, driver):
            self._bind(device, driver)

    async def attach(self, device: Device, call: Call, strike: Strike) -> None:
        """A probe, under the device lock. The `driver` link is there from its start, and goes again if it fails."""
        driver = self.drivers.first_match(device.shape.modalias, device.override) if device.binding is None else None
        if driver is not None and not self._may_bind(device, driver):
            raise call.error(errno.EINVAL)
        if driver is not None and driver.vfio and device.shape.iommu_group is None:
            # A vfio driver turns it down. That is no error of drivers_probe: some other driver might have liked it.
            driver = None
        if driver is None:
            await strike.land(call)
            return
        device.link = self.drivers.link(driver)
        self.changed(device)
        bound = False
        try:
            bound = await strike.land(call)
        finally:
            device.link = None
            self.changed(device)
        if bound and not self._fails(device, driver):
            self._bind(device, driver)

    def _fails(self, device: Device, driver: PciDriver) -> bool:
        """Whether its probe fails, for a reason that is the device's own: the kernel's core says so in the log."""
        if device.trouble is None or driver.vfio:
            return False
        self.log.append((device.address, f"probe with driver {driver.name} failed with error -22"))
        return True

    async def let_go(self, device: Device, binding: Binding, call: Call, strike: Strike | None) -> None:
        """A driver's remove(), under the device lock. The `driver` link goes first, and says nothing about the end."""
        if strike is not None and strike.fails:
            await strike.land(call)
            return
        device.link = None
        self.changed(device, uevent=bool(binding.nodes))
        # Who follows udev hears of it before the driver waits for him: snd_card_disconnect, drm_dev_unplug.
        self._tell(self.leaving, device, binding.cards)
        if strike is not None:
            await strike.land(call)
        if binding.driver.waits and binding.busy:
            await call.wait_in(binding.until_idle(), binding.driver.waits, binding.driver.kernel_wait)
        if binding.driver.allows:
            device.power_control = "on"
        device.binding = None
        device.persistent = False
        for card in binding.cards:
            self._retire(device, card)
        self.changed(device, uevent=True)

    def add_above(self, module: Module) -> None:
        """A module is loaded that makes something of the devices that another's driver has."""
        for device in self.devices.values():
            if module.above and device.binding is not None and device.binding.driver.name == module.above:
                self._make(device, device.binding, [self._card_of(module)])

    def drop_above(self, module: Module) -> None:
        """It is unloaded; nobody has open what it made."""
        for device in self.devices.values():
            binding = device.binding
            if module.above and binding is not None and binding.driver.name == module.above:
                for card in [card for card in binding.cards if card.module == module.name]:
                    binding.cards.remove(card)
                    self._retire(device, card)
                binding.settle()
                self.changed(device, uevent=True)

    def open_card(self, function: PciAddress, user: str, kind: str = "") -> Card:
        """Somebody opens a device node of a function; which card it is of. `kind`: only one of this kind.

        Raises:
            KernelError: ENOENT, it has no such node (ready); ENODEV, its driver or module is letting go of it.
        """
        call = Call("open", function)
        device = self.device(call, function)
        card = device.binding.card(kind) if device.binding is not None and device.binding.ready else None
        if card is None:
            raise call.error(errno.ENOENT)
        if device.link is None or card.module in self.drivers.leaving:
            raise call.error(errno.ENODEV)
        card.users.add(user)
        self.changed(device)
        return card

    def close_cards(self, function: PciAddress, user: str, kind: str = "") -> list[Card]:
        """Somebody closes what he has open of a function; which it was. `kind`: only that."""
        device = self.devices.get(function)
        binding = device.binding if device is not None else None
        orphans = self._orphans.pop(function, [])
        there = [*(binding.cards if binding is not None else ()), *orphans]
        closed = [card for card in there if user in card.users and kind in {"", card.kind}]
        for card in closed:
            card.users.discard(user)
        if binding is not None:
            binding.settle()
        for card in orphans:
            self._bury(function, card)
        if closed:
            self.changed(device)
        return closed

    def changed(self, device: Device | None, *, uevent: bool = False) -> None:
        if device is not None:
            device.changed()
        self._facts = None
        if uevent:
            self.uevent()

    def later(self, work: Coroutine[None, None, None]) -> None:
        """Something that goes on by itself."""
        _ = self.begin(work)

    def begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """The same, and whoever began it may wait for its end."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _may_bind(self, device: Device, driver: PciDriver) -> bool:
        """Whether the group's DMA is free for this driver."""
        number = device.shape.iommu_group
        return driver.manages_dma or number is None or self.group(number).dma_owner is None

    def _bind(self, device: Device, driver: PciDriver) -> None:
        binding = Binding(driver, [])
        if driver.allows:
            device.power_control = "auto"
        device.binding = binding
        device.link = self.drivers.link(driver)
        own = self._numbered(Card(driver.makes, device.link.module, render=driver.render))
        cdev = [self._numbered(Card("vfio", device.link.module))] if driver.vfio and self.vfio_devices else []
        self._make(
            device, binding, [own, *cdev, *(self._card_of(module) for module in self.drivers.above(driver.name))]
        )

    def _card_of(self, module: Module) -> Card:
        return self._numbered(Card(module.makes, module.name, keeps=module.keeps))

    def _numbered(self, card: Card) -> Card:
        if card.kind:
            card.number = self.numbers.take(card.kind)
        return card

    def _make(self, device: Device, binding: Binding, cards: list[Card]) -> None:
        binding.cards += cards
        self._tell(self.made, device, cards)
        strike = self.faults.strike("nodes", device.address) if any(card.kind for card in cards) else None
        if strike is not None and strike.hits:
            for card in cards:
                card.ready = False
            self.later(self._make_nodes(device, cards, strike))
            self.changed(device, uevent=True)
        else:
            self._show_nodes(device, cards)

    async def _make_nodes(self, device: Device, cards: list[Card], strike: Strike) -> None:
        if await strike.land(Call("nodes", device.address)):
            for card in cards:
                card.ready = True
        self._show_nodes(device, cards)

    def _show_nodes(self, device: Device, cards: list[Card]) -> None:
        self.changed(device, uevent=True)
        self._tell(self.ready, device, [card for card in cards if card.ready])

    def _retire(self, device: Device, card: Card) -> None:
        self._tell(self.gone, device, [card])
        self._bury(device.address, card)

    def _tell(self, listeners: Iterable[CardListener], device: Device, cards: Iterable[Card]) -> None:
        for card in cards:
            for listener in listeners:
                listener(device, card)

    def _bury(self, function: PciAddress, card: Card) -> None:
        """Give its number back, once nobody has it open any more."""
        if card.users:
            self._orphans.setdefault(function, []).append(card)
        elif card.kind:
            self.numbers.give(card.kind, card.number)
