"""The drivers of a simulated machine: installed as modules, registered on the PCI bus, and matched with devices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from gpuswitch.model.drivers import Candidate
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, Driver


@dataclass(frozen=True)
class PciDriver:
    """A driver of the PCI bus.

    `aliases`: the modalias patterns that it matches, as modules.alias has them. `makes`: the kind of `Card`, for one
    that makes device nodes; `render`: with a render node. `waits`: the process state in which its remove() waits for
    those who have it open ("D", "S"; "" for one that goes at once, as DRM drivers do), in kernel function
    `kernel_wait`. `suspends`: a device may sleep while bound to it. `allows`: it sets power/control to `auto` when it
    binds, whatever that was, and to `on` when it lets go (vfio_pci_core_register_device() and its counterpart).
    `manages_dma`: it does DMA for somebody else or none at all, and may join a group that a VM owns
    (`driver_managed_dma`). `vfio`: it gives its devices to vfio; of these it says so (`vfio_pci:...` patterns), and has
    them when a driver override names it.
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
    vfio: tuple[str, ...] = ()

    def matches(self, modalias: str) -> bool:
        return _match(self.aliases, modalias)


@cache
def _match(aliases: tuple[str, ...], modalias: str) -> bool:
    return any(fnmatchcase(modalias, alias) for alias in aliases)


@dataclass(frozen=True)
class Module:
    """A kernel module that is installed; `requires` are loaded before it, by name.

    `above`: it makes a `Card` of the kind `makes` of each device that the driver of this name has, as nvidia_drm does;
    `keeps`: and keeps the device in use for as long as it is loaded. `pins`: fbcon holds a reference to it while it
    shows a frame buffer of it. `needs_device`: it refuses to load where there is no device that it can have, as
    nvidia's does. `aliases`: it says that it is for these, besides what its drivers match. `version` and `modeset`: see
    `gpuswitch.model.facts.Module`.
    """

    name: str
    drivers: tuple[PciDriver, ...] = ()
    requires: tuple[str, ...] = ()
    above: str = ""
    makes: str = ""
    keeps: bool = False
    pins: bool = False
    blacklisted: bool = False
    needs_device: bool = False
    aliases: tuple[str, ...] = ()
    version: str = ""
    modeset: bool = False

    def is_for(self, modalias: str) -> bool:
        """Whether modules.alias has it for a device: that it has a driver for that does not follow."""
        return _match(self.aliases, modalias) or any(driver.matches(modalias) for driver in self.drivers)


class Drivers:
    """What is installed, and what is registered, in that order: the first registered driver that matches wins."""

    def __init__(self, modules: Iterable[Module], builtin: Iterable[PciDriver]) -> None:
        self.modules: Mapping[str, Module] = {module.name: module for module in modules}
        self.vfio_aliases = tuple(
            (alias, m.name) for m in self.modules.values() for driver in m.drivers for alias in driver.vfio
        )
        """As modules.alias has them."""
        self.leaving: set[str] = set()
        """Modules that are being unloaded: what they made cannot be opened any more."""
        self._loaded: dict[str, Module] = {}
        self._registered: dict[str, tuple[PciDriver, str | None]] = {d.name: (d, None) for d in builtin}
        self._registrations: Counter[str] = Counter(self._registered)

    def registered(self) -> dict[str, str | None]:
        """The registered drivers, with the module that brought each."""
        return {name: module for name, (_, module) in self._registered.items()}

    def registrations(self) -> dict[str, int]:
        """The same, with how often each was registered."""
        return {name: self._registrations[name] for name in self._registered}

    def vfio_available(self) -> bool:
        return VFIO_DRIVER in self._registered or VFIO_MODULE in self.modules

    def vfio_registered(self) -> bool:
        return any(driver.vfio for driver, _ in self._registered.values())

    def loaded(self, name: str) -> Module | None:
        return self._loaded.get(name)

    def users(self, name: str) -> tuple[str, ...]:
        """The loaded modules that need this one."""
        return tuple(self.all_users()[name])

    def all_users(self) -> Mapping[str, list[str]]:
        """The same of every module at once, by its name: none where nobody needs it."""
        users = defaultdict[str, list[str]](list)
        for module in self._loaded.values():
            for name in module.requires:
                users[name].append(module.name)
        return users

    def above(self, driver: str) -> tuple[Module, ...]:
        """The loaded modules that make something of the devices of this driver."""
        return tuple(module for module in self._loaded.values() if module.above == driver)

    def needed(self, name: str) -> tuple[str, ...]:
        """What a load of this module needs to be there, in order: itself last.

        Raises:
            KeyError: the module, or one that it requires, is not installed.
        """
        needed = (each for required in self.modules[name].requires for each in self.needed(required))
        return (*dict.fromkeys(needed), name)

    def missing(self, name: str) -> tuple[Module, ...]:
        """Those of the needed ones that a load has to load. Raises as `needed` does."""
        return tuple(self.modules[each] for each in self.needed(name) if each not in self._loaded)

    def register(self, module: Module) -> None:
        """Put a module into the kernel, with its drivers."""
        self._loaded[module.name] = module
        self._registered.update({driver.name: (driver, module.name) for driver in module.drivers})
        self._registrations.update(driver.name for driver in module.drivers)

    def unregister(self, module: Module) -> None:
        """Take it out."""
        del self._loaded[module.name]
        for driver in module.drivers:
            del self._registered[driver.name]

    def candidates(self, modalias: str) -> tuple[Candidate, ...]:
        """The modules that udev would load for a device, without those for vfio, and without what cannot be loaded."""
        return tuple(
            Candidate(module.name, frozenset(self.needed(module.name)[:-1]))
            for module in self.modules.values()
            if not any(driver.vfio for driver in module.drivers)
            and module.is_for(modalias)
            and self.loadable(module.name)
        )

    def loadable(self, name: str, *, by_name: bool = False) -> bool:
        """Whether it, and what it needs, is installed, and it is not blacklisted; `by_name`: or that is no matter."""
        try:
            self.needed(name)
        except KeyError:
            return False
        return by_name or not self.modules[name].blacklisted

    def first_match(self, modalias: str, override: str | None) -> PciDriver | None:
        known = (d for d, module in self._registered.values() if module not in self.leaving)
        return next((d for d in known if matches(d, modalias, override)), None)

    def link(self, driver: PciDriver) -> Driver:
        """What the `driver` link of a device says that is bound to it."""
        return Driver(driver.name, self._registered[driver.name][1])


def matches(driver: PciDriver, modalias: str, override: str | None) -> bool:
    """pci_match_device(): an override that is set is the only match, whatever the driver's own ids say."""
    return override == driver.name if override is not None else driver.matches(modalias)
