"""libvirt on a simulated machine: its books, its daemon, and what that resets when it clears up after a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from gpuswitch.host.port import Libvirt
from gpuswitch.host.simulated.bus import Bus
from gpuswitch.host.simulated.devices import Trouble
from gpuswitch.host.simulated.faults import Call
from gpuswitch.host.simulated.systemd import Units
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit
from gpuswitch.model.owner import Owner

LIBVIRTD = Unit("libvirtd.service")


class Books:
    """The machines that libvirt has, each with its functions. A machine without the unit of libvirtd has no libvirt.

    `reset`: the functions that were reset by the bus while they were on a host driver; each has lost its BARs.
    `started` is told when the daemon starts, and clears up by `cleared_up` after machines that have ended meanwhile.
    """

    def __init__(self, bus: Bus, units: Units) -> None:
        self._bus = bus
        self._units = units
        self.machines: dict[Owner, tuple[PciAddress, ...]] = {}
        self.reset: list[PciAddress] = []
        self.started: Callable[[], None] = lambda: None
        self.watchers: list[Callable[[], None]] = []
        units.settled = self._settled

    @property
    def running(self) -> bool:
        return self._units.state(LIBVIRTD) == "active"

    def enter(self, owner: Owner, functions: tuple[PciAddress, ...]) -> None:
        """This machine was started with these functions."""
        self.machines[owner] = functions
        self._tell()

    def cleared_up(self, owner: Owner) -> None:
        """The daemon has reset what this machine had and is not on vfio, and gives it back."""
        for function in self.machines.pop(owner, ()):
            device = self._bus.devices.get(function)
            if device is not None and device.binding is not None and not device.seen().on_vfio:
                device.trouble = Trouble.LOST
                self.reset.append(function)
        self._tell()

    def _settled(self, unit: Unit, state: str) -> None:
        if unit == LIBVIRTD:
            if state == "active":
                self.started()
            self._tell()

    def _tell(self) -> None:
        for changed in list(self.watchers):
            changed()


class SimulatedLibvirt(Libvirt):
    """The port, on a machine's books."""

    def __init__(self, bus: Bus, books: Books) -> None:
        self._bus = bus
        self._books = books

    def machines(self) -> Mapping[Owner, frozenset[PciAddress]]:
        if number := self._bus.faults.strike("libvirt", "").errno:
            raise Call("read", "libvirt's books").error(number)
        return {owner: frozenset(functions) for owner, functions in self._books.machines.items()}

    def file_of(self, owner: Owner) -> str:
        return f"/run/libvirt/qemu/{owner.name}.xml"

    def running(self) -> bool:
        return self._books.running

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        # Wrapped, so that the same callable may watch twice, and each stops itself only.
        watcher = partial(changed)
        self._books.watchers.append(watcher)
        return partial(self._books.watchers.remove, watcher)
