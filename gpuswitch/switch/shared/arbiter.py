"""The arbiter: what several GPUs share, serialised and counted.

Settings that more than one switch needs changed, units above all, consoles that more than one GPU may show, and host
drivers whose modules come and go with the last of their GPUs.
"""

from __future__ import annotations

import asyncio
import itertools
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
        self._stopped_for: set[tuple[PciAddress, Unit]] = set()
        self._returning: set[PciAddress] = set()
        self._order = itertools.count()
        self._arrived: dict[PciAddress, int] = {}
        self._started: dict[Unit, int] = {}
        """When each unit's last start began, in the order of these and of arrivals."""
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
        self._stopped_for.add((gpu, unit))
        await self.settings.change(gpu, _stopped(unit), lambda: self._systemd.stop(unit))

    async def start(self, gpu: PciAddress, unit: Unit, *, job: StartJob = StartJob.START, wait: bool = True) -> None:
        """This GPU does not need it stopped any more: start it, unless another one does, or the system goes down; or it
        was started since this GPU has arrived, and is only to find that one.

        Without `wait`, its start is queued: while the service is stopped, systemd begins no job of a unit that is to
        come after it, and to wait for one would be to wait for each other (job_compare in systemd's job.c).

        Raises:
            KernelError: what its manager says.
        """

        async def start() -> None:
            if job is not StartJob.START and gpu in self._arrived and self._started.get(unit, -1) > self._arrived[gpu]:
                return
            if await self.system_stopping():
                _log.info("%s stays stopped: the system is going down", unit, extra=told(GPU=gpu))
                return
            number = next(self._order)
            await (self._systemd.start if wait else self._systemd.queue_start)(unit, job)
            self._started[unit] = number

        self._stopped_for.discard((gpu, unit))
        await self.settings.restore(gpu, _stopped(unit), start, partial(self._needs_stopped, unit))

    async def restart(self, gpu: PciAddress, unit: Unit, *, wait: bool = True) -> None:
        """This GPU is home, which the unit finds out when it starts: as `start`; one that somebody else has stopped
        stays so.
        """
        job = StartJob.RESTART if self.is_to_be_started(unit) else StartJob.TRY_RESTART
        await self.start(gpu, unit, job=job, wait=wait)

    def returns(self, gpu: PciAddress) -> None:
        """Its host drivers may take it from here on; until it arrives or rests, that may be taken back, and whoever has
        opened it by then is in the way.
        """
        self._returning.add(gpu)

    async def arrive(self, gpu: PciAddress) -> None:
        """This GPU is where it was to be, and nothing takes that back: wait until that is so of all others that return.
        Whoever is started then has them all.
        """
        self._returning.discard(gpu)
        self._arrived[gpu] = next(self._order)
        self._moves_on()
        while self._returning.difference(self.stuck):
            await self._ended.wait()

    def rests(self, gpu: PciAddress) -> None:
        """Nothing is done to this GPU any more."""
        self._stopped_for = {each for each in self._stopped_for if each[0] != gpu}
        self._returning.discard(gpu)
        self._arrived.pop(gpu, None)
        self._moves_on()

    def _needs_stopped(self, unit: Unit, gpu: PciAddress) -> bool:
        """Whether this GPU, which had it stopped, needs that still: a unit of the driver's is stopped only while a
        switch needs it so, or while the kernel is in the GPU, and starts with the first one that is home.
        """
        served = unit in self._restore_states.get(gpu, NOTHING_TO_RESTORE).restarted
        return not served or (gpu, unit) in self._stopped_for or gpu in self.stuck

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
        self._moves_on()

    def _moves_on(self) -> None:
        """Whoever waits for others looks again."""
        self._ended.set()
        self._ended.clear()

    def moving(self, driver: str) -> tuple[PciAddress, ...]:
        """The GPUs of this driver that are being moved."""
        return tuple(sorted(self._moving[driver]))


def _stopped(unit: Unit) -> SharedSetting:
    return SharedSetting("units", unit)
