"""The drivers of a simulated machine: installed as modules, registered on the PCI bus, and matched with devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, Driver


@dataclass(frozen=True)
class PciDriver:
    """A driver of the PCI bus.

    `aliases`: the modalias patterns that it matches, as modules.alias has them. `makes`: `drm` or `sound` for one that
    makes device nodes; `render`: with a render node. `waits`: the process state in which its remove() waits for those
    who have it open ("D", "S"; "" for one that goes at once, as DRM drivers do), in kernel function `kernel_wait`.
    `suspends`: a device may sleep while bound to it. `allows`: it sets power/control to `auto` when it binds, whatever
    that was, and to `on` when it lets go (vfio_pci_core_register_device() and its counterpart).
    `manages_dma`: it does DMA for somebody else or none at all, and may join a group that a VM owns
    (`driver_managed_dma`).
    """

    name: str
    aliases: tuple[str, ...] = ()
    makes: str = ""
    render: bool = True
    waits: str = ""
    kernel_wait: str = ""
    suspends: bool = False
    allows: bool = False
    manages_dma: bool = False

    def matches(self, modalias: str) -> bool:
        return any(fnmatchcase(modalias, alias) for alias in self.aliases)


@dataclass(frozen=True)
class Module:
    """A kernel module that is installed; `requires` are loaded before it, by name.

    `needs_device`: it refuses to load where there is no device that it can have, as nvidia's does.
    """

    name: str
    drivers: tuple[PciDriver, ...] = ()
    requires: tuple[str, ...] = ()
    blacklisted: bool = False
    needs_device: bool = False


class Drivers:
    """What is installed, and what is registered, in that order: the first registered driver that matches wins."""

    def __init__(self, modules: Iterable[Module], builtin: Iterable[PciDriver]) -> None:
        self.modules: Mapping[str, Module] = {module.name: module for module in modules}
        self._loaded: set[str] = set()
        self._registered: dict[str, tuple[PciDriver, str | None]] = {d.name: (d, None) for d in builtin}

    def registered(self) -> dict[str, str | None]:
        """The registered drivers, with the module that brought each."""
        return {name: module for name, (_, module) in self._registered.items()}

    def vfio_available(self) -> bool:
        return VFIO_DRIVER in self._registered or VFIO_MODULE in self.modules

    def loaded(self, name: str) -> bool:
        return name in self._loaded

    def register(self, name: str) -> list[PciDriver]:
        """Load a module and what it requires; returns the drivers that are new on the bus."""
        if name in self._loaded:
            return []
        self._loaded.add(name)
        module = self.modules[name]
        new = [driver for required in module.requires for driver in self.register(required)]
        self._registered.update({driver.name: (driver, name) for driver in module.drivers})
        return [*new, *module.drivers]

    def candidates(self, modalias: str) -> tuple[str, ...]:
        """The modules that udev would load for a device, without vfio-pci."""
        return tuple(
            module.name
            for module in self.modules.values()
            if module.name != VFIO_MODULE
            and not module.blacklisted
            and any(driver.matches(modalias) for driver in module.drivers)
        )

    def first_match(self, modalias: str, override: str | None) -> PciDriver | None:
        return next((d for d, _ in self._registered.values() if matches(d, modalias, override)), None)

    def link(self, driver: PciDriver) -> Driver:
        """What the `driver` link of a device says that is bound to it."""
        return Driver(driver.name, self._registered[driver.name][1])


def matches(driver: PciDriver, modalias: str, override: str | None) -> bool:
    """pci_match_device(): an override that is set is the only match, whatever the driver's own ids say."""
    return override == driver.name if override is not None else driver.matches(modalias)
