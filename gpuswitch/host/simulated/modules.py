"""The modules of a simulated machine: who needs them, and how they are loaded and unloaded (kernel/module/main.c)."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.consoles import FrameBuffers
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.drivers import Module, matches
from gpuswitch.host.simulated.faults import Call
from gpuswitch.model import facts
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import MODULES, Candidate

_SHOWN = tuple(sorted(MODULES))


class Modules:
    """The modules of one machine. What is loaded with the machine has bound what it matches, in this order.

    `unloads`: its kernel unloads modules, and counts who uses them (CONFIG_MODULE_UNLOAD).
    """

    def __init__(self, bus: Bus, frame_buffers: FrameBuffers) -> None:
        self._bus = bus
        self._drivers = bus.drivers
        self._frame_buffers = frame_buffers
        self._left = asyncio.Event()
        self.unloads = True

    def seen(self) -> dict[str, facts.Module]:
        """What a look shows: those that a driver profile names."""
        opened = Counter(card.module for _, card in self._bus.cards() for _ in card.users)
        users = self._drivers.all_users()
        return {
            name: facts.Module(
                len(users[name]) + opened[name] + self._frame_buffers.pins(name) if self.unloads else None,
                tuple(users[name]),
                module.version,
                module.modeset,
            )
            for name in _SHOWN
            if (module := self._drivers.loaded(name)) is not None
        }

    def opened(self, name: str) -> list[str]:
        """Who has something of the module open, once for each thing."""
        return [user for _, card in self._bus.cards() if card.module == name for user in card.users]

    def references(self, name: str) -> int:
        return len(self._drivers.users(name)) + len(self.opened(name)) + self._frame_buffers.pins(name)

    def at_boot(self, name: str) -> None:
        """Load it with the machine, as far as what it needs is there and finds a device, where it refuses without."""
        try:
            missing = self._drivers.missing(name)
        except KeyError:
            return
        for module in missing:
            if not self._bus.finds_a_device(module):
                return
            self._drivers.register(module)
            self._bus.bind_all()
            self._bus.add_above(module)

    # The operations of the kernel.

    async def candidates(self, function: PciAddress, call: Call) -> tuple[Candidate, ...]:
        device = self._bus.device(call, function)
        await self._bus.faults.strike("candidates", function).land(call)
        return self._drivers.candidates(device.shape.modalias)

    async def loadable(self, modules: Sequence[str], call: Call, *, by_name: bool) -> tuple[str, ...]:
        await self._bus.faults.strike("loadable", ", ".join(modules)).land(call)
        return tuple(name for name in modules if self._drivers.loadable(name, by_name=by_name))

    async def load(self, module: str, call: Call) -> None:
        """ENOENT: no such module is installed (modprobe ends with 1, says `not found`). ENODEV: it found no device."""
        strike = self._bus.faults.strike("load", module)
        try:
            there = self._drivers.loaded(module) is not None and module not in self._drivers.leaving
            needed = () if there else self._drivers.needed(module)
        except KeyError:
            raise call.error(errno.ENOENT) from None
        if await strike.land(call):
            # One that is on its way out is waited for, and then loaded anew (finished_loading).
            while not self._drivers.leaving.isdisjoint(needed):
                await call.wait_in(self._left.wait(), "S", "add_unformed_module")
            await self._insert(() if there else self._drivers.missing(module), call)

    async def _insert(self, missing: tuple[Module, ...], call: Call) -> None:
        for module in missing:
            if self._drivers.loaded(module.name) is not None:
                continue
            if not self._bus.finds_a_device(module):
                self._bus.say_why(module)
                raise call.error(errno.ENODEV)
            self._drivers.register(module)
            self._bus.changed(None, uevent=bool(module.drivers))
            if self._bus.autoprobe:
                await self._bind(module, call)
            self._bus.add_above(module)

    async def unload(self, module: str, call: Call) -> None:
        """EAGAIN: something uses it, and nothing was changed. Nobody can open what it made from that check on.

        ENOSYS: the kernel has no delete_module(2).
        """
        strike = self._bus.faults.strike("unload", module)
        there = self._drivers.loaded(module)
        if there is None:
            await strike.land(call)
            return
        if not self.unloads:
            raise call.error(errno.ENOSYS)
        if module in self._drivers.leaving or self.references(module):
            raise call.error(errno.EAGAIN)
        self._drivers.leaving.add(module)
        try:
            if await strike.land(call):
                await self._unbind(there, call)
                self._bus.drop_above(there)
                self._drivers.unregister(there)
                self._bus.changed(None, uevent=True)
        finally:
            self._drivers.leaving.discard(module)
            self._left.set()
            self._left.clear()

    # How they work.

    async def found(self, device: Device) -> None:
        """There is a new device: udev hears of it, and loads what fits it, and what belongs on top of that."""
        wanted = [each.module for each in self._drivers.candidates(device.shape.modalias)]
        wanted += (m.name for m in self._drivers.modules.values() if not {*wanted}.isdisjoint(m.requires))
        for name in wanted:
            # Nobody asks what comes of that.
            with suppress(KernelError, KeyError):
                await self._insert(self._drivers.missing(name), Call("load", name))

    async def _bind(self, module: Module, call: Call) -> None:
        for driver in module.drivers:
            for device in list(self._bus.devices.values()):
                if matches(driver, device.shape.modalias, device.override):
                    # A device that cannot be bound does not keep a driver from being registered.
                    with suppress(KernelError):
                        async with self._bus.locked(device, call):
                            self._bus.bind_first_match(device)

    async def _unbind(self, module: Module, call: Call) -> None:
        for driver in module.drivers:
            for device in reversed(list(self._bus.devices.values())):
                if device.bound_to(driver.name) is not None:
                    # One that leaves the bus meanwhile has left its driver too.
                    with suppress(KernelError):
                        async with self._bus.locked(device, call):
                            if (binding := device.bound_to(driver.name)) is not None:
                                await self._bus.let_go(device, binding, call, None)
