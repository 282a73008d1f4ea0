"""What a GPU may have to wait for: its turn at what it shares with others, and a kernel that does not return."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from gpuswitch.config import Config
from gpuswitch.errors import InProgress, KernelError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Driver, HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.arbiter import Arbiter
from gpuswitch.switch.awake import Why
from gpuswitch.switch.engine import Engine, StepEvent, StuckError
from gpuswitch.switch.host import Host, Pending
from gpuswitch.switch.journal import Entry, Journal
from gpuswitch.switch.looking import seen
from gpuswitch.switch.needs import moves_in_turns
from gpuswitch.switch.pause import Pause
from gpuswitch.switch.record import Result, Switch
from gpuswitch.switch.standing import Standing

_log = logging.getLogger(__name__)


class Waiting(Standing, ABC):
    """A GPU that is at rest, at work, or waits. At work, `patience` seconds without `progress` are a fault.

    `rested` is called whenever a switch is over: looks taken meanwhile went unheeded.
    """

    def __init__(
        self,
        gpu: Gpu,
        facts: HostFacts,
        *,
        host: Host,
        config: Config,
        journal: Journal,
        arbiter: Arbiter,
        rested: Callable[[], None],
    ) -> None:
        super().__init__(gpu, facts, host=host, config=config, journal=journal, arbiter=arbiter, changed=self._tell)
        self.patience = 0.0
        self._rested = rested
        self._retired = ""
        """Why nothing new begins here."""
        self._engine: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._resting = asyncio.Event()
        self._resting.set()
        self._unwedged = asyncio.Event()
        self._unwedged.set()
        self._in_doubt: Pending | None = None
        """What an earlier run of the service had sent, while nobody can tell whether it is over."""

    async def unwedged(self) -> None:
        """Until it is not wedged."""
        await self._unwedged.wait()

    async def rest(self) -> None:
        """Until no switch is under way, or it is wedged."""
        await self._resting.wait()

    def _rest(self) -> None:
        self._engine = self._task = None
        self._arbiter.end_turn(self.gpu.address)
        if self.state is not State.WEDGED:
            # The service may stop, and the kernel still has it.
            self._arbiter.awake.need(self.gpu.address, Why.SWITCH, needed=False)
        self._resting.set()

    def _be_patient(self) -> None:
        self.progress = asyncio.get_running_loop().time()
        self.patience = 2 * max(self._deadlines.values())

    @property
    def _deadlines(self) -> dict[str, float]:
        return self.config.deadlines.model_dump()

    # Turns ----------------------------------------------------------------------------------------------------------

    async def _take_turn(self, deadline: float | None) -> None:
        """Wait for the others that are being moved: those in its IOMMU groups, then those on its driver.

        Raises:
            InProgress: they still are, after this many seconds.
        """
        groups = self.gpu.groups(self.facts)
        try:
            async with asyncio.timeout(deadline):
                await self._arbiter.take_groups(self.gpu, groups)
        except TimeoutError:
            if others := self._arbiter.in_groups(groups, besides=self.gpu.address):
                names = ", ".join(map(str, others))
                text = f"{self.gpu.address} cannot be switched while {names} is: they share an IOMMU group"
                raise InProgress(text) from None
            # At that very moment it was over.
            await self._arbiter.take_groups(self.gpu, groups)
        try:
            await self._take_turn_at_driver(deadline)
        except BaseException:
            self._arbiter.end_turn(self.gpu.address)
            raise

    async def _take_turn_at_driver(self, deadline: float | None) -> None:
        """Where this switch may unload modules that other GPUs use: who is the last one is not to change meanwhile."""
        driver = self.host_driver
        if driver is None or not moves_in_turns(driver, self._rules.module_policy):
            return

        async def staying() -> set[PciAddress]:
            facts = await seen(self._host)
            own = Driver(driver, facts.pci_drivers.get(driver))
            others = {a: f.driver for a, f in facts.functions.items() if a not in self.gpu.functions}
            return {a for a, other in others.items() if other is not None and own.comes_with(other)}

        try:
            async with asyncio.timeout(deadline):
                await self._arbiter.take_turn(self.gpu, driver, staying)
        except TimeoutError:
            others = ", ".join(map(str, self._arbiter.moving(driver)))
            raise InProgress(f"{self.gpu.address} cannot be switched while {others} is: both are on {driver}") from None

    # A kernel that does not return ------------------------------------------------------------------------------------

    async def _outlasted(self, stuck: StuckError) -> None:
        """Say that it is wedged, and go on if ever the kernel returns."""
        self._wedge(stuck)
        await self._returned()

    def _wedge(self, stuck: StuckError) -> None:
        """The kernel has not returned: say so, and write nothing more."""
        self._say_stuck(stuck, self._engine.numbers if self._engine else ())
        if self.switch is not None and self.switch.result is None:
            self._end(self.switch, Result.WEDGED, str(stuck))
        self._arbiter.awake.need(self.gpu.address, Why.SWITCH, needed=True)
        # The others of its driver need not wait for a turn, but nobody may unload what the kernel is in.
        self._arbiter.stuck[self.gpu.address] = self.host_driver or ""
        self._arbiter.end_turn(self.gpu.address)
        self._unwedged.clear()
        self._resting.set()
        self._tell()

    @property
    def _pending(self) -> Pending | None:
        return self._kernel.pending

    def _left_in_the_kernel(self, entry: Entry) -> Pending | None:
        """What an earlier run of the service had sent, and the kernel still has or may have."""
        if (pending := self._pending) is not None:
            return pending
        left, unfinished = entry.stuck, entry.unfinished
        if left is None and unfinished is not None and unfinished.worker is not None:
            left = Pending(unfinished.title, worker=unfinished.worker)
        if left is None:
            return None
        try:
            return (self._pending or left) if self._kernel.adopt(left) else None
        except KernelError as error:
            _log.error("%s: cannot tell whether '%s' is over: %s", self.gpu.address, left.what, error)
            self._in_doubt = left
            return left

    async def _found_out(self) -> None:
        """Until it is known whether that is over."""
        pause = Pause()
        while self._in_doubt is not None:
            await pause.wait()
            with suppress(KernelError):
                self._kernel.adopt(self._in_doubt)
                self._in_doubt = None

    async def _returned(self) -> None:
        await self._found_out()
        await self._kernel.returned()
        if self._explaining is not None:
            self._explaining.cancel()
        self._resting.clear()
        self._arbiter.stuck.pop(self.gpu.address, None)
        await self._take_turn(None)
        self._keep_if_possible(replace(self._entry, stuck=None))
        self._fire("unstuck")
        self._unwedged.set()
        self._be_patient()
        self.facts = await self._own_look()
        self.reason = ""
        self._tell()

    # Telling --------------------------------------------------------------------------------------------------------

    def _end(self, switch: Switch, result: Result, reason: str) -> None:
        switch.finish(result, reason)
        self._tell_end(switch)

    @abstractmethod
    async def pay(self) -> None:
        """Give back what the start of the service could not wait for: units."""

    @abstractmethod
    def _tell(self) -> None: ...

    @abstractmethod
    def _tell_step(self, switch: Switch, event: StepEvent) -> None: ...

    @abstractmethod
    def _tell_end(self, switch: Switch) -> None: ...

    @abstractmethod
    def _tell_recovered(self, outcome: str) -> None: ...
