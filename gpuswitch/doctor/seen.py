"""What was seen of a machine: frozen, and all that checks know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gpuswitch.config.settings import Config
from gpuswitch.doctor.findings import Unseen
from gpuswitch.fleet.misfit import Misfit
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts, Kind, PciFunction
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning.guards import Blocker


@dataclass(frozen=True, slots=True)
class System:
    """The distribution, how it boots, and what the kernel was told.

    `family`: `debian`, `ubuntu`, `proxmox`, `fedora`, `ostree` (images of Fedora), `arch`, `suse`, `nixos`, or ""
    (os-release, ID and ID_LIKE). `loader`: `grub`, `grubby`, `rpm-ostree`, `systemd-boot`, `kernelstub`,
    `proxmox-boot-tool`, `nixos`, or "". `initramfs`: `initramfs-tools`, `dracut`, `mkinitcpio`, `nixos`, or "".
    `kernel_cmdline`: /etc/kernel/cmdline is there. `update_initramfs`: Debian's command of that name is there, which
    has either of the first two make the initrd. `unified`: the firmware has started a unified kernel image.
    `grub_files`: what grub-mkconfig reads, in its order.
    `tables`: those of the firmware (ACPI), None where it has none to show. `secure_boot`: None where nobody says.
    `lockdown`: `none`, `integrity`, `confidentiality`, or "" (not in this kernel).
    """

    name: str = ""
    family: str = ""
    loader: str = ""
    initramfs: str = ""
    kernel: str = ""
    command_line: tuple[str, ...] = ()
    kernel_cmdline: bool = False
    update_initramfs: bool = False
    unified: bool = False
    grub_files: tuple[str, ...] = ("/etc/default/grub",)
    tables: frozenset[str] | None = None
    secure_boot: bool | None = None
    lockdown: str = ""
    selinux_enforcing: bool = False
    selinux_hooks_unconfined: bool | None = None
    apparmor: bool = False
    """AppArmor is in the kernel, and on."""

    def option(self, name: str) -> str | None:
        """The last value that the kernel's command line gives it, "" without one; None where it is not there."""
        found = self.options(name)
        return found[-1] if found else None

    def options(self, *names: str) -> tuple[str, ...]:
        """All values that the kernel's command line gives to options of these names, in order."""
        return tuple(word.partition("=")[2] for word in self.command_line if word.partition("=")[0] in names)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of systemd as `systemctl show` has it. `id`: its real name; `changed`: when its state did."""

    id: str
    found: bool = False
    active: bool = False
    enabled: bool = False
    changed: float = 0.0


@dataclass(frozen=True, slots=True)
class Hook:
    """A file that libvirt runs. `changed`: when it, or its mode, was last changed; `wants`: what ours has to read, ""
    for one that is not ours.
    """

    path: str
    executable: bool = True
    changed: float = 0.0
    wants: str = ""
    wanted_there: bool = True


@dataclass(frozen=True, slots=True)
class Libvirt:
    """`version`: by the name of its library, None where it is not installed."""

    version: tuple[int, int, int] | None = None
    own: Hook | None = None
    others: tuple[Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A line of somebody's configuration, without its comment, and the file. `goes_on`: in the next one there."""

    file: str
    words: tuple[str, ...]
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class ProxmoxMachine:
    """A virtual machine of Proxmox VE: its number, its name with that, and the places of the devices that it gets.

    A place is a function or a slot, with the domain; of a mapping, all that it may get.

    `hookscript`: a volume, "" none. `script`: what that is: `ours`, or one that runs ours; `outdated`: of another
    version, or not to be run; `foreign`; "" none. `fault`: why its devices are not known.
    """

    vmid: str
    name: str
    places: tuple[str, ...] = ()
    hookscript: str = ""
    script: str = ""
    fault: str = ""

    def gets(self, functions: Iterable[object]) -> bool:
        """Whether one of these is at one of its places."""
        return any(
            str(each) == place or str(each).startswith(f"{place}.") for each in functions for place in self.places
        )


@dataclass(frozen=True, slots=True)
class IncusDevice:
    """A device of an instance of Incus, or of a profile that none uses: `owner`, of `kind` `virtual-machine`,
    `container` or `profile`.

    `type`: `gpu` (Incus moves the card by itself) or `pci` (one function). `function`: with the domain, "" any that is
    of these `ids`, vendor and product, of which "" is any.
    """

    owner: str
    kind: str
    name: str
    type: str
    function: str = ""
    ids: tuple[str, str] = ("", "")

    def gets(self, functions: Iterable[PciFunction]) -> bool:
        """Whether one of these is what it is given."""
        if self.function:
            return any(str(each.address) == self.function for each in functions)
        return self.type == "gpu" and any(
            each.kind is Kind.DISPLAY
            and self.ids[0] in {"", f"{each.vendor:04x}"}
            and self.ids[1] in {"", f"{each.device:04x}"}
            for each in functions
        )


@dataclass(frozen=True, slots=True)
class OtherTools:
    """`driverctl`: functions that it has an override for. `moving`: scripts of libvirt's hooks that move devices.

    `proxmox`: its machines.
    """

    driverctl: tuple[str, ...] = ()
    modprobe: tuple[Line, ...] = ()
    moving: tuple[str, ...] = ()
    proxmox: tuple[ProxmoxMachine, ...] = ()


@dataclass(frozen=True, slots=True)
class EarlyFunction:
    """A function that the initrd gives to vfio-pci: its place below /sys/devices, and what it was, `10de:2484`.

    `found`: what is there now, "" for nothing.
    """

    place: str
    ids: str
    found: str

    @property
    def address(self) -> str:
        return self.place.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Early:
    """What `gpuswitchctl setup boot` has written. `script`: the file that is run in the initrd; `written`: when, in
    seconds since the epoch.

    `initrd`: that of the running kernel, "" where nobody knows it; `made`: when. `pending`: the initrd was to be made
    anew after files had changed, and that has not ended well.
    """

    script: str = ""
    functions: tuple[EarlyFunction, ...] = ()
    written: float = 0.0
    initrd: str = ""
    made: float = 0.0
    pending: bool = False


@dataclass(frozen=True, slots=True)
class Prometheus:
    """`there`: it has a configuration on this machine; `scrapes`: with a job of our name; `alerts`: with our alerts."""

    there: bool = False
    scrapes: bool = False
    alerts: bool = False


@dataclass(frozen=True, slots=True)
class Installation:
    """Which files of ours are where the bus and polkit look for them. `packaged`: a package has brought them."""

    packaged: bool = False
    bus_policy: bool = False
    actions: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What the service says of one GPU. `remedies`: what may help, by kind, the least rough first."""

    state: str
    reason: str = ""
    owner: str = ""
    stays_out: bool = False
    holders: tuple[Holder, ...] | None = None
    remedies: Mapping[str, Sentence] = field(default_factory=dict)

    @property
    def at(self) -> State:
        """Where it is."""
        return next((state for state in State if state.value == self.state), State.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Service:
    """What the service says of itself; not `running`, `why` it says nothing, as far as that is known.

    `settings` are the keys in force with their values, `by_variables` those that its environment sets. `gpus` are by
    address.
    """

    running: bool = False
    why: str = ""
    version: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    by_variables: frozenset[str] = frozenset()
    gpus: Mapping[str, Told] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Configuration:
    """The configuration as the files have it; where they have `faults`, the one without any files."""

    config: Config = field(default_factory=Config)
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Patient:
    """One GPU that is judged. `blockers`: what would refuse its switch to vfio, as far as facts tell.

    `counts`: what refuses a switch is a problem. Else a warning: nobody has asked for this GPU. `memory`: its largest
    range, in bytes. `holders`: None where nobody could tell.
    """

    gpu: Gpu
    state: State
    counts: bool
    blockers: tuple[Blocker, ...] = ()
    memory: int = 0
    holders: tuple[Holder, ...] | None = None

    @property
    def address(self) -> PciAddress:
        return self.gpu.address


@dataclass(frozen=True, slots=True)
class Seen:
    """All of it. `facts`: None where the host could not be looked at. `units`: by the names that were asked for, None
    where systemd could not be asked. `gpus` are all that there are, `patients` those that are judged.
    """

    system: System = field(default_factory=System)
    facts: HostFacts | None = None
    gpus: tuple[Gpu, ...] = ()
    patients: tuple[Patient, ...] = ()
    units: Mapping[str, Unit] | None = None
    installation: Installation = field(default_factory=Installation)
    libvirt: Libvirt = field(default_factory=Libvirt)
    tools: OtherTools = field(default_factory=OtherTools)
    incus: tuple[IncusDevice, ...] = ()
    early: Early = field(default_factory=Early)
    prometheus: Prometheus = field(default_factory=Prometheus)
    service: Service = field(default_factory=Service)
    configuration: Configuration = field(default_factory=Configuration)
    config: Config = field(default_factory=Config)
    """With each table under the address of its GPU."""
    misfits: tuple[Misfit, ...] = ()
    missing_drivers: tuple[str, ...] = ()
    vendor_reset: bool = False
    """The module of that name is in the kernel."""
    unseen: tuple[Unseen, ...] = ()
    as_root: bool = False

    def unit(self, name: str) -> Unit:
        """The unit of that name; one that is not there where systemd could not be asked."""
        return (self.units or {}).get(name, Unit(name))
