"""The arbiter: what several GPUs share, serialised and counted.

Settings that more than one switch needs changed, units above all, consoles that more than one GPU may show, and host
drivers whose modules come and go with the last of their GPUs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial

from gpuswitch.errors import KernelError
from gpuswitch.host.port import StartJob, Systemd
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Consoles
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Unit
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState, SharedSetting
from gpuswitch.switch.shared.awake import Awake
from gpuswitch.switch.shared.settings import SharedSettings

_log = logging.getLogger(__name__)
_MANAGER_SECONDS = 5.0


class Arbiter:
    """One for all GPUs."""

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd
        self.awake = Awake(systemd)
        self._moving: defaultdict[str, dict[PciAddress, frozenset[PciAddress]]] = defaultdict(dict)
        self._groups: dict[PciAddress, frozenset[int]] = {}
        self._restore_states: dict[PciAddress, RestoreState] = {}
        self.settings = SharedSettings(self._restore_states)
        self.consoles = asyncio.Lock()
        """Held from a step's look at the consoles until what follows from it is done, or its time is over."""
        self._ended = asyncio.Event()
        self._under_way: set[PciAddress] = set()
        self.stuck: dict[PciAddress, str] = {}
        """The drivers that the kernel is in, and does not return from, by the GPU whose it was."""

    def claim(self, gpu: PciAddress, restore_state: RestoreState) -> None:
        """Take over what an earlier run of the service left to restore: shared settings were changed for this GPU."""
        self.set_restore_state(gpu, restore_state)
        self.settings.claim(gpu)

    def set_restore_state(self, gpu: PciAddress, restore_state: RestoreState) -> None:
        """What this GPU has to restore from here on; what is not in it, the GPU does not need changed any more."""
        self._restore_states[gpu] = restore_state
        self.settings.forget(gpu)

    def begin(self, gpu: PciAddress) -> None:
        """Something is done to this GPU from here on, until `end`: also while the kernel does not return from it.

        Turns tell less: there are some for what a switch may unload only, and somebody may have one who is refused.
        """
        self._under_way.add(gpu)

    def end(self, gpu: PciAddress) -> None:
        """Nothing is done to this GPU any more."""
        self._under_way.discard(gpu)

    # Units ----------------------------------------------------------------------------------------------------------

    def is_to_be_started(self, unit: Unit) -> bool:
        """Whether it is to run again when some GPU is home: it was active before it was stopped for that one's sake.

        A unit that a GPU only needs stopped, and that was so, is none of these.
        """
        return self.settings.recorded(_stopped(unit)) is not None

    async def stop(self, gpu: PciAddress, unit: Unit) -> None:
        """Stop it for this GPU, as `SharedSettings.change` does.

        Raises:
            KernelError: what its manager says.
        """
        await self.settings.change(gpu, _stopped(unit), lambda: self._systemd.stop(unit))

    async def start(self, gpu: PciAddress, unit: Unit, *, job: StartJob = StartJob.START, wait: bool = True) -> None:
        """This GPU does not need it stopped any more: start it, unless another one does, or the system goes down.

        Without `wait`, its start is queued: while the service is stopped, systemd begins no job of a unit that is to
        come after it, and to wait for one would be to wait for each other (job_compare in systemd's job.c).

        Raises:
            KernelError: what its manager says.
        """

        async def start() -> None:
            if await self.system_stopping():
                _log.info("%s stays stopped: the system is going down", unit, extra=told(GPU=gpu))
            else:
                await (self._systemd.start if wait else self._systemd.queue_start)(unit, job)

        await self.settings.restore(gpu, _stopped(unit), start, partial(self._needs_stopped, unit))

    async def restart(self, gpu: PciAddress, unit: Unit, *, wait: bool = True) -> None:
        """This GPU is home, which the unit finds out when it starts: as `start`; one that somebody else has stopped
        stays so.
        """
        job = StartJob.RESTART if self.is_to_be_started(unit) else StartJob.TRY_RESTART
        await self.start(gpu, unit, job=job, wait=wait)

    def _needs_stopped(self, unit: Unit, gpu: PciAddress) -> bool:
        """Whether this GPU, which had it stopped, needs that still: a unit of the driver's is stopped only while one of
        its GPUs is moved, and starts with the first one that is home.
        """
        served = unit in self._restore_states.get(gpu, NOTHING_TO_RESTORE).restarted
        return not served or gpu in self._under_way

    async def system_stopping(self) -> bool:
        """Whether the whole system goes down. A manager that does not say so in time does other things."""
        try:
            async with asyncio.timeout(_MANAGER_SECONDS):
                return await self._systemd.stopping()
        except (KernelError, TimeoutError):
            return False

    # Consoles -------------------------------------------------------------------------------------------------------

    def functions_away_from_host(self, *, besides: PciAddress) -> frozenset[PciAddress]:
        """The functions of other GPUs that are away from home, or about to leave: they show nothing for long."""
        return frozenset(
            function
            for gpu, restore_state in self._restore_states.items()
            if gpu != besides
            for function in restore_state.functions
        )

    def terminals_of_others(self, gpu: PciAddress) -> frozenset[int]:
        """The virtual terminals that other GPUs get back: whoever shows them now does so only until then."""
        return frozenset(
            terminal
            for other, restore_state in self._restore_states.items()
            if other != gpu
            for terminal in restore_state.terminals
        )

    def terminals_at_home(self, consoles: Consoles) -> frozenset[int]:
        """The virtual terminals in a restore state that their GPU shows again already; the others follow."""
        return frozenset(
            t
            for restore_state in self._restore_states.values()
            for t in consoles.of(restore_state.functions)
            if t in restore_state.terminals
        )

    def terminals_of_absent_gpus(self, functions: Collection[PciAddress], consoles: Consoles) -> frozenset[int]:
        """Those of these functions that another GPU's new frame buffer was drawn over, and that it will give back."""
        return frozenset(
            terminal
            for restore_state in self._restore_states.values()
            for terminal, whose in restore_state.shown_by_others
            if whose in functions and terminal in consoles.of(restore_state.functions)
        )

    def unbound(self) -> tuple[str, ...]:
        """The vtconsoles that were unbound for some GPU's sake."""
        return tuple(
            sorted(
                {vtconsole for restore_state in self._restore_states.values() for vtconsole in restore_state.vtconsoles}
            )
        )

    # Drivers --------------------------------------------------------------------------------------------------------

    async def take_turn(self, gpu: Gpu, driver: str, staying: Callable[[], Awaitable[Collection[PciAddress]]]) -> None:
        """Move a GPU of this driver from here on; who is the driver's last one cannot change meanwhile.

        At once, where some device of the driver is moved by nobody: then nobody is the last. Else when nobody else
        moves one any more. `staying` looks which functions have the driver now, this GPU's left out.
        """
        moving = self._moving[driver]
        while moving:
            there = set(await staying())
            # Whoever has ended his turn during that look has told of it already.
            if not moving or there.difference(*moving.values()):
                break
            await self._ended.wait()
        moving[gpu.address] = frozenset(gpu.functions)

    async def take_groups(self, gpu: Gpu, groups: Iterable[int]) -> None:
        """Move a GPU of these IOMMU groups from here on, when nobody else moves one of them any more.

        The way home holds its groups, which one alone can do. Taken before the turn at a driver, and all at once, so
        that nobody waits in a circle.
        """
        wanted = frozenset(groups)
        while self.in_groups(wanted, besides=gpu.address):
            await self._ended.wait()
        self._groups[gpu.address] = wanted

    def in_groups(self, groups: Iterable[int], *, besides: PciAddress) -> tuple[PciAddress, ...]:
        """The other GPUs of these IOMMU groups that are being moved."""
        wanted = frozenset(groups)
        return tuple(sorted(a for a, theirs in self._groups.items() if a != besides and wanted & theirs))

    def end_turn(self, gpu: PciAddress) -> None:
        """This GPU is not moved any more."""
        self._groups.pop(gpu, None)
        for moving in self._moving.values():
            moving.pop(gpu, None)
        self._ended.set()
        self._ended.clear()

    def moving(self, driver: str) -> tuple[PciAddress, ...]:
        """The GPUs of this driver that are being moved."""
        return tuple(sorted(self._moving[driver]))


def _stopped(unit: Unit) -> SharedSetting:
    return SharedSetting("units", unit)
