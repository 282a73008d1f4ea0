"""The port: what the heart asks of a host. `host/linux` and `host/simulated` implement it; one contract tests both."""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from signal import Signals
from typing import Annotated, NamedTuple, Protocol, get_type_hints

from gpuswitch.host.operation import Operations, Words, operation, operations_of
from gpuswitch.model.access import UserAccess
from gpuswitch.model.address import PciAddress
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.drivers import Candidate
from gpuswitch.model.facts import Consoles, Driver, HostFacts
from gpuswitch.model.hints import Attribute, OneOf
from gpuswitch.model.holders import Holder, HolderQuery, Process, Scan, Unit
from gpuswitch.model.owner import Owner


@dataclass(frozen=True, slots=True)
class Pending:
    """A kernel operation that was sent and has not returned.

    `what` says it to a person ("unbind 0000:01:00.1 from snd_hda_intel"); `pid` is the process that sits in it, the
    worker or a modprobe that it runs (0 where there is none); `kernel_wait` is the kernel function it waits in, as
    /proc/PID/wchan shows it ("" unknown); `process_state` is field 3 of /proc/PID/stat, "D" for an uninterruptible
    wait; `stack` are the kernel functions it is in, the innermost first, as /proc/PID/stack shows them (empty: not
    shown). `worker` is the worker process, which ends by itself once the kernel lets it; None where there is none.
    """

    what: str
    pid: int = 0
    process_state: str = ""
    kernel_wait: str = ""
    stack: tuple[str, ...] = ()
    worker: Process | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """What one function had before we touched it, and gets back: the baseline.

    `driver` None: it had no driver. The rest are attributes in sysfs; None: not set. `power_control` is described in
    Documentation/ABI/testing/sysfs-devices-power. A field with a default may be one that a function has not.
    """

    driver: Driver | None
    override: Annotated[str | None, Attribute("driver_override", at_boot="")]
    power_control: Annotated[str, OneOf("auto", "on"), Attribute("power/control", at_boot="on")]


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """What an attribute was `before` the first GPU came ("": nothing), and what is `needed` while one is away."""

    before: str
    needed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Settings of the host that several GPUs may want changed at once, as they were before the first of them came.

    Each field is a kind of setting: a tuple of the things that were changed, or, where it is to be known what each had,
    a mapping of things to that. What is changed is no part of a GPU, so it is given back also when the GPU has left.
    Who changes one, and the last who needs it so: `gpuswitch.switch.shared.settings`.

    `units` were active and were stopped. `attributes` are those of functions that no GPU has for itself, such as the
    bridge above it: `gpuswitch.switch.steps.attributes` changes them, and gives them back. `access` was given to users
    who had none of their own: `gpuswitch.switch.shared.access`; several GPUs have /dev/iommu in common.
    """

    units: tuple[Unit, ...] = ()
    attributes: Mapping[FunctionAttribute, AttributeChange] = field(default_factory=dict)
    access: tuple[UserAccess, ...] = ()


def _attributes() -> dict[str, Attribute]:
    hints = get_type_hints(Captured, include_extras=True)
    return {
        name: a for name, hint in hints.items() for a in getattr(hint, "__metadata__", ()) if isinstance(a, Attribute)
    }


ATTRIBUTES = _attributes()
"""What `Captured` keeps but for the driver, by the names of its fields, in order."""
MAY_LACK = frozenset(each.name for each in fields(Captured) if each.default is not MISSING)
"""Those that a function may not have."""


class Kernel(Operations):
    """The writes to one GPU, and the reads that take the device lock: each may block for ever.

    So each runs in the GPU's worker, one at a time. Cancelling the caller abandons the operation and never ends it:
    it stays `pending` until the kernel returns, and until then every further call raises `KernelError` with EBUSY at
    once. Callers bound each call with a deadline of their own.

    Each operation is declared here, and nowhere else (`gpuswitch.host.operation`): the hosts follow. What it raises
    is a `KernelError` with the kernel's own errno.
    """

    @operation("capture", reads=True)
    def capture(self, functions: Sequence[PciAddress]) -> Words[Mapping[PciAddress, Captured]]:
        """What each function has now: its driver, and each attribute of `Captured`."""
        return Words("read the settings of", _names(functions))

    @operation("module", reads=True)
    def candidates(self, function: PciAddress) -> Words[tuple[Candidate, ...]]:
        """The modules whose alias table matches the function; without vfio-pci and without blacklisted ones."""
        return Words("find the modules for", function)

    @operation("module", reads=True)
    def loadable(self, modules: Sequence[str], *, by_name: bool = False) -> Words[tuple[str, ...]]:  # noqa: ARG002 -- not in its words
        """Those of the modules that the system would load by itself: installed for this kernel, and not blacklisted.

        `by_name`: that `load` finds; a blacklist is no matter then.
        """
        return Words("find the modules", ", ".join(modules))

    @operation("module", raises={errno.ENOENT: "no such module is installed"})
    def load(self, module: str) -> Words[None]:
        """Load a module and what it needs; nothing to do where it is loaded or built in."""
        return Words("load", module)

    @operation("power", raises={errno.ENOENT: "it has no such attribute"})
    def keep_awake(self, functions: Sequence[PciAddress]) -> Words[None]:
        """Set power/control to `on`; returns when each function is awake (the write resumes it synchronously)."""
        return Words("keep awake", _names(functions))

    @operation("power", raises={errno.ENOENT: "it has no such attribute"}, writes="power/control")
    def set_power_control(self, control: Mapping[PciAddress, Annotated[str, OneOf("auto", "on")]]) -> Words[None]:
        """Set power/control of each function to the value given."""
        return Words("set power/control of", _names(control))

    @operation("override", raises={errno.ENOENT: "it has no such attribute"}, writes="driver_override")
    def set_override(self, overrides: Mapping[PciAddress, str | None]) -> Words[None]:
        """Aim driver_override of each function at a driver; None clears it, by a newline."""
        return Words("set driver_override of", _names(overrides))

    @operation("capture", reads=True)
    def attribute(self, function: PciAddress, path: str) -> Words[str | None]:
        """What the attribute at this path below the function's folder says, "" for nothing; None: it has no such one.

        One that can only be written, such as `remove`, is refused with EACCES, to root as well (kernfs_fop_open in
        fs/kernfs/file.c): so nothing is a setting that does something when it is written.
        """
        return Words(f"read {path} of", function)

    @operation("power", raises={errno.ENOENT: "it has no such attribute"})
    def set_attribute(self, function: PciAddress, path: str, value: str) -> Words[None]:
        """Write the value to the attribute at this path; "" clears it, by a newline. What it says then: read it."""
        return Words(f"set {path} of", function, f"{function} to {value!r}")

    @operation("unbind", raises={errno.ENODEV: "it is not bound to that driver"})
    def unbind(self, function: PciAddress, driver: str) -> Words[None]:
        """Take the function from `driver`; returns when the kernel's write returned."""
        return Words("unbind", function, f"{function} from {driver}")

    @operation("probe", raises={errno.EINVAL: "the driver's probe failed"})
    def probe(self, function: PciAddress, driver: str = "") -> Words[None]:
        """Write to drivers_probe. Success says nothing about what is bound now: look.

        `driver` is the one that is expected, for whoever reads of it; the kernel is not told. "": any.
        """
        return Words("bind", function, f"{function} to {driver}" if driver else "")

    @operation("group", raises={errno.EBUSY: "somebody else has it open", errno.ENOENT: "there is no such node"})
    def hold_group(self, group: int) -> Words[None]:
        """Open /dev/vfio/GROUP and keep it open; nothing to do where we have it."""
        return Words("open", f"/dev/vfio/{group}")

    @operation("group")
    def release_group(self, group: int) -> Words[None]:
        """Close what `hold_group` opened; nothing to do where it is not open."""
        return Words("close", f"/dev/vfio/{group}")

    @operation("module", raises={errno.EAGAIN: "it is in use; nothing was changed, and no driver left its device"})
    def unload(self, module: str) -> Words[None]:
        """Take one module out of the kernel, and no other; nothing to do where it is not loaded."""
        return Words("unload", module)

    @operation("announce")
    def announce(self, functions: Sequence[PciAddress], subsystem: str, action: str) -> Words[None]:
        """A synthetic uevent (`remove` or `add`) on each card that the functions have in `subsystem` (`sound`, `drm`).

        Nothing happens to the card; whoever follows udev believes it, and lets go of it or takes it up. Nothing to do
        where there is no such card (Documentation/ABI/testing/sysfs-uevent).
        """
        return Words(f"send {action!r} for the {subsystem} cards of", _names(functions))

    @operation("console", reads=True)
    def consoles(self) -> Words[Consoles]:
        """What the text consoles are shown on, now."""
        return Words("read the console map from", "the frame buffers")

    @operation(
        "console",
        raises={errno.ENOENT: "there is no such frame buffer", errno.ENODEV: "frame buffers show no text"},
    )
    def map_consoles(self, terminals: Sequence[int], frame_buffer: int) -> Words[None]:  # noqa: ARG002 -- not in its words
        """Show these virtual terminals on that frame buffer (ioctl FBIOPUT_CON2FBMAP, drivers/video/fbdev/core)."""
        return Words("show text consoles on", f"/dev/fb{frame_buffer}")

    @operation("console", raises={errno.ENOENT: "there is no such vtconsole"})
    def bind_console(self, vtconsole: str, *, bound: bool) -> Words[None]:
        """Write `bind` of /sys/class/vtconsole/VTCONSOLE; nothing to do where it is so."""
        return Words("bind" if bound else "unbind", vtconsole)

    @operation("console")
    def unbind_platform(self, device: str, driver: str) -> Words[None]:
        """Take a platform device (`efi-framebuffer.0`) from its driver; nothing to do where it is not bound to it."""
        return Words("unbind", device, f"{device} from {driver}")

    @operation("console")
    def bind_platform(self, device: str, driver: str) -> Words[None]:
        """Bind a platform device to a driver; nothing to do where it is bound to it."""
        return Words("bind", device, f"{device} to {driver}")

    @operation("module", reads=True)
    def persistence(self, function: PciAddress) -> Words[bool | None]:
        """Whether nvidia's persistence mode is on for this GPU; None where no nvidia-smi is there to ask."""
        return Words("read the persistence mode of", function)

    @operation("module", raises={errno.ENOENT: "there is no nvidia-smi"})
    def set_persistence(self, function: PciAddress, *, on: bool) -> Words[None]:
        """Turn nvidia's persistence mode on or off for this GPU."""
        return Words(f"turn {'on' if on else 'off'} the persistence mode of", function)

    @operation(
        "reset",
        raises={errno.ENOENT: "it has no reset method", errno.ENOTTY: "its method resets others too, and was not used"},
    )
    def reset(self, function: PciAddress) -> Words[None]:
        """Reset the function, and nothing beside it; its settings in sysfs stay."""
        return Words("reset", function)

    @operation("capture", reads=True)
    def lost(self, functions: Sequence[PciAddress]) -> Words[tuple[PciAddress, ...]]:
        """Those of them in which what the kernel had set up is gone, or that do not answer: on any driver, or none."""
        return Words("read the configuration space of", _names(functions))

    @operation("rescan")
    def remove(self, functions: Sequence[PciAddress]) -> Words[None]:
        """Take the functions off the PCI bus, in this order; nothing to do for one that is gone already.

        Their drivers let go of them first, which may wait as an unbind does; until then no other device of the machine
        can leave the bus or be found on it. What was set in sysfs is lost.
        """
        return Words("remove from the PCI bus", _names(functions))

    @operation("rescan", raises={errno.ENODEV: "there is no such bus any more"})
    def rescan(self, functions: Sequence[PciAddress]) -> Words[None]:
        """Look for the functions on the buses that they are, or were, on, and on no other; what is found is bound.

        That the kernel looked says nothing about what it found: look.
        """
        return Words("rescan the bus of", _names(functions))

    # What is no operation.

    @abstractmethod
    def prepare(self) -> None:
        """Get ready for calls that come soon: starts the worker where none runs. Does not wait for it."""

    @property
    @abstractmethod
    def worker(self) -> Process | None:
        """The process that does all this for us; None where none runs."""

    @abstractmethod
    def adopt(self, pending: Pending) -> bool:
        """Take over an operation that an earlier run of the service left in the kernel; False if it is over.

        From here on it is `pending`, as if it had been sent by us, until its worker has ended.
        """

    @property
    @abstractmethod
    def pending(self) -> Pending | None:
        """The operation that the kernel still has, or None."""

    @abstractmethod
    async def returned(self) -> None:
        """Wait until nothing is pending."""


OPERATIONS = operations_of(Kernel)
"""All that are declared, by name."""


class Processes(Protocol):
    """The processes of the machine: who has what open, and a word to them."""

    noticed: Callable[[HolderQuery, Scan], None]
    """Told what each look found. Does nothing until somebody sets it; must return at once and not raise."""

    async def scan(self, query: HolderQuery) -> Scan:
        """Who has it open, in containers too. Takes no device lock, but may block (a dead network mount).

        Not in a GPU's worker: a scan that never returns leaves no GPU wedged. Cancelling the caller abandons it.

        Raises:
            KernelError: nobody can tell; whatever was asked about counts as busy.
        """

    async def wait_for_change(self, holders: Sequence[Holder]) -> None:
        """Wait until one of them ends, or somebody closes a node that one of them has open.

        Raises:
            KernelError: no event would tell; look again by the clock.
        """

    def signal(self, process: Process, number: Signals) -> bool:
        """Send a signal to this process and no later one of its number (pidfd_open(2)); False: it is gone.

        Raises:
            KernelError: EPERM.
        """


class NodesOfVfio(NamedTuple):
    """What a virtual machine opens: `/dev/vfio/GROUP`, `/dev/vfio/devices/vfioN`, and `/dev/iommu` beside the latter.

    `pending`: some are not ready, since udev has yet to set their owner and mode, and would undo what is set before.
    """

    names: tuple[str, ...]
    pending: bool


class DeviceNodes(Protocol):
    """The nodes of vfio, and the users who may open them by an entry of their own (acl(5)). Nothing here blocks."""

    def of(self, functions: Collection[PciAddress]) -> NodesOfVfio:
        """Those of the functions that are on vfio, sorted.

        Raises:
            KernelError: nobody can tell.
        """

    def permissions(self, access: UserAccess) -> str | None:
        """What the user's own entry lets him do: `rw`, `r`, ...; None: there is none.

        Raises:
            KernelError: ENOENT, there is no such node.
        """

    def give(self, access: UserAccess) -> None:
        """Let the user read and write it, and change nothing for anybody else.

        Raises:
            KernelError: ENOENT, there is no such node; EOPNOTSUPP, this kernel has no such lists for /dev.
        """

    def take(self, access: UserAccess) -> None:
        """Drop the user's own entry; nothing to do where there is none, or no such node.

        Raises:
            KernelError: it may have that entry still.
        """


class StartJob(StrEnum):
    """A job of systemd after which a unit runs; the values are the verbs of systemctl(1)."""

    START = "start"
    """One that runs stays as it is."""
    RESTART = "restart"
    """One that runs is stopped first."""
    TRY_RESTART = "try-restart"
    """The same, and one that does not run stays so."""

    @property
    def operation(self) -> str:
        """In the sentence of an error."""
        return self.removeprefix("try-")

    @property
    def cancelled(self) -> bool:
        """Whether it is cancelled with its caller; half-way through a restart, the unit would stay stopped."""
        return self is StartJob.START


class Systemd(Protocol):
    """The managers of units and sessions: systemd, its user instances, logind.

    Every method raises `KernelError` with one sentence that names the unit or session and what the manager says of it;
    with ENOENT where there is no such unit, or no such manager. A cancelled caller's job is cancelled too.
    """

    async def active(self, units: Collection[Unit]) -> frozenset[Unit]:
        """Those that are active, activating, reloading, or queued to start."""

    async def missing(self, units: Collection[Unit]) -> frozenset[Unit]:
        """Those that there are not: `stop` would fail with ENOENT. None where there is no manager to ask."""

    async def canonical(self, unit: Unit) -> Unit:
        """By the name that its processes run under: display-manager.service is an alias. As it is, where none knows."""

    async def sockets(self, unit: Unit) -> tuple[Unit, ...]:
        """The active units that would start it again (TriggeredBy=: sockets, paths, timers)."""

    async def stop(self, unit: Unit) -> None:
        """Stop it; returns when its job is over and it is inactive (or failed)."""

    async def start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        """ResetFailedUnit, then the job; returns when that is over and the unit is active (or was to stay inactive).

        Of a cancelled caller, it is cancelled if it is `cancelled`.
        """

    async def queue_start(self, unit: Unit, job: StartJob = StartJob.START) -> None:
        """Have it started as `start` does, and return as soon as the job is queued: it outlives us."""

    async def sessions(self, uid: int) -> tuple[str, ...]:
        """The logind sessions of this user; none where there is no logind."""

    async def end_session(self, session: str) -> None:
        """TerminateSession; returns when logind has forgotten it."""

    async def stopping(self) -> bool:
        """Whether the whole system is going down (the manager's SystemState); False where there is no systemd."""

    async def booting(self) -> bool:
        """Whether the system is still starting (the manager's SystemState): its first jobs are not all done."""

    async def inhibit(self, gpu: str) -> None:
        """Keep the machine from sleeping for this GPU's sake, by a process that outlives the service.

        Nothing to do where one does so already, whoever started it. A machine without logind cannot be put to sleep by
        it, so there is nothing to do there either.
        """

    async def uninhibited(self, gpu: str) -> None:
        """Wait until nothing of ours keeps it awake for this GPU: whatever did may be ended by anybody.

        For ever, where there is no logind.
        """

    async def release(self, gpu: str) -> None:
        """Let it sleep again; nothing to do where nothing of ours keeps it awake for this GPU."""


class Libvirt(Protocol):
    """What libvirt has in its books, and whether its daemon is there to act on them. Nothing here blocks.

    A machine is in the books until libvirt has reset what it had, and given it back. It does not reset what is on vfio
    by then (virPCIDeviceReset in src/util/virpci.c).
    """

    def machines(self) -> Mapping[Owner, frozenset[PciAddress]]:
        """The machines in the books, with the functions that they have; empty where there is no libvirt.

        Raises:
            KernelError: nobody can tell.
        """

    def file_of(self, owner: Owner) -> str:
        """Where it stands that this machine is in the books."""

    def running(self) -> bool:
        """Whether the daemon is there that has the books.

        Raises:
            KernelError: nobody can tell.
        """

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` on the event loop when either may be otherwise than now; returns the way to stop it.

        Of the daemon that is there now: one that comes later has to be watched anew.

        Raises:
            KernelError: no event would tell; look again by the clock.
        """


class KernelLog(Protocol):
    """What the kernel says for people to read. Never evidence for us: it is told, and nothing follows from it."""

    def mark(self) -> float:
        """This moment, for `said`."""

    async def said(self, functions: Collection[PciAddress], names: Collection[str], mark: float) -> tuple[str, ...]:
        """The lines since then that are about these functions, or about no device and name one of these (drivers).

        Oldest first; none where nobody can tell.
        """


class Host(Protocol):
    """The machine: what can be seen of it, and a `Kernel` for each GPU."""

    processes: Processes
    device_nodes: DeviceNodes
    systemd: Systemd
    libvirt: Libvirt
    kernel_log: KernelLog

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        """Observe, now, without taking a device lock or waking a device; does not block.

        A device that leaves meanwhile is left out, or seen as it was just before.

        With `only`, the facts hold these functions, without their mediated devices, and nothing else: what a step
        needs to know of its function, for a fraction of the cost.

        Raises:
            KernelError: it could not see everything (no descriptor is left, say), so nothing may follow from it.
        """

    def installed(self, module: str) -> bool:
        """Whether a module that the kernel calls so has a file for the running kernel, or is in it.

        True where nobody can tell. What modprobe would do with the name is more: `Kernel.loadable`.
        """

    def kernel(self, gpu: str) -> Kernel:
        """The kernel operations of one GPU, by its address; the same object each time."""

    def reader(self, gpu: str) -> Kernel:
        """For questions of anybody, which change nothing: by a worker of its own, the same object each time.

        A read that never returns leaves the GPU as it is, and whoever asks next is refused.
        """

    def boottime(self) -> float:
        """Seconds since the machine was booted, with those that it slept; nobody can set this clock.

        clock_gettime(2), CLOCK_BOOTTIME: the same for every run of the service on this kernel.
        """

    async def until(self, boottime: float) -> None:
        """Until that moment of `boottime`; where the machine sleeps then, until it wakes.

        Raises:
            KernelError: there is no timer to be had (no descriptor is left, say).
        """

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` on the event loop whenever a look may show something new; returns the way to stop it."""

    async def close(self) -> None:
        """Let the idle workers go. Never waits for a worker that the kernel has."""


def _names(functions: Mapping[PciAddress, object] | Sequence[PciAddress]) -> str:
    return ", ".join(str(function) for function in functions)
