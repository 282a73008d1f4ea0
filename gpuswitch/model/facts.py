"""Facts: one frozen observation of the host. Guards and plans read nothing else.

Everything here comes from reads that take no device lock and wake no sleeping device.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache

from gpuswitch.model.address import PciAddress

VFIO_DRIVER = "vfio-pci"
"""The vfio driver of every PCI device; for some devices there are others (variants), which know more of them."""
VFIO_MODULE = "vfio_pci"


def named_for_vfio(driver: str) -> bool:
    """Whether a driver is one for vfio by its name: those of drivers/vfio/pci all end alike, `mlx5_vfio_pci`."""
    return driver.replace("_", "-").endswith(VFIO_DRIVER)


class Kind(StrEnum):
    """What a function is to us, told by its PCI class code (pci.ids, `C` section).

    A bridge leads to other functions, and never stands in the way of any (type 1 header; pcieport, its driver, does no
    DMA of its own). The chipset is what else the board has of class 06: host and ISA bridges, which are endpoints, and
    with a driver (EDAC has some) as much in the way as others. 0680 is an endpoint of any sort, NVSwitches among them.
    """

    DISPLAY = "display"
    ACCELERATOR = "accelerator"
    AUDIO = "audio"
    USB = "usb"
    UCSI = "ucsi"
    BRIDGE = "bridge"
    CHIPSET = "chipset"
    NETWORK = "network"
    STORAGE = "storage"
    OTHER = "other"

    @classmethod
    @cache
    def of(cls, class_code: int) -> Kind:
        """Kind of a 24-bit class code as sysfs' `class` shows it, for example 0x030000."""
        base, sub = class_code >> 16, class_code >> 8 & 0xFF
        match base, sub:
            case 0x03, _:
                return cls.DISPLAY
            case 0x04, 0x01 | 0x03:
                return cls.AUDIO
            case 0x0C, 0x03:
                return cls.USB
            case 0x0C, 0x80:
                return cls.UCSI
            case 0x12, 0x00:
                return cls.ACCELERATOR
            case 0x06, 0x04 | 0x09:
                return cls.BRIDGE
            case 0x06, sub if sub < 0x80:
                return cls.CHIPSET
            case 0x02, _:
                return cls.NETWORK
            case 0x01, _:
                return cls.STORAGE
        return cls.OTHER


_NVIDIA = 0x10DE
_OTHER_BRIDGE = 0x0680
_WITHOUT_OUTPUTS = 0x0302
_SUBSYSTEM = re.compile(r"sv0000([0-9A-F]{4})sd0000([0-9A-F]{4})")
"""In a modalias (do_pci_entry in scripts/mod/file2alias.c)."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A bound driver: its name on the PCI bus and the module that brought it (None: built in). The two often differ."""

    name: str
    module: str | None

    def comes_with(self, other: Driver) -> bool:
        """Whether it goes with the other when that one's module is unloaded: they may be two of one module."""
        return self.name == other.name or (self.module is not None and self.module == other.module)


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function as sysfs shows it.

    `maker` and `model` are the names of the hardware database, empty where it knows none.
    `driver` is the bound driver's link: None while nothing is bound *and* from the moment an unbind starts, so it
    alone never proves that an unbind is over. `nodes` are the device nodes (`/dev/dri/card0`) that the bound driver
    made and that are ready for use; `nodes_pending`: some are still being made. `serial` is the device's serial number,
    `00-80-ee-00-00-00-41-80`, empty where it has none, or the kernel does not tell; `serial_errno` is why it did
    not now: EIO, EACCES or EPERM, 0 where it tells, or has no such file. `parent` is the bridge above, None
    on a root bus. `asleep`: runtime power management has suspended it. `vfio_device`: its driver gives it to vfio
    (vfio_device_add() in drivers/vfio/vfio_main.c, since Linux 6.1).
    """

    address: PciAddress
    vendor: int
    device: int
    class_code: int
    maker: str = ""
    model: str = ""
    modalias: str = ""
    serial: str = ""
    serial_errno: int = 0
    driver: Driver | None = None
    iommu_group: int | None = None
    parent: PciAddress | None = None
    boot_display: bool = False
    physical_function: PciAddress | None = None
    virtual_functions: int = 0
    mediated_devices: int = 0
    nodes: tuple[str, ...] = ()
    nodes_pending: bool = False
    asleep: bool = False
    vfio_device: bool = False

    @property
    def kind(self) -> Kind:
        return Kind.of(self.class_code)

    @property
    def subsystem(self) -> str:
        """Vendor and device of the subsystem, `1043:87c1`: who sold the card, and as what; "" where nobody can tell."""
        found = _SUBSYSTEM.search(self.modalias)
        return f"{found[1]}:{found[2]}".lower() if found else ""

    @property
    def makes_gpu(self) -> bool:
        """Whether it is the heart of a GPU: a display function, or an accelerator, which its driver takes for a GPU.

        AMD's Instinct MI300 are accelerators; so are NPUs in processors of Intel.
        """
        kind = self.kind
        return kind is Kind.DISPLAY or kind is Kind.ACCELERATOR

    @property
    def may_have_screen(self) -> bool:
        """Whether it is a display function, and of another class than 0302, which has no outputs."""
        return self.kind is Kind.DISPLAY and self.class_code >> 8 != _WITHOUT_OUTPUTS

    @property
    def nvswitch(self) -> bool:
        """Whether it is an NVSwitch, which connects NVIDIA's GPUs with each other (class 0680)."""
        return self.vendor == _NVIDIA and self.class_code >> 8 == _OTHER_BRIDGE

    @property
    def driver_name(self) -> str | None:
        return self.driver.name if self.driver else None

    @property
    def on_vfio(self) -> bool:
        """Whether any vfio driver has it. The name tells before the kernel has made the vfio device."""
        return self.driver is not None and (self.vfio_device or named_for_vfio(self.driver.name))


@dataclass(frozen=True, slots=True)
class Module:
    """A kernel module that is loaded, or built in and with a folder in /sys/module.

    `references` is its reference count (None: it cannot be unloaded); `users` are the modules that need it.
    `version` is what MODULE_VERSION says ("" nothing). `modeset`: its parameter of that name is on. `built_in`: it was
    not loaded. One that was loaded, and has no references, is in a kernel that unloads none (CONFIG_MODULE_UNLOAD is
    not set).
    """

    references: int | None = None
    users: tuple[str, ...] = ()
    version: str = ""
    modeset: bool = False
    built_in: bool = False


@dataclass(frozen=True, slots=True)
class BootFramebuffer:
    """A platform device that the firmware's frame buffer became (`efi-framebuffer.0`), in the memory of `function`.

    `nodes` are those that its driver made, below /dev (`fb0`, `dri/card0`).
    """

    device: str
    driver: str
    function: PciAddress
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Consoles:
    """What the kernel's text consoles are shown on.

    `frame_buffers`: each frame buffer's number (`fb0`: 0) with the PCI function whose it is, None where it is none's.
    `mapped`: each virtual terminal (1 to 63) with the frame buffer that shows it. `bound`: each `vtconsole` that is a
    frame buffer device (`vtcon1`), and whether it is bound.
    """

    frame_buffers: Mapping[int, PciAddress | None] = field(default_factory=dict)
    mapped: Mapping[int, int] = field(default_factory=dict)
    bound: Mapping[str, bool] = field(default_factory=dict)

    def numbers(self, functions: Collection[PciAddress]) -> tuple[int, ...]:
        """The frame buffers of these functions, in order."""
        return tuple(sorted(number for number, function in self.frame_buffers.items() if function in functions))

    def of(self, functions: Collection[PciAddress]) -> tuple[int, ...]:
        """The virtual terminals that frame buffers of these functions show, in order."""
        return tuple(sorted(vt for vt, fb in self.mapped.items() if self.frame_buffers.get(fb) in functions))


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host at one instant.

    `iommu`: the kernel put devices into IOMMU groups; `processor`: `intel`, `amd` or `arm`, whose IOMMUs have different
    names, else "". `hypervisor`: this is a domain of `xen`, or another virtual `machine`, else "". `pci_drivers`:
    drivers registered on the PCI bus, by name, with the module that brought each (None: built in); `registrations`: a
    number for each that another registration of it has not. `barred`: modules that the kernel refuses to load
    (`module_blacklist=`). `vfio_available`: vfio-pci is registered, or its module is installed for the running kernel.
    `vfio_aliases`: what the modules of vfio drivers say that they are for, each
    pattern (`vfio_pci:v000010DEd00002342sv*sd*bc*sc*i*`) with its module. `vfio_nodes`: the numbers of the groups that
    have a `/dev/vfio/GROUP` node, and `vfio` unless vfio is in the kernel and makes no such nodes. `modules`: those
    that a driver profile names (`gpuswitch.model.drivers`) and that are in the kernel, by name. `boot_framebuffers`:
    those that a driver has. `console_map`: the frame buffers that the kernel's command line gives text consoles to
    (`fbcon=map:`), None where it says nothing of it. `autoprobe`: a driver that registers, or a device that is found,
    is bound without being asked for (`drivers_autoprobe` of the PCI bus). `modules_on_disk`: the index of the running
    kernel's modules is there; some distributions remove it with the kernel's package. `direct_regions`: the IOMMU
    groups with memory that the firmware claims and that must be mapped as it is, each with its ranges
    (`0xbdf6e000-0xbdf6efff`). `groups_without_iommu`: those that vfio made of a device without IOMMU. `slots`: the
    physical slots by the names that the firmware or the hotplug driver gave them, each with the place on the bus
    (`0000:01:00`) that is behind it.
    """

    functions: Mapping[PciAddress, PciFunction]
    iommu: bool
    vfio_available: bool
    pci_drivers: Mapping[str, str | None] = field(default_factory=dict)
    registrations: Mapping[str, int] = field(default_factory=dict)
    vfio_aliases: tuple[tuple[str, str], ...] = ()
    vfio_nodes: frozenset[str] = frozenset()
    modules: Mapping[str, Module] = field(default_factory=dict)
    boot_framebuffers: tuple[BootFramebuffer, ...] = ()
    console_map: frozenset[int] | None = None
    autoprobe: bool = True
    modules_on_disk: bool = True
    processor: str = ""
    direct_regions: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    groups_without_iommu: frozenset[int] = frozenset()
    hypervisor: str = ""
    barred: frozenset[str] = frozenset()
    slots: Mapping[str, str] = field(default_factory=dict)

    @property
    def vfio_without_groups(self) -> bool:
        """Whether vfio is in the kernel, and makes no group nodes (CONFIG_VFIO_GROUP is not set, since Linux 6.6)."""
        return any(map(named_for_vfio, self.pci_drivers)) and "vfio" not in self.vfio_nodes

    def group(self, number: int) -> tuple[PciFunction, ...]:
        """The functions of one IOMMU group, in address order."""
        return tuple(f for _, f in sorted(self.functions.items()) if f.iommu_group == number)

    def adds(self, function: PciFunction) -> tuple[str, ...]:
        """What a function brings with it that matters to who gives it away, in a word or two each."""
        framebuffer = any(each.function == function.address for each in self.boot_framebuffers)
        shared = function.virtual_functions, function.mediated_devices
        return (
            *(("NVSwitch",) if function.nvswitch else ()),
            *(("virtual function",) if function.physical_function is not None else ()),
            *(counted(number, what) for number, what in zip(shared, _SHARED, strict=True) if number),
            *(("firmware frame buffer",) if framebuffer else ()),
            *(("reserved region",) if function.iommu_group in self.direct_regions else ()),
        )

    def renewed(self, seen: HostFacts, functions: Iterable[PciAddress]) -> HostFacts:
        """These facts, with what a later look at some functions showed of them."""
        others = {a: f for a, f in self.functions.items() if a not in set(functions)}
        # Such a look does not count mediated devices, which need all of their own folder to be read.
        known = {a: self.functions[a].mediated_devices for a in seen.functions if a in self.functions}
        again = {a: replace(f, mediated_devices=known.get(a, f.mediated_devices)) for a, f in seen.functions.items()}
        return replace(self, functions=dict(sorted({**others, **again}.items())))


_SHARED = ("virtual function", "mediated device")


def counted(number: int, what: str) -> str:
    """`1 virtual function`, `2 virtual functions`."""
    return f"{number} {what}s" if number > 1 else f"1 {what}"
