"""The engine: runs the steps of one plan, and takes them back when one fails.

Forward, for each step: intent → apply → verify → done, under the deadline of its kind. Back: revert what was begun, in
reverse, the failed step included, each under a deadline of its own. The engine knows no GPU, no state and no bus: the
runner decides what a result means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gpuswitch.errors import Failed, KernelError
from gpuswitch.host.port import Pending
from gpuswitch.log.fields import told
from gpuswitch.sentence import Sentence
from gpuswitch.switch.steps.step import DeviceError, Step, StepContext, StepError

_log = logging.getLogger(__name__)

LOG_SECONDS = 5.0
"""How long what the kernel said of a failure is waited for, which only makes that easier to understand."""


class Status(StrEnum):
    """What has just become of a step; `cancelled`: it only waited, and the switch was to end; `interrupted`: the
    service ended in the midst of it.
    """

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REVERTING = "reverting"
    REVERTED = "reverted"
    REVERT_FAILED = "revert-failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class StepEvent:
    """`index` counts from 1 to `count`; `seconds` is how long the step took, 0 while it runs; `deadline` is how many it
    may take.
    """

    index: int
    count: int
    step: Step
    status: Status
    seconds: float = 0.0
    deadline: float = 0.0


def returned_late(operation: str) -> Sentence:
    """Of one that an earlier run of the service has sent, and the kernel returned from since."""
    return Sentence("the kernel returned late from '{operation}'", operation=operation)


class StuckError(Exception):
    """The kernel did not return from an operation within the step's deadline. Nothing more may be written."""

    def __init__(self, pending: Pending, deadline: float | None) -> None:
        """`deadline` in seconds; None: an earlier run of the service sent it."""
        self.afterwards = returned_late(pending.what)
        if deadline is not None:
            self.afterwards = Sentence(
                "'{operation}' took longer than {seconds} s", operation=pending.what, seconds=f"{deadline:g}"
            )
        since = Sentence("since before the service started")
        if deadline is not None:
            since = Sentence("within {seconds} s", seconds=f"{deadline:g}")
        said = Sentence("the kernel has not returned from '{operation}' {since}", operation=pending.what, since=since)
        if pending.pid:
            state = Sentence("process {pid} is in state {state}", pid=pending.pid, state=pending.process_state)
            if pending.kernel_wait:
                state = Sentence("{state}, waiting in {function}", state=state, function=pending.kernel_wait)
            said = Sentence.joined(" ", [said, Sentence("({state})", state=state)])
        super().__init__(said)
        self.pending = pending


class _CutShortError(StepError):
    """A step only waited, and the switch was asked to end."""


class StoppedError(Exception):
    """The switch was asked to end, and the step that ran then is over."""


class Engine:
    """One run of one plan's steps, under the deadlines that `context` have; `report` hears of every step.

    `intend` keeps, durably, what is begun next; it raises `Failed` where it cannot.

    `begun`: somebody has applied the steps already, all there is to do is the way back. `held` are those that were
    applied before, whatever comes of the others: they have to be reverted even where they were not reached.
    """

    def __init__(
        self,
        context: StepContext,
        steps: tuple[Step, ...],
        report: Callable[[StepEvent], None],
        intend: Callable[[StepEvent], None],
        *,
        begun: bool = False,
        held: Collection[Step] = (),
    ) -> None:
        self._context = context
        self._steps = steps
        self._deadlines = context.deadlines
        self._report = report
        self._intend = intend
        self._begun = [(number, step) for number, step in enumerate(steps, 1) if begun or step in held]
        self._faults: list[str] = []
        self._stop = ""
        self._cut: asyncio.Timeout | None = None
        self.hung = False
        """Whether the kernel once did not return in time."""
        self.failed_on_device = False
        """Whether what failed was the device itself."""
        self.forgone: list[str] = []
        """Why optional steps did not work."""

    def stop(self, reason: str, *, leaving: bool = False) -> None:
        """End before the next step. A step is never torn apart: the one that runs is finished first, unless it only
        waits for people and their programs. Where only optional steps are left, those are still done.

        `leaving`: the service itself is stopped, and cannot wait for units.
        """
        self._stop = self._stop or reason
        self._context.leaving = self._context.leaving or leaving
        if self._cut is not None and self._cut.when() is None:
            self._cut.reschedule(0)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The device numbers that the last look for holders looked for."""
        return self._context.numbers

    @property
    def longest(self) -> float:
        """How many seconds may pass at most without anything being told, if all is well with the program itself."""
        steps = [max(s.deadline(self._deadlines), s.deadline_back(self._deadlines)) for s in self._steps]
        return max(*self._deadlines.values(), *steps)

    @property
    def stoppable(self) -> bool:
        """Whether `stop` would still lead back: the steps that are left are not all optional."""
        reached = self._begun[-1][0] if self._begun else 0
        return any(not step.optional for step in self._steps[reached:])

    async def forward(self) -> None:
        """Run every step; past an optional one that fails, whose sentence is then in `forgone`.

        Raises:
            StepError: a step did not work; `back` may follow.
            StuckError: the kernel did not return; `back` may follow only once it has.
            StoppedError: `stop` was called; `back` may follow.
        """
        for number, step in enumerate(self._steps, 1):
            if self._stop and not all(later.optional for later in self._steps[number - 1 :]):
                raise StoppedError(self._stop)
            self._begun = [*(each for each in self._begun if each[0] != number), (number, step)]
            started = self._tell(number, step, Status.RUNNING)
            try:
                await self._forward_one(number, step)
            except (StepError, StuckError) as failure:
                cut_short = isinstance(failure, _CutShortError)
                self._tell(number, step, Status.CANCELLED if cut_short else Status.FAILED, started)
                if isinstance(failure, StuckError):
                    raise
                if self._stop and not step.optional:
                    raise StoppedError(self._stop) from failure
                if not step.optional:
                    self.failed_on_device = isinstance(failure, DeviceError)
                    raise
                _log.warning("%s: %s", step.title, failure, extra=told(GPU=self._context.gpu))
                self.forgone.append(str(failure))
            else:
                self._tell(number, step, Status.DONE, started)

    async def _forward_one(self, number: int, step: Step) -> None:
        try:
            self._intend(StepEvent(number, len(self._steps), step, Status.RUNNING))
        except Failed as error:
            if not step.optional:
                raise StepError(str(error)) from error
        mark = self._context.host.kernel_log.mark()
        try:
            await self._done(step, step.deadline(self._deadlines))
        except StepError as failure:
            if lines := await self._heard(step, mark):
                said = Sentence("{failure}; the kernel says: {lines}", failure=failure, lines=" | ".join(lines))
                raise type(failure)(said) from failure
            raise

    async def _done(self, step: Step, deadline: float) -> None:
        try:
            await self._bounded(step, step.apply, deadline)
        except StepError:
            if not (step.optional and step.interruptible and self._context.leaving):
                raise
            # It waited for units when the service was told to stop; this time it does not wait.
            await self._bounded(step, step.apply, deadline)
        if type(step).verify is not Step.verify:
            await self._bounded(step, step.verify, deadline)

    async def _heard(self, step: Step, mark: float) -> tuple[str, ...]:
        """What the kernel said; whatever is wrong with that is in nobody's way."""
        try:
            async with asyncio.timeout(LOG_SECONDS):
                return await step.heard(self._context, mark)
        except Exception as fault:  # noqa: BLE001 -- it only makes a failure easier to understand
            _log.warning(
                "cannot tell what the kernel said of '%s': %r", step.title, fault, extra=told(GPU=self._context.gpu)
            )
            return ()

    async def back(self) -> None:
        """Revert what was begun, last first. Goes on past a revert that fails, to bring home what it can.

        Raises:
            StepError: with the sentences of all reverts that failed, also of those before a stuck one.
            StuckError: the kernel did not return; what is left is reverted by calling again once it has.
        """
        while self._begun:
            number, step = self._begun[-1]
            if type(step).revert is Step.revert:
                # Nothing of it is taken back, such as a module that was loaded: so nobody is told that it was.
                self._begun.pop()
                continue
            started = self._tell(number, step, Status.REVERTING)
            with suppress(Failed):
                self._intend(StepEvent(number, len(self._steps), step, Status.REVERTING))
            try:
                await self._bounded(step, step.revert, step.deadline_back(self._deadlines))
            except StepError as fault:
                self._faults.append(str(fault))
                self._tell(number, step, Status.REVERT_FAILED, started)
            except StuckError:
                self._tell(number, step, Status.REVERT_FAILED, started)
                raise
            else:
                self._tell(number, step, Status.REVERTED, started)
            self._begun.pop()
        if self._faults:
            raise StepError("; ".join(self._faults))

    async def _bounded(
        self, step: Step, work: Callable[[StepContext], Coroutine[Any, Any, None]], deadline: float
    ) -> None:
        self._context.waits_for("")
        try:
            async with asyncio.timeout(deadline):
                if step.interruptible and work == step.apply and not self._context.leaving:
                    await self._unless_ending(step)
                else:
                    await work(self._context)
        except TimeoutError:
            if (pending := self._context.kernel.pending) is not None:
                self.hung = True
                raise StuckError(pending, deadline) from None
            raise StepError(f"{self._waiting_for(step)} after {deadline:g} s") from None
        except (KernelError, Failed) as error:
            raise StepError(str(error)) from error
        except (StepError, StuckError):
            raise
        except Exception as fault:
            # Whatever it was, the steps before it must be taken back.
            _log.exception("a fault of gpuswitch itself at '%s'", step.title, extra=told(GPU=self._context.gpu))
            raise StepError(f"a fault of gpuswitch itself: {fault!r}") from fault

    async def _unless_ending(self, step: Step) -> None:
        """Apply it, until the switch is to end."""
        self._cut = cut = asyncio.timeout(0 if self._stop else None)
        try:
            async with cut:
                await step.apply(self._context)
        except TimeoutError:
            if not cut.expired():
                raise
            await self._call_over(self._deadlines[step.kind])
            raise _CutShortError(f"{self._waiting_for(step)}, and the switch is to end") from None
        finally:
            self._cut = None

    async def _call_over(self, deadline: float) -> None:
        """Until the kernel has done what was sent to it last: that goes on, whoever waits for it."""
        try:
            async with asyncio.timeout(deadline):
                await self._context.kernel.returned()
        except TimeoutError:
            if (pending := self._context.kernel.pending) is not None:
                self.hung = True
                raise StuckError(pending, deadline) from None

    def _waiting_for(self, step: Step) -> str:
        return self._context.waiting_for or f"'{step.title}' is not done"

    def _tell(self, number: int, step: Step, status: Status, started: float | None = None) -> float:
        now = asyncio.get_running_loop().time()
        seconds = 0.0 if started is None else now - started
        back = status in {Status.REVERTING, Status.REVERTED, Status.REVERT_FAILED}
        deadline = step.deadline_back(self._deadlines) if back else step.deadline(self._deadlines)
        self._report(StepEvent(number, len(self._steps), step, status, seconds, deadline))
        return now
