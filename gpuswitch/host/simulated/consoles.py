"""The frame buffers of a simulated machine, and the text consoles that fbcon shows on them.

Source: drivers/video/fbdev/core/fbcon.c of Linux 6.1, `fbcon_fb_registered` and what follows it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.devices import Card, Device
from gpuswitch.host.simulated.faults import Call, Operation
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer, Consoles

TERMINALS = range(1, 7)
VTCONSOLE = "vtcon1"
_VGA, _OTHER = 0x0300, 0x0380


@dataclass(frozen=True)
class _FrameBuffer:
    function: PciAddress | None
    module: str | None


@dataclass
class _Platform:
    """A platform device with the firmware's frame buffer; `number`: its driver has it. `users` have its node open."""

    shape: BootFramebuffer
    number: int | None = None
    users: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> tuple[str, ...]:
        return () if self.number is None else (f"fb{self.number}",)


class FrameBuffers:
    """What the virtual terminals are shown on. `boot`: the frame buffers that the firmware left, each with a driver.

    The frame buffer of the boot display gets all terminals when it appears, else `fb0`; or those of `console_map` get
    them (`fbcon=map:`), each in its turn. One that goes leaves them to
    another one that shows some already; with none such, fbcon is unbound, and they are mapped to any that is left.
    Unbound by hand, it maps none; bound again, all to the one that it had taken over first.
    """

    def __init__(
        self, bus: Bus, boot: Iterable[BootFramebuffer] = (), console_map: Sequence[int] | None = None
    ) -> None:
        self._bus = bus
        self._there: dict[int, _FrameBuffer] = {}
        self._mapped: dict[int, int] = {}
        self._bound = False
        self._map = console_map
        self._first = 0
        self._primary: int | None = None
        self._taken_over = 0
        self._platform = {shape.device: _Platform(shape) for shape in boot}
        for platform in self._platform.values():
            platform.number = self._register(None, None, primary=False)
        bus.made.append(self._made)
        bus.gone.append(self._gone)

    # What can be seen.

    def boot(self) -> tuple[BootFramebuffer, ...]:
        """Those of the firmware that a driver has."""
        return tuple(replace(each.shape, nodes=each.nodes) for each in self._platform.values() if each.nodes)

    def users(self) -> Iterator[tuple[str, str]]:
        """Who has one of the firmware's open, and its node below /dev."""
        for platform in self._platform.values():
            yield from ((user, node) for user in platform.users for node in platform.nodes)

    # What others do.

    def left(self, shape: BootFramebuffer) -> None:
        """A driver takes what the firmware left later than the PCI drivers their devices, as one that is a module."""
        self._platform[shape.device] = platform = _Platform(shape)
        platform.number = self._register(None, None, primary=False)
        self._bus.changed(None, uevent=True)

    def open(self, device: str, user: str) -> None:
        """Somebody draws on one of the firmware's."""
        self._platform[device].users.add(user)

    def close_all(self, user: str) -> list[str]:
        """He closes them; the nodes."""
        closed = [node for each in self._platform.values() if user in each.users for node in each.nodes]
        for platform in self._platform.values():
            platform.users.discard(user)
        return closed

    @property
    def console_map(self) -> frozenset[int] | None:
        return None if self._map is None else frozenset(self._map)

    def names(self, operation: Operation) -> frozenset[str]:
        """What an operation can be about."""
        match operation:
            case "map_consoles":
                return frozenset(map(str, self._there))
            case "unbind_platform" | "bind_platform":
                return frozenset(self._platform)
        return frozenset({VTCONSOLE})

    def pins(self, module: str) -> int:
        """The references that fbcon has to a module, for the frame buffers that it shows."""
        loaded = self._bus.drivers.loaded(module)
        if loaded is None or not loaded.pins or not self._bound:
            return 0
        return sum(self._there[number].module == module for number in set(self._mapped.values()))

    # The operations of the kernel.

    async def consoles(self, call: Call) -> Consoles:
        await self._bus.faults.strike("consoles", VTCONSOLE).land(call)
        return Consoles(
            frame_buffers={number: there.function for number, there in sorted(self._there.items())},
            mapped=dict(sorted(self._mapped.items())) if self._bound else {},
            bound={VTCONSOLE: self._bound} if self._there else {},
        )

    async def map_consoles(self, terminals: Sequence[int], frame_buffer: int, call: Call) -> None:
        """ENOENT: there is no such frame buffer. ENODEV: frame buffers show no text."""
        if not await self._bus.faults.strike("map_consoles", frame_buffer).land(call):
            return
        if frame_buffer not in self._there:
            raise call.error(errno.ENOENT)
        if not self._bound:
            raise call.error(errno.ENODEV)
        self._mapped.update(dict.fromkeys(terminals, frame_buffer))

    async def bind_console(self, vtconsole: str, bound: bool, call: Call) -> None:
        """ENOENT: there is no such vtconsole, since there is no frame buffer."""
        if not await self._bus.faults.strike("bind_console", vtconsole).land(call):
            return
        if vtconsole != VTCONSOLE or not self._there:
            raise call.error(errno.ENOENT)
        if bound == self._bound:
            return
        self._bound = bound
        if not bound:
            # fbcon_release_all
            self._mapped.clear()
        elif not self._mapped:
            # fbcon_init, for each terminal that there is
            self._mapped.update(dict.fromkeys(TERMINALS, self._taken_over))

    async def unbind_platform(self, device: str, driver: str, call: Call) -> None:
        done = await self._bus.faults.strike("unbind_platform", device).land(call)
        platform = self._platform.get(device)
        if done and platform is not None and platform.shape.driver == driver:
            self._free(platform)

    async def bind_platform(self, device: str, driver: str, call: Call) -> None:
        """ENODEV: there is no such device (a GPU's own driver removed it), or no such driver."""
        strike = self._bus.faults.strike("bind_platform", device)
        platform = self._platform.get(device)
        if platform is None or platform.shape.driver != driver:
            raise call.error(errno.ENODEV)
        if await strike.land(call) and platform.number is None:
            platform.number = self._register(None, None, primary=False)
            self._bus.changed(None)

    # How they work.

    def _made(self, device: Device, card: Card) -> None:
        kind = device.shape.class_code >> 8
        # aperture_remove_conflicting_pci_devices: who takes the GPU evicts what the firmware had left on it, and
        # vfio-pci only where that is a VGA one (vfio_pci_vga_init).
        if not ((card.kind == "drm" and kind in {_VGA, _OTHER}) or (device.on_vfio and kind == _VGA)):
            return
        for name in [n for n, platform in self._platform.items() if platform.shape.function == device.address]:
            self._free(self._platform.pop(name))
        if card.kind == "drm":
            card.frame_buffer = self._register(device.address, card.module, primary=device.shape.boot_display)

    def _gone(self, _: Device, card: Card) -> None:
        if card.frame_buffer is not None:
            self._unregister(card.frame_buffer)
            card.frame_buffer = None

    def _free(self, platform: _Platform) -> None:
        if platform.number is not None:
            self._unregister(platform.number)
            platform.number = None
            self._bus.changed(None)

    def _register(self, function: PciAddress | None, module: str | None, *, primary: bool) -> int:
        number = self._bus.numbers.take("fb")
        self._there[number] = _FrameBuffer(function, module)
        if primary and self._primary is None and self._map is None:
            self._primary = self._first = number
        given = [terminal for terminal in TERMINALS if self._given(terminal) == number]
        if given and not self._bound:
            # do_fbcon_takeover: the console driver is bound for all terminals at once.
            self._taken_over = number
            self._mapped.update(dict.fromkeys(TERMINALS, number))
            self._bound = True
        self._mapped.update(dict.fromkeys(given, number))
        return number

    def _given(self, terminal: int) -> int:
        """The frame buffer that gets a terminal when it appears (con2fb_map_boot)."""
        return self._map[(terminal - 1) % len(self._map)] if self._map else self._first

    def _unregister(self, number: int) -> None:
        del self._there[number]
        self._bus.numbers.give("fb", number)
        shown = [n for _, n in sorted(self._mapped.items()) if n != number]
        lost = [terminal for terminal, n in self._mapped.items() if n == number]
        if lost and not shown:
            self._bound = False
        if number == self._primary:
            self._primary = None
        if number == self._taken_over and self._there:
            self._taken_over = min(self._there)
        for terminal in lost:
            if self._there:
                self._mapped[terminal] = shown[0] if shown else self._taken_over
            else:
                del self._mapped[terminal]
