"""What a step is, and what it works with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from gpuswitch.config.schema import check_kind
from gpuswitch.errors import Busy, Failed, GpuswitchError, KernelError
from gpuswitch.host.looking import seen
from gpuswitch.host.port import Host, Kernel
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.holders import Holder, HolderQuery, Unit
from gpuswitch.runtime.pause import within
from gpuswitch.switch.restore_state import RestoreState, SharedSetting
from gpuswitch.switch.shared.arbiter import Arbiter

RESCAN_SECONDS = 1.0
"""While holders are waited for: not all that lets go makes an event (the kernel's own use, a descriptor on its way)."""

Unmet = Callable[[HostFacts], str | None]
"""Looks at facts and says, in one sentence, what is not yet as it should be; None when all is."""


class StepError(Exception):
    """A step did not work; the sentence says what was found instead.

    `error`: what a refusal for the same reason is called.
    """

    error: ClassVar[type[GpuswitchError]] = Failed


class HeldError(StepError):
    """Somebody has the GPU open, and did not let go."""

    error = Busy


class DeviceError(StepError):
    """The device is in no state to be used by its host driver: a reset may help, or a removal and a rescan."""


class StepContext:
    """What a step works with: the host, the kernel operations of one GPU, and what this GPU shares with others.

    `record_restore` notes, durably, what is to be given back one day; it raises `Failed` where it cannot. `deadlines`
    gives seconds by kind of step. `waits` is called with what a step waits for, and until when, whenever that is
    another thing than before (`waits_for`).
    """

    def __init__(
        self,
        gpu: PciAddress,
        host: Host,
        kernel: Kernel,
        arbiter: Arbiter,
        record_restore: Callable[[RestoreState], None],
        *,
        deadlines: Mapping[str, float],
        waits: Callable[[str, float | None], None] = lambda *_: None,
    ) -> None:
        self.gpu = gpu
        self.host = host
        self.kernel = kernel
        self.arbiter = arbiter
        self.record_restore = record_restore
        self.deadlines = deadlines
        self.leaving = False
        """The service is being stopped: units are started without waiting for them."""
        self.numbers: tuple[str, ...] = ()
        """Device numbers that the last look for holders looked for."""
        self.stopped: list[Unit] = []
        """Units that a policy stopped during this switch, the last one last."""
        self.changed: set[SharedSetting] = set()
        """Shared settings that this switch has changed for its GPU, which had not needed them so before."""
        self.staying: set[PciAddress] = set()
        """Functions that the way back found on vfio-pci, and has not unbound: a virtual machine may have them."""
        self.shown: dict[int, PciAddress | None] = {}
        """What showed each virtual terminal before a vtconsole was unbound."""
        self.waiting_for = ""
        """What a step that waits for it has not seen yet, a sentence a line; "" where it did not say."""
        self._told = ""
        self._waits = waits

    def waits_for(self, what: str, until: float | None = None, *, told: bool = True) -> None:
        """Say what has not been seen yet, a sentence a line; `until`: when it is given up, by the clock of the loop.

        Not `told`: only should it fail now.
        """
        self.waiting_for = what
        if told and what != self._told:
            self._told = what
            self._waits(what, until)

    async def look(self, only: Collection[PciAddress] | None = None) -> HostFacts:
        """What a look shows that has seen everything; `only`: the functions to look at (`Host.look`)."""
        return await seen(self.host, only)

    async def check(self, unmet: Unmet, only: Collection[PciAddress] | None = None) -> None:
        """Raise `StepError` unless all is as it should be now: for what the kernel decides before a write returns."""
        if (why := unmet(await self.look(only))) is not None:
            raise StepError(why)

    async def holders(self, query: HolderQuery) -> tuple[Holder, ...]:
        """Who has it open, now.

        Raises:
            StepError: nobody can tell, which is no different from being busy.
        """
        try:
            scan = await self.host.processes.scan(query)
        except KernelError as error:
            raise StepError(f"{error}, so {self.gpu} counts as busy") from error
        self.numbers = scan.numbers
        return scan.holders

    async def wait_for_change(self, holders: Sequence[Holder], seconds: float = RESCAN_SECONDS) -> None:
        """Wait until one of them may have changed, for so many seconds at most: then it is time to look again."""
        seconds = min(seconds, RESCAN_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                try:
                    await self.host.processes.wait_for_change(holders)
                except KernelError:
                    await within(seconds, asyncio.Event())

    async def until(self, unmet: Unmet, only: Collection[PciAddress] | None = None) -> None:
        """Wait until all is as it should be: for what comes later, by a uevent. The caller sets the deadline."""
        changed = asyncio.Event()
        stop = self.host.watch(changed.set)
        try:
            while (why := unmet(await self.look(only))) is not None:
                self.waits_for(why)
                await changed.wait()
                changed.clear()
        finally:
            stop()


class Step:
    """One reversible action.

    `kind` names its deadline in the config (`gpuswitch.config.schema.Deadlines`) and its series in the metrics.
    `optional`: should it fail, the switch goes on without it, and says so in the end. `interruptible`: `apply` waits
    for people and their programs; should the switch be told to end, it is cut short, and `revert` puts it right.
    """

    kind: ClassVar[str]
    optional: ClassVar[bool] = False
    interruptible: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Refuse a step whose `kind` has no deadline, before any switch runs into it."""
        super().__init_subclass__()
        check_kind(getattr(cls, "kind", ""), f"the step {cls.__name__}")

    def deadline(self, deadlines: Mapping[str, float]) -> float:
        """How many seconds `apply` may take, and then `verify`; `deadlines` are what the config says, by kind."""
        return deadlines[self.kind]

    def deadline_back(self, deadlines: Mapping[str, float]) -> float:
        """How many seconds `revert` may take."""
        return deadlines[self.kind]

    @property
    def title(self) -> str:
        """What it does, for a person: `unbind 0000:01:00.1 from snd_hda_intel`."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        """What runs now and is stopped by it, by name: units, and sessions as `session 2`."""
        return ()

    @property
    def starts(self) -> tuple[str, ...]:
        """The units that it starts, by name: one that runs now is restarted, by this step or by one before it too."""
        return ()

    @property
    def ends_programs(self) -> bool:
        """Whether it ends whoever has the GPU open."""
        return False

    @property
    def drivers(self) -> Mapping[PciAddress, str]:
        """The driver that each function has after it whose driver it changes; "" for none."""
        return {}

    async def apply(self, context: StepContext) -> None:
        """Do it."""

    async def verify(self, context: StepContext) -> None:
        """Raise `StepError` unless it is done."""

    async def revert(self, context: StepContext) -> None:
        """Take it back, also when it was done in part or not at all."""

    async def heard(self, context: StepContext, mark: float) -> tuple[str, ...]:  # noqa: ARG002 -- of most, the kernel says nothing
        """What the kernel said of it since `mark` (`KernelLog.mark`), now that it did not work."""
        return ()


async def side_by_side(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once, and to the end of each.

    Raises:
        StepError: with the sentences of all that failed.
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    faults = [str(result) for result in results if isinstance(result, KernelError)]
    if faults:
        raise StepError("; ".join(faults))
    for result in results:
        if isinstance(result, BaseException):
            raise result
