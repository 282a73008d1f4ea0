"""What is known of host drivers, as data: one profile each, and a safe one for every driver without."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, Driver, HostFacts, PciFunction, named_for_vfio
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Unit

# Modules whose PCI driver goes by another name; for all others the two are the same.
_DRIVER_OF_MODULE: Mapping[str, str] = {
    "bochs": "bochs-drm",
    "i2c_designware_pci": "i2c-designware-pci",
    "i2c_nvidia_gpu": "nvidia-gpu",
    "nova_core": "nova-core",
    "vfio_pci": VFIO_DRIVER,
    "xe_vfio_pci": "xe-vfio-pci",
    "xhci_pci": "xhci_hcd",
}
_MODULE_OF_DRIVER: Mapping[str, str] = {
    **{driver: module for module, driver in _DRIVER_OF_MODULE.items()},
    "NovaCore": "nova_core",  # as it was called before 7.x
    "nvidia-nvswitch": "nvidia",
}
# The drivers of modules that bring several, by the base class and subclass of what each is for. Of an NVSwitch's,
# NVIDIA's linux_nvswitch.c.
_DRIVER_OF_CLASS: Mapping[tuple[str, int], str] = {("nvidia", 0x0680): "nvidia-nvswitch"}
# Drivers whose tables have devices of another one's, too. They leave these to it, unless their parameter `force_probe`
# says otherwise: so does xe_pci_probe in xe_pci.c with all that i915 knows.
_LEAVES_TO: Mapping[str, str] = {"xe": "i915"}
# They have any device that is aimed at them, and serve none.
_STUBS = frozenset({"pci-stub", "pciback", "xen-pciback"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module that the modalias of a function finds: by its own table, or by what modprobe's configuration says.

    `module` is the name to load it by, which is its file's: in the kernel, it may be called otherwise. `needs` are the
    modules that are loaded before it.
    """

    module: str
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Profile:
    """How to get on with one PCI driver.

    `chain`: the modules around it, in the order in which they can be unloaded, its own last; loaded in reverse.
    `unload_detaches`: for the last device, unloading the chain is the safe way to detach it. `waits`: its remove()
    waits for whoever has the device open, so references to its module that no process explains count as a holder.
    `needs_device`: its module does not load where it finds no device. `shows` are those of the chain without which the
    device has no picture.
    `units` have the device open for the host's comfort, and are stopped where they are active. `nodes` are device nodes
    that all devices of the driver share, below /dev. `unbind_seconds`: an unbind may rightly take this long.
    `forgets_from`: from this version on it waits for ever, since it does not notice who lets go; `forgets_until` are
    those that mended it. `single_from`: those from which one of several devices can be let go while a `modeset` module
    of the chain is on. Of both, each holds for its own branch, and the last one for all later ones too. `persistence`:
    has a mode in which the driver keeps the device in use by itself.
    """

    driver: str
    chain: tuple[str, ...] = ()
    unload_detaches: bool = False
    waits: bool = False
    units: tuple[Unit, ...] = ()
    nodes: tuple[str, ...] = ()
    unbind_seconds: float = 0.0
    forgets_from: tuple[int, ...] = ()
    forgets_until: tuple[tuple[int, ...], ...] = ()
    single_from: tuple[tuple[int, ...], ...] = ()
    modeset: str = ""
    persistence: bool = False
    needs_device: bool = False
    shows: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module that brings the driver, "" where that is built in."""
        return self.chain[-1] if self.chain else ""


PERSISTENCED = Unit("nvidia-persistenced.service")
_PROFILES: Mapping[str, Profile] = {
    profile.driver: profile
    for profile in (
        Profile(
            "nvidia",
            # A module that uses another comes before it; those that are not there are left out.
            chain=(
                *("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia_peermem", "nvidia_fs", "gdrdrv"),
                *("nvidia_vgpu_vfio", "nvidia"),
            ),
            unload_detaches=True,
            # nv_pci_remove waits for usage_count in a loop. From 595.45.04 on it has taken the device out of its list
            # by then, where those who let go look for it (open-gpu-kernel-modules, issues 1119 and 1374; open at 610).
            waits=True,
            forgets_from=(595, 45, 4),
            units=(PERSISTENCED, Unit("nvidia-powerd.service")),
            nodes=("nvidiactl", "nvidia-modeset", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps/*"),
            # nvidia_modeset_remove: there from 580.105.08, not yet in 580.95.05, and in every branch from 590 on.
            single_from=((580, 105), (590,)),
            modeset="nvidia_drm",
            persistence=True,
            # nvidia_init_module: "No NVIDIA GPU found".
            needs_device=True,
            shows=("nvidia_drm",),
        ),
        # nvswitch_remove waits for nobody (linux_nvswitch.c). Its nodes are below no device in sysfs.
        Profile("nvidia-nvswitch", chain=("nvidia",), nodes=("nvidia-nvswitch*",)),
        # The USB-C controller of Turing cards: its ucsi_ccg gives up on a silent port after minutes only.
        Profile("nvidia-gpu", chain=("ucsi_ccg", "i2c_nvidia_gpu"), unbind_seconds=200.0),
        # snd_card_free waits for the last descriptor of the card, in state D.
        Profile("snd_hda_intel", chain=("snd_hda_intel",), waits=True),
        Profile("nouveau", chain=("nouveau",)),
        # Its DRM device is made by nova_drm.
        *(Profile(name, chain=("nova_drm", "nova_core"), shows=("nova_drm",)) for name in ("nova-core", "NovaCore")),
        Profile("amdgpu", chain=("amdgpu",)),
        Profile("i915", chain=("i915",)),
        Profile("xe", chain=("xe",)),
        Profile("xhci_hcd", chain=("xhci_pci",)),
    )
}

NVIDIA = _PROFILES["nvidia"]

MODULES = frozenset(module for profile in _PROFILES.values() for module in profile.chain)
"""Every module that a profile names."""

# Modules that bring no PCI driver, though they may carry the table of one (nvidia_drm has that of nvidia compiled in),
# with the driver that they are around.
_AROUND: Mapping[str, str] = {
    module: profile.driver
    for profile in reversed([*_PROFILES.values()])
    for module in profile.chain
    if module != profile.module
}


def profile_of(driver: Driver) -> Profile:
    """Its profile; for a driver that has none, one that is safe with any: look for holders, unbind, unload nothing.

    A driver without profile may still be told to unload (`module_policy = "always"`): its own module is its chain.
    """
    known = _PROFILES.get(driver.name)
    if known is not None:
        return known
    return Profile(driver.name, chain=(driver.module,) if driver.module else (), waits=True)


def lets_go_of_one(profile: Profile, version: str) -> bool:
    """Whether this version of the driver can let one of several devices go while its modeset module is on."""
    return not profile.single_from or _reached(version, profile.single_from)


def waits_for_ever(profile: Profile, version: str) -> bool:
    """Whether the remove() of this version of the driver never returns once it waits, whoever lets go of the device."""
    affected = bool(profile.forgets_from) and _numbers(version) >= profile.forgets_from
    return affected and not (profile.forgets_until and _reached(version, profile.forgets_until))


def _reached(version: str, since: tuple[tuple[int, ...], ...]) -> bool:
    """Each holds for its own branch, and the last one for all later ones too."""
    have = _numbers(version)
    *branches, onwards = since
    return have >= onwards or any(have[:1] == branch[:1] and have >= branch for branch in branches)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def from_module(module: str, registered: Mapping[str, str | None], class_code: int = 0) -> Driver:
    """The PCI driver that a module brings for a function of this class.

    `registered` (driver: module) is believed first; what is built in shows no module there, and may have dashes in its
    name where the module has underscores. While it says nothing, it is as good a guess as there is.
    Who packs nvidia's modules for a distribution may put a word behind their names: nvidia-current.ko, or
    nvidia-tesla-470.ko, is called nvidia in the kernel.
    """
    own = kernel_name(module)
    known = _DRIVER_OF_CLASS.get((own, class_code >> 8)) or _DRIVER_OF_MODULE.get(own, own)
    loaded = sorted(name for name, owner in registered.items() if owner == own)
    for name in (known, _DRIVER_OF_MODULE.get(own, own), *loaded):
        if name in loaded:
            return Driver(name, own)
    built_in = [name for name, owner in registered.items() if owner is None and _alike(name, known)]
    name = next(iter(built_in), known)
    return Driver(name, registered.get(name, module))


def kernel_name(module: str) -> str:
    """What the kernel calls it, as far as that can be told before it is loaded: of nvidia_current_drm, nvidia_drm."""
    if module in MODULES or not module.startswith(f"{NVIDIA.module}_"):
        return module
    around = (name for name in NVIDIA.chain[:-1] if module.endswith(name.removeprefix(NVIDIA.module)))
    return next(around, NVIDIA.module)


def shown_by(driver: Driver) -> Iterator[str]:
    """The modules without which devices of the driver have no picture: by the kernel's name, then by the file's."""
    profile = profile_of(driver)
    for module in profile.shows:
        yield module
        if driver.module and driver.module != profile.module and kernel_name(driver.module) == profile.module:
            yield driver.module + module.removeprefix(profile.module)


def from_name(name: str, registered: Mapping[str, str | None]) -> Driver:
    """The driver of that name, with the module to load for it; by the name of its module, where it has another."""
    if name in registered:
        return Driver(name, registered[name])
    module = name.replace("-", "_")
    if name not in _MODULE_OF_DRIVER and (module in _DRIVER_OF_MODULE or module != kernel_name(module)):
        return from_module(module, registered)
    return Driver(name, _MODULE_OF_DRIVER.get(name, module))


def around(name: str, registered: Iterable[str]) -> str:
    """The driver that this module is around: so it is no driver itself. "" where nothing of the kind is known."""
    return "" if name in registered else _AROUND.get(kernel_name(name.replace("-", "_")), "")


def named_surely(driver: Driver, registered: Iterable[str]) -> bool:
    """Whether its module brings a driver of this name for certain. Else only a look after it is loaded can tell."""
    name = driver.name
    return name in registered or (name in _PROFILES and [*_MODULE_OF_DRIVER.values()].count(str(driver.module)) < 2)


def host_drivers(function: PciFunction, candidates: Iterable[Candidate], facts: HostFacts) -> tuple[Driver, ...]:
    """The drivers that may have a function at home, by the modules that its modalias finds: more than one is a doubt.

    What an equal function has is right for this one, too. Else a driver that is registered, since the host works with
    it, is more likely than one that would have to be loaded first.
    """
    equals = {f.driver for f in facts.functions.values() if _equal(f, function) and f.driver and not f.on_vfio}
    equals = {driver for driver in equals if driver.name not in _STUBS}
    if len(equals) == 1:
        return tuple(equals)
    registered = facts.pci_drivers
    modules = [each for each in candidates if not _brings_none(each.module, facts)]
    # What cannot be without another one sits on top of it.
    names = {each.module for each in modules}
    own = [each.module for each in modules if names.isdisjoint(each.needs - {each.module})]
    found: dict[str, Driver] = {}
    for module in own:
        driver = from_module(module, registered, function.class_code)
        # Several files that bring one module: modprobe's configuration says which of them that is.
        same = found.setdefault(driver.name, driver) == driver
        found[driver.name] = driver if same else Driver(driver.name, kernel_name(module))
    drivers = [driver for name, driver in found.items() if _LEAVES_TO.get(name) not in found]
    return tuple(driver for driver in drivers if driver.name in registered) or tuple(drivers)


def _brings_none(module: str, facts: HostFacts) -> bool:
    """Whether it is around a driver, or the kernel refuses it; or it is loaded and has none, as nouveau with modeset=0.

    kmod knows nothing of `module_blacklist=`, which is the kernel's own (blacklisted() in kernel/module/main.c).
    """
    if kernel_name(module) in _AROUND or not facts.barred.isdisjoint({module, kernel_name(module)}):
        return True
    loaded = facts.modules.get(module)
    return loaded is not None and loaded.references is not None and module not in facts.pci_drivers.values()


def _equal(one: PciFunction, other: PciFunction) -> bool:
    return (one.vendor, one.device, one.class_code) == (other.vendor, other.device, other.class_code)


def vfio_drivers(gpu: Gpu, facts: HostFacts, named: str = "") -> Mapping[PciAddress, Driver]:
    """The vfio driver of each function of the GPU: the one that it has, else the one that it is to get.

    `named`: what the configuration names for the display functions, "" nothing. All others get what fits best.
    """
    return {f.address: _vfio_driver(f, facts, named if f.makes_gpu else "") for f in gpu.present(facts)}


def _vfio_driver(function: PciFunction, facts: HostFacts, named: str) -> Driver:
    """Where nobody names one, that of the most telling alias; only vfio-pci has one for every function.

    libvirt chooses so since version 10 (virPCIDeviceFindBestVFIOVariant in src/util/virpci.c).
    """
    if function.driver is not None and function.on_vfio:
        return function.driver
    registered = facts.pci_drivers
    if named:
        # Some are called with underscores, as their modules are, and some with dashes.
        known = next((name for name in registered if _alike(name, named)), None)
        return Driver(known, registered[known]) if known else from_module(named.replace("-", "_"), registered)
    alias = function.modalias.replace("pci:", "vfio_pci:", 1)
    fitting = [(pattern.count("*"), module) for pattern, module in facts.vfio_aliases if fnmatchcase(alias, pattern)]
    best = from_module(min(fitting)[1], registered) if fitting else None
    # A step knows by its driver's name whether it deals with vfio.
    return best if best and named_for_vfio(best.name) else from_name(VFIO_DRIVER, registered)


def vfio_available(driver: Driver, facts: HostFacts) -> bool:
    """Whether a vfio driver is registered, or its module is installed for the running kernel."""
    if driver.name == VFIO_DRIVER:
        return facts.vfio_available
    return driver.name in facts.pci_drivers or any(module == driver.module for _, module in facts.vfio_aliases)


def _alike(one: str, other: str) -> bool:
    return one.replace("_", "-") == other.replace("_", "-")
