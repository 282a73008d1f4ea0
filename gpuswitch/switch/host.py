"""The port: what the heart asks of a host. `host/linux` and `host/simulated` implement it; one contract tests both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, HostFacts


@dataclass(frozen=True, slots=True)
class Pending:
    """A kernel operation that was sent and has not returned.

    `what` says it to a person ("unbind 0000:01:00.1 from snd_hda_intel"); `pid` is the process that sits in it, the
    worker or a modprobe that it runs (0 where there is none); `kernel_wait` is the kernel function it waits in, as
    /proc/PID/wchan shows it ("" unknown); `process_state` is field 3 of /proc/PID/stat, "D" for an uninterruptible
    wait.
    """

    what: str
    pid: int = 0
    process_state: str = ""
    kernel_wait: str = ""


class Kernel(Protocol):
    """The writes to one GPU, and the reads that take the device lock: each may block for ever.

    So each runs in the GPU's worker, one at a time. Cancelling the caller abandons the operation and never ends it:
    it stays `pending` until the kernel returns, and until then every further call raises `KernelError` with EBUSY at
    once. Callers bound each call with a deadline of their own.

    Every method raises `KernelError` with the kernel's own errno.
    """

    def prepare(self) -> None:
        """Get ready for calls that come soon: starts the worker where none runs. Does not wait for it."""

    async def capture(self, functions: Sequence[PciAddress]) -> Mapping[PciAddress, Captured]:
        """Driver, driver_override and power/control of each function, now."""

    async def candidates(self, function: PciAddress) -> tuple[str, ...]:
        """The modules whose alias table matches the function; without vfio-pci and without blacklisted ones."""

    async def load(self, module: str) -> None:
        """Load a module and what it needs; nothing to do where it is loaded or built in."""

    async def keep_awake(self, functions: Sequence[PciAddress]) -> None:
        """Set power/control to `on`; returns when each function is awake (the write resumes it synchronously)."""

    async def set_power_control(self, control: Mapping[PciAddress, str]) -> None:
        """Set power/control of each function to the value given, `auto` or `on`."""

    async def set_override(self, overrides: Mapping[PciAddress, str | None]) -> None:
        """Aim driver_override of each function at a driver; None clears it, by a newline."""

    async def unbind(self, function: PciAddress, driver: str) -> None:
        """Take the function from `driver`; returns when the kernel's write returned. ENODEV: it is not bound to it."""

    async def probe(self, function: PciAddress) -> None:
        """Write to drivers_probe. Success says nothing about what is bound now: look. EINVAL: the probe failed."""

    async def hold_group(self, group: int) -> None:
        """Open /dev/vfio/GROUP and keep it open; nothing to do where we have it. EBUSY: somebody else has it open."""

    async def release_group(self, group: int) -> None:
        """Close what `hold_group` opened; nothing to do where it is not open."""

    @property
    def pending(self) -> Pending | None:
        """The operation that the kernel still has, or None."""

    async def returned(self) -> None:
        """Wait until nothing is pending."""


class Host(Protocol):
    """The machine: what can be seen of it, and a `Kernel` for each GPU."""

    def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        """Observe, now, without taking a device lock or waking a device; does not block.

        With `only`, the facts hold these functions, without their mediated devices, and nothing else: what a step
        needs to know of its function, for a fraction of the cost.
        """

    def kernel(self, gpu: str) -> Kernel:
        """The kernel operations of one GPU, by its address; the same object each time."""

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` on the event loop whenever a look may show something new; returns the way to stop it."""

    async def close(self) -> None:
        """Let the idle workers go. Never waits for a worker that the kernel has."""
