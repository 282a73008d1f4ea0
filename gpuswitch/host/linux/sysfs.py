"""A look at the host: sysfs, the device nodes and udev's database, read without a lock and without waking anything.

What is read, and why that is safe (Linux 6.1; `show` functions of the files named):

- links and folders: kernfs alone answers, no driver and no device lock is involved;
- `modalias` (drivers/pci/pci-sysfs.c), `power/runtime_status` (drivers/base/power/sysfs.c), `dev`,
  `drivers_autoprobe` (drivers/base/bus.c), and of a module `initstate`, `refcnt` and `version` (kernel/module): they
  print a field of a structure;
- the `address` of a physical slot (drivers/pci/slot.c): the same;
- `serial_number` of a GPU (drivers/pci/pci-sysfs.c, since Linux 6.18): it reads the configuration space under a lock
  that no driver holds while it waits, and wakes nothing: a device that has no power then has no number;
- what tells the booted display (gpuswitch/host/linux/booted.py);
- `reserved_regions` of an IOMMU group, once for as long as the same devices are in it: it takes the mutex of that group
  (iommu_get_group_resv_regions in drivers/iommu/iommu.c), which is held while a device joins or leaves it or its domain
  changes, and not while a driver's probe or remove waits;
- of a module `parameters/modeset`: it takes the lock of that module's parameters (kernel/params.c), which is held for
  as long as somebody reads or sets one of them, and not by a module that comes or goes.

What is never opened: `driver_override` and `sriov_numvfs` (they take the device lock), `uevent` (so does it in 6.10 and
in stable kernels up to now, Debian 12's among them; libudev opens it for nearly everything, so it is no way to look),
and what comes from the device itself, such as `config`, `vpd` and `current_link_speed` (a sleeping device is woken for
it). An unbind that hangs holds the device lock, and whoever wants it hangs too.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.booted import BootDisplay
from gpuswitch.host.linux.framebuffers import BOOT_DRIVERS, console_map, function_of
from gpuswitch.host.linux.installed import Installed
from gpuswitch.host.linux.nodes import Nodes
from gpuswitch.host.linux.reading import (
    contents,
    entries,
    first_line,
    folder_of_target,
    inode,
    link,
    target,
    there,
    written,
)
from gpuswitch.host.linux.regions import Groups
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import MODULES
from gpuswitch.model.facts import (
    VFIO_DRIVER,
    BootFramebuffer,
    Driver,
    HostFacts,
    Kind,
    Module,
    PciFunction,
)

# Vendor, device, both of the subsystem, then class, subclass and interface (do_pci_entry in scripts/mod/file2alias.c).
_MODALIAS = re.compile(r"pci:v([0-9A-F]{8})d([0-9A-F]{8})sv[0-9A-F]{8}sd[0-9A-F]{8}bc(..)sc(..)i(..)")
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_SLEEPING = {"suspended", "suspending"}
_ON = {"Y", "1"}
_GPU_KINDS = {Kind.DISPLAY, Kind.ACCELERATOR}
_NOT_TOLD = {errno.EIO, errno.EACCES, errno.EPERM}
"""The device has no power, or whoever asks is not root."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Where things lie; a test has them elsewhere.

    `modules`: the folders that may have the running kernel's modules, and `tools`: those that may have modprobe, joined
    by colons. NixOS has both below /run.
    """

    sysfs: str = "/sys"
    dev: str = "/dev"
    udev: str = "/run/udev"
    modules: str = "/run/booted-system/kernel-modules/lib/modules:/lib/modules"
    tools: str = "/usr/sbin:/sbin:/usr/bin:/bin:/run/current-system/sw/bin"
    iomem: str = "/proc/iomem"
    proc: str = "/proc"
    libvirt: str = "/run/libvirt/qemu"


@dataclass(frozen=True, slots=True)
class _Static:
    """What stays as it is while a device is on the bus."""

    inode: int
    address: PciAddress
    vendor: int
    device: int
    class_code: int
    modalias: str
    parent: PciAddress | None
    physical_function: PciAddress | None
    can_have_virtual_functions: bool


class Sysfs:
    """Looks at the host. Remembers what cannot change while a device is there."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._devices = f"{roots.sysfs}/bus/pci/devices"
        self._static: dict[str, _Static] = {}
        self._names: dict[str, tuple[int, str, str]] = {}
        self._installed = Installed(roots.modules)
        self._boot_display = BootDisplay(roots.sysfs)
        self._groups = Groups(roots.sysfs)
        self._nodes = Nodes(roots.dev, roots.udev)
        self._serials: dict[str, str] = {}
        self._known_modules: dict[str, tuple[int, str | None]] = {}
        self._known_slots: dict[str, tuple[int, str]] = {}
        cpuinfo = contents(f"{roots.proc}/cpuinfo", 16384).decode(errors="replace")
        self._processor = _processor(cpuinfo)
        self._hypervisor = _hypervisor(cpuinfo, first_line(f"{roots.sysfs}/hypervisor/type"))
        command_line = first_line(f"{roots.proc}/cmdline")
        self._console_map = console_map(command_line)
        self._barred = _barred(command_line)
        self._booted: frozenset[str] | None = None

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        """Observe, now. As `gpuswitch.host.port.Host` says."""
        try:
            return self._look(only)
        except OSError as error:
            number, what = error.errno or errno.EIO, error.filename or "the host"
            raise KernelError("look at", str(what), number, os.strerror(number)) from error

    def installed(self, module: str) -> bool:
        """As `gpuswitch.host.port.Host` says."""
        try:
            return self._installed.has(module)
        except OSError:
            return True

    def _look(self, only: Collection[PciAddress] | None) -> HostFacts:
        """A device that leaves while we look is left out, or is in it as it was just before."""
        if only is not None:
            names = [(str(address), inode(f"{self._devices}/{address}")) for address in sorted(only)]
            present = {name: inode for name, inode in names if inode is not None}
            if self._booted is None:
                self._look(None)
            return HostFacts(functions=self._functions(present, {}, {}), iommu=False, vfio_available=False)
        present = {name: inode for name, inode in entries(self._devices) if _ADDRESS.fullmatch(name)}
        self._forget_others(present)
        framebuffers = tuple(self._boot_framebuffers())
        self._booted = self._boot_display.among(self._displays(present), {str(each.function) for each in framebuffers})
        mediated = self._mediated_devices()
        # Drivers before functions: one that registers in between is asked for by name.
        # A folder that is made anew has another inode.
        registrations = dict(entries(f"{self._roots.sysfs}/bus/pci/drivers"))
        drivers = {name: self._module(name, inode) for name, inode in registrations.items()}
        functions = self._functions(present, drivers, mediated)
        direct_regions, without_iommu = self._groups.among(functions.values(), present)
        return HostFacts(
            functions=functions,
            iommu=any(True for _ in entries(f"{self._roots.sysfs}/kernel/iommu_groups")),
            processor=self._processor,
            vfio_available=VFIO_DRIVER in drivers or self._installed.vfio_pci(),
            pci_drivers=drivers,
            registrations=registrations,
            vfio_aliases=self._installed.vfio_aliases(),
            vfio_nodes=frozenset(self._vfio_nodes()),
            modules=self._modules(),
            boot_framebuffers=framebuffers,
            console_map=self._console_map,
            direct_regions=direct_regions,
            groups_without_iommu=without_iommu,
            hypervisor=self._hypervisor,
            barred=self._barred,
            slots=self._slots(),
            autoprobe=first_line(f"{self._roots.sysfs}/bus/pci/drivers_autoprobe") != "0",
            modules_on_disk=self._installed.on_disk(),
        )

    def _functions(
        self, present: Mapping[str, int], drivers: Mapping[str, str | None], mediated: Mapping[str, int]
    ) -> dict[PciAddress, PciFunction]:
        functions = {}
        for name in sorted(present):
            static = self._known(name, present[name])
            if static is not None:
                functions[static.address] = self._function(name, static, drivers, mediated.get(name, 0))
        return dict(sorted(functions.items()))

    def _displays(self, present: Mapping[str, int]) -> dict[str, int]:
        known = {name: self._known(name, inode) for name, inode in present.items()}
        return {n: s.inode for n, s in known.items() if s is not None and Kind.of(s.class_code) is Kind.DISPLAY}

    def _forget_others(self, present: Mapping[str, int]) -> None:
        """The link in /sys/bus/pci/devices gets a new inode each time it is made; so the inode tells a new device."""
        for name in [n for n, static in self._static.items() if present.get(n) != static.inode]:
            del self._static[name]
            self._names.pop(name, None)
            self._serials.pop(name, None)

    def _known(self, name: str, inode: int) -> _Static | None:
        """None: it is gone again."""
        static = self._static.get(name)
        if static is None or static.inode != inode:
            static = self._first_look(name, inode)
            if static is not None:
                self._static[name] = static
        return static

    def _first_look(self, name: str, inode: int) -> _Static | None:
        path = f"{self._devices}/{name}"
        modalias = first_line(f"{path}/modalias")
        match = _MODALIAS.fullmatch(modalias)
        above = folder_of_target(path)
        if match is None or not above:
            return None
        vendor, device, *class_code = match.groups()
        return _Static(
            inode=inode,
            address=PciAddress.parse(name),
            vendor=int(vendor, 16),
            device=int(device, 16),
            class_code=int("".join(class_code), 16),
            modalias=modalias,
            parent=_address(above),
            physical_function=_address(link(f"{path}/physfn")),
            can_have_virtual_functions=there(f"{path}/sriov_numvfs"),
        )

    def _function(self, name: str, static: _Static, drivers: Mapping[str, str | None], mediated: int) -> PciFunction:
        path = f"{self._devices}/{name}"
        kind = Kind.of(static.class_code)
        driver = link(f"{path}/driver")
        module = drivers[driver] if driver in drivers else self._module_now(driver)
        group = link(f"{path}/iommu_group")
        # The class is `vfio-dev`, so the driver core puts its devices into a folder of that name.
        vfio_device = driver != "" and there(f"{path}/vfio-dev")
        no_nodes = driver == "" or vfio_device
        nodes, pending = ((), False) if no_nodes else self._nodes.of(path, kind)
        maker, model = self._hardware_names(name)
        serial, serial_errno = self._serial(name) if kind in _GPU_KINDS else ("", 0)
        return PciFunction(
            address=static.address,
            vendor=static.vendor,
            device=static.device,
            class_code=static.class_code,
            maker=maker,
            model=model,
            modalias=static.modalias,
            serial=serial,
            serial_errno=serial_errno,
            driver=Driver(driver, module) if driver else None,
            iommu_group=int(group) if group else None,
            parent=static.parent,
            boot_display=name in (self._booted or ()),
            physical_function=static.physical_function,
            virtual_functions=_virtual_functions(path) if static.can_have_virtual_functions else 0,
            mediated_devices=mediated,
            nodes=nodes,
            nodes_pending=pending,
            asleep=first_line(f"{path}/power/runtime_status") in _SLEEPING,
            vfio_device=vfio_device,
        )

    def _serial(self, name: str) -> tuple[str, int]:
        """It stays as it is, once it was told; until then, with the errno of who asked."""
        if name not in self._serials:
            try:
                serial = first_line(f"{self._devices}/{name}/serial_number").lower()
            except OSError as error:
                if error.errno not in _NOT_TOLD:
                    raise
                return "", error.errno
            self._serials[name] = serial
        return self._serials[name], 0

    def _slots(self) -> dict[str, str]:
        """The address of each physical slot, by its name. One that is made anew has another inode."""
        folder = f"{self._roots.sysfs}/bus/pci/slots"
        known, self._known_slots = self._known_slots, {}
        for name, number in sorted(entries(folder)):
            found = known.get(name)
            if found is None or found[0] != number:
                found = number, first_line(f"{folder}/{name}/address")
            if found[1]:
                self._known_slots[name] = found
        return {name: address for name, (_, address) in self._known_slots.items()}

    def _module(self, driver: str, folder: int | None) -> str | None:
        """The module that brought a driver, whose folder has this inode. One that is built in has a folder too, but no
        `initstate`.
        """
        known = self._known_modules.get(driver)
        if known is not None and known[0] == folder:
            return known[1]
        name = link(f"{self._roots.sysfs}/bus/pci/drivers/{driver}/module")
        module = name if name and there(f"{self._roots.sysfs}/module/{name}/initstate") else None
        # The link comes last, when its devices are bound already (bus_add_driver in drivers/base/bus.c).
        if name and folder is not None:
            self._known_modules[driver] = folder, module
        return module

    def _module_now(self, driver: str) -> str | None:
        return self._module(driver, inode(f"{self._roots.sysfs}/bus/pci/drivers/{driver}")) if driver else None

    def _modules(self) -> dict[str, Module]:
        found = {}
        for name in sorted(MODULES):
            folder = f"{self._roots.sysfs}/module/{name}"
            if there(folder):
                references = first_line(f"{folder}/refcnt")
                found[name] = Module(
                    references=int(references) if references else None,
                    users=tuple(sorted(user for user, _ in entries(f"{folder}/holders"))),
                    version=first_line(f"{folder}/version"),
                    modeset=first_line(f"{folder}/parameters/modeset") in _ON,
                    built_in=not there(f"{folder}/initstate"),
                )
        return found

    def _boot_framebuffers(self) -> Iterator[BootFramebuffer]:
        """A driver's folder has a link for each device that it has, and one for its module."""
        for driver in BOOT_DRIVERS:
            folder = f"{self._roots.sysfs}/bus/platform/drivers/{driver}"
            for name, _ in entries(folder):
                if name == "module" or not target(f"{folder}/{name}"):
                    continue
                function = _address(function_of(f"{folder}/{name}", driver, self._roots.iomem))
                if function is not None:
                    yield BootFramebuffer(name, driver, function, self._nodes.of_display(f"{folder}/{name}"))

    def _hardware_names(self, name: str) -> tuple[str, str]:
        """Maker and model as udev found them in its hardware database.

        Read from udev's own file, since libudev's way to a device opens its `uevent`.
        """
        path = f"{self._roots.udev}/data/+pci:{name}"
        when = written(path)
        if when is None:
            return "", ""
        known = self._names.get(name)
        if known is None or known[0] != when:
            lines = contents(path, 1 << 16).decode(errors="replace").split("\n")
            found = dict(line[2:].partition("=")[::2] for line in lines if line.startswith("E:ID_"))
            known = when, found.get("ID_VENDOR_FROM_DATABASE", ""), found.get("ID_MODEL_FROM_DATABASE", "")
            self._names[name] = known
        return known[1:]

    def _mediated_devices(self) -> dict[str, int]:
        """How many mediated devices each function has, by address. They lie in the folder of the function."""
        counts: dict[str, int] = {}
        folder = f"{self._roots.sysfs}/bus/mdev/devices"
        for name, _ in entries(folder):
            parent = folder_of_target(f"{folder}/{name}")
            counts[parent] = counts.get(parent, 0) + 1
        return counts

    def _vfio_nodes(self) -> Iterator[str]:
        """Both classes come with vfio itself, that of groups first (vfio_init in drivers/vfio/vfio_main.c)."""
        classes = f"{self._roots.sysfs}/class"
        if there(f"{classes}/vfio") or not there(f"{classes}/vfio-dev"):
            yield "vfio"
        yield from (name for name, _ in entries(f"{self._roots.dev}/vfio") if name.isascii() and name.isdigit())


def _processor(cpuinfo: str) -> str:
    """Whose it is, by the first lines of /proc/cpuinfo (arch/x86/kernel/cpu/proc.c, arch/arm64/kernel/cpuinfo.c)."""
    marks = {"intel": "GenuineIntel", "amd": "AuthenticAMD", "arm": "CPU implementer"}
    return next((name for name, mark in marks.items() if mark in cpuinfo), "")


def _hypervisor(cpuinfo: str, kind: str) -> str:
    """What this kernel runs on (Documentation/ABI/stable/sysfs-hypervisor-xen; X86_FEATURE_HYPERVISOR)."""
    if kind == "xen":
        return kind
    return "machine" if re.search(r"^flags\b.*\bhypervisor\b", cpuinfo, re.MULTILINE) else ""


def _barred(command_line: str) -> frozenset[str]:
    """The modules that the kernel refuses, by its own option; the last one counts (core_param in kernel/module)."""
    values = [word.partition("=")[2] for word in command_line.split() if word.startswith("module_blacklist=")]
    return frozenset(filter(None, values[-1].split(","))) if values else frozenset()


def _virtual_functions(path: str) -> int:
    return sum(name.startswith("virtfn") for name, _ in entries(path))


def _address(text: str) -> PciAddress | None:
    return PciAddress.parse(text) if _ADDRESS.fullmatch(text) else None
