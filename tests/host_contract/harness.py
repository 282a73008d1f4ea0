"""What a case of the contract works with, and how it is registered."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from gpuswitch.errors import KernelError
from gpuswitch.host.operation import ANY_OPERATION
from gpuswitch.host.port import OPERATIONS, Host, Kernel
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE, Driver, Kind, PciFunction
from gpuswitch.model.holders import HolderQuery, Scan, Unit

DEADLINE = 120.0
"""Seconds after which a case has failed: plenty, also in an emulated machine."""
_BETWEEN_LOOKS = 0.05

Case = Callable[["ContractHarness"], Awaitable[None]]
CASES: dict[str, Case] = {}
"""Every case, by name."""


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


class ExternalActivity(Protocol):
    """What others do to the host: processes, VMs, people with a card in their hand. One of each at a time.

    Where a process is started, its number is returned; `command` is what all of these are called.
    """

    command: str

    async def open(self, function: PciAddress) -> int:
        """A process opens a device node that the function's driver made: the sound card's control, the DRM card."""

    async def close(self, function: PciAddress) -> None:
        """It ends."""

    async def let_go(self, function: PciAddress) -> None:
        """It closes the node, and lives on."""

    async def map(self, function: PciAddress) -> int:
        """A process maps memory of the function through a device node, and closes the node; `close` ends it."""

    async def hide(self, function: PciAddress) -> None:
        """A process opens the node and sends the descriptor to nobody: no process has it. `close` ends that, too."""

    async def open_group(self, group: int) -> int:
        """A process opens /dev/vfio/GROUP."""

    async def close_group(self, group: int) -> None: ...

    async def start_vm(self, functions: Sequence[PciAddress]) -> None:
        """A process takes the group of these functions, owns its DMA, and opens them, as QEMU does.

        Raises:
            KernelError: the kernel's errno.
        """

    async def stop_vm(self) -> None: ...

    async def unplug(self, functions: Sequence[PciAddress]) -> None:
        """These functions, all of a slot, leave the bus."""

    async def replug(self) -> None:
        """What left comes back."""

    async def set_autoprobe(self, *, on: bool) -> None:
        """Somebody writes to `drivers_autoprobe` of the PCI bus."""

    async def add_unit(self, function: PciAddress | None = None, *, fails: bool = False) -> Unit:
        """Somebody installs a service, which is not active. Its process opens the node of `function`.

        `fails`: it cannot be started.
        """

    async def add_socket(self, unit: Unit) -> Unit:
        """Somebody installs the socket of a service, and it is active."""

    async def inhibitors(self, gpu: str) -> int:
        """How many keep the machine from sleeping for this GPU's sake."""

    async def end_inhibitors(self, gpu: str) -> None:
        """Somebody ends whatever keeps the machine from sleeping for this GPU's sake."""

    def next_run(self) -> Host:
        """The host as the next run of the service sees it; call it when this run's host is closed."""


@dataclass(frozen=True)
class ContractHarness:
    """A host with a GPU of two functions, `display` and `audio`, each on its host driver, alone in `group`.

    The display's driver is a DRM driver with a frame buffer, which is not the one that shows the consoles; audio's
    makes a sound card. Nobody has either open. vfio_pci is installed, and not loaded, and there is no nvidia-smi;
    systemd and logind run. `crowded` is a display function on a host driver, in one group with another function on a
    host driver. `lone` is a display function on a host driver, alone in its slot: it can be reset. `display` cannot
    without `audio`, which has no reset method.
    A case may leave the host in any state; each gets one of its own.
    """

    host: Host
    external: ExternalActivity
    display: PciAddress
    audio: PciAddress
    display_driver: Driver
    audio_driver: Driver
    group: int
    crowded: PciAddress
    lone: PciAddress

    @classmethod
    def of(
        cls, host: Host, external: ExternalActivity, gpu: PciAddress, crowded: PciAddress, lone: PciAddress
    ) -> ContractHarness:
        """The harness for the GPU at this address; fails where the host is not as promised."""
        facts = host.look()
        display = facts.functions[gpu]
        audio = next(f for a, f in facts.functions.items() if a.slot_name == gpu.slot_name and f.kind is Kind.AUDIO)
        assert display.driver is not None
        assert audio.driver is not None
        assert display.iommu_group is not None
        assert {f.address for f in facts.group(display.iommu_group)} == {gpu, audio.address}
        drivers = display.driver, audio.driver
        return cls(host, external, gpu, audio.address, *drivers, display.iommu_group, crowded, lone)

    @property
    def functions(self) -> tuple[PciAddress, PciAddress]:
        return self.display, self.audio

    @property
    def kernel(self) -> Kernel:
        return self.host.kernel(str(self.display))

    def another_kernel(self, name: str) -> Kernel:
        """One with a worker of its own: what it does is not kept back by what the GPU's own worker sits in."""
        return self.host.kernel(name)

    def look(self, function: PciAddress) -> PciFunction:
        return self.host.look().functions[function]

    def driver(self, function: PciAddress) -> str | None:
        return self.look(function).driver_name

    async def scan(self, *functions: PciAddress, nodes: Sequence[str] = (), modules: Sequence[str] = ()) -> Scan:
        return await self.host.processes.scan(HolderQuery(functions, tuple(nodes), modules=tuple(modules)))

    async def unbind(self, function: PciAddress) -> None:
        await self.kernel.unbind(function, str(self.driver(function)))

    async def to_vfio(self, *functions: PciAddress) -> None:
        """Move functions the way that is known to work."""
        await self.kernel.load(VFIO_MODULE)
        await self.kernel.set_override(dict.fromkeys(functions, VFIO_DRIVER))
        for function in functions:
            if self.driver(function) is not None:
                await self.unbind(function)
            await self.kernel.probe(function)
            assert self.driver(function) == VFIO_DRIVER

    async def until(self, met: Callable[[], bool]) -> None:
        """Wait until it is so. Not all that is waited for makes an event, so this looks again by itself too."""
        async with self.changes() as changed:
            while not met():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_BETWEEN_LOOKS):
                        await changed.wait()
                changed.clear()

    async def until_told(self, met: Callable[[], bool], changed: asyncio.Event) -> None:
        """Wait until it is so, and look only when an event says that something changed."""
        while not met():
            await changed.wait()
            changed.clear()

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set with each change that the host tells of."""
        changed = asyncio.Event()
        stop = self.host.watch(changed.set)
        try:
            yield changed
        finally:
            stop()


async def refused(operation: Awaitable[object], number: int) -> None:
    """The operation ends with this errno, and is declared to."""
    if (declared := OPERATIONS.get(getattr(operation, "__name__", ""))) is not None:
        known = {**ANY_OPERATION, **declared.raises}
        assert number in known, f"say in Kernel that {declared.name} raises {errno.errorcode[number]}"
    refusal = None
    try:
        await operation
    except KernelError as error:
        refusal = error
    assert refusal is not None, "the kernel did not refuse"
    assert str(refusal).startswith("cannot ")
    assert errno.errorcode.get(refusal.errno) == errno.errorcode[number], str(refusal)
