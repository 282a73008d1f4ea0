"""The record of one switch: what was asked and by whom, how far it is, how it ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent


class Result(StrEnum):
    """How a switch ended. Only `done` is what was asked for; `reverted` and `cancelled` left the GPU as it was."""

    DONE = "done"
    REVERTED = "reverted"
    FAILED = "failed"
    CANCELLED = "cancelled"
    WEDGED = "wedged"


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asked for a switch, as well as it could be told; None and empty: nobody could.

    `service`: the service itself, by its own rules; `trial`: since a trial is over; `at_boot`: since the machine
    starts, so that nobody is waited for, and no unit is stopped. `command` is the name of the process
    (/proc/PID/comm), `unit` the systemd unit that it runs in, `vm` the virtual machine that it asked for; with
    `for_process`, that is a process.
    """

    uid: int | None = None
    pid: int | None = None
    unit: str = ""
    command: str = ""
    vm: str = ""
    for_process: bool = False
    service: bool = False
    trial: bool = False
    at_boot: bool = False

    def on_behalf_of(self, owner: Owner) -> Requester:
        """The same, that asks for this owner."""
        return replace(self, vm=owner.name, for_process=owner.process is not None)

    def as_data(self) -> dict[str, object]:
        """What is known of it, as the history keeps it and the bus tells it (docs/dbus.md, `asker`)."""
        known: dict[str, object] = {"service": self.service, "uid": self.uid, "pid": self.pid}
        words = {"unit": self.unit, "command": self.command, "vm": self.vm}
        whys = {"trial": self.trial, "at_boot": self.at_boot}
        return (
            {key: value for key, value in known.items() if value is not None}
            | words
            | {why: so for why, so in whys.items() if so}
        )

    @property
    def machine(self) -> str:
        """The virtual machine that it asked for, which may be in the books of libvirt; "" none."""
        return "" if self.for_process else self.vm

    def __str__(self) -> str:
        if self.trial:
            return "the service itself, since a trial is over"
        if self.at_boot:
            return "the service itself, at boot"
        if self.service:
            whom = f"process {self.vm}" if self.for_process else f"the virtual machine {self.vm}"
            return f"the service itself, for {whom}" if self.vm else "the service itself"
        numbers = ", ".join(f"{what} {n}" for what, n in (("pid", self.pid), ("uid", self.uid)) if n is not None)
        return f"{self.command or 'somebody'} ({numbers})" if numbers else "somebody"


THE_SERVICE = Requester(service=True)
TRIAL_IS_OVER = Requester(service=True, trial=True)
AT_BOOT = Requester(service=True, at_boot=True)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """How step `index` (from 1) went, once: a step that was taken back has two. `started`: seconds since the epoch.

    One that is `interrupted`, and all before it, are of an earlier run of the service; its `seconds` are 0.0, unknown.
    """

    index: int
    title: str
    kind: str
    status: Status
    started: float
    seconds: float


def plans_of(steps: Iterable[tuple[int, str]]) -> list[int]:
    """Which plan of its switch each of these steps is of, from 1, by index and status, in the order in which they
    ended: a plan begins with its first step.
    """
    found, plan, last, back = list[int](), 1, 0, False
    for index, status in steps:
        if status in {Status.REVERTED, Status.REVERT_FAILED}:
            back = True
        elif index == 1 and not (status == Status.INTERRUPTED and back and last > 1):
            plan += last > 0
            back = False
        last = index
        found.append(plan)
    return found


@dataclass(frozen=True, slots=True)
class Drift:
    """Somebody else moved a GPU: a look showed another state, and no switch of ours was under way.

    `text` says what was found, in one sentence; `at` is when, in seconds since the epoch.
    """

    before: State
    after: State
    text: str
    at: float


@dataclass(frozen=True, slots=True)
class Returned:
    """The kernel has returned after all, of a switch that had ended as `wedged`.

    `at` is when, in seconds since the epoch, 0.0 while no service ran; `what` says from what it returned so late, in a
    sentence. `state` is where the GPU is since all of it was taken back, `recovering` until then, and `reason` says
    what did not work of that, a sentence a line.
    """

    at: float
    what: str
    state: State = State.RECOVERING
    reason: str = ""


@dataclass
class Switch:
    """One switch. `started` and `finished` are seconds since the epoch; `seconds` is how long it took.

    `index` of `count` steps is under way, or was the last, in its `plan`, from 1 (0: none has begun): those after the
    first are of its recovery; `steps` are those that ended, in that order; `result` is
    None until it is over. `step_started` is when the step that is under way began, `deadline` how many seconds it may
    take; `waiting_for` is what it waits for,
    a sentence a line, and `waiting_until` when it gives that up (0.0: it did not say). `error`, of one that was
    reverted: what a refusal for the same reason is called. `recovery`: it looks for any known-good state. `failure`:
    why it is being taken back. `forgone`: why optional steps did not work, of one that came to an end all the same.
    `resumed`: an earlier run of the service began it. `returned`: that the kernel has, of one that was wedged.
    """

    target: State
    count: int
    options: Options = field(default_factory=Options)
    requester: Requester = THE_SERVICE
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    started: float = field(default_factory=time.time)
    finished: float | None = None
    seconds: float = 0.0
    plan: int = 0
    index: int = 0
    step: str = ""
    step_kind: str = ""
    step_started: float = 0.0
    deadline: float = 0.0
    waiting_for: str = ""
    waiting_until: float = 0.0
    result: Result | None = None
    reason: str = ""
    error: str = ""
    steps: list[StepRecord] = field(default_factory=list)
    recovery: bool = False
    failure: str = ""
    forgone: tuple[str, ...] = ()
    resumed: bool = False
    returned: Returned | None = None
    _over: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _clock: float = field(default_factory=lambda: asyncio.get_running_loop().time(), repr=False)

    @classmethod
    def begun_before(
        cls,
        id: str,  # noqa: A002 -- as on the bus
        target: State,
        count: int,
        options: Options,
        requester: Requester,
        started: float,
        steps: Iterable[StepRecord],
    ) -> Switch:
        """One that an earlier run of the service began, with what that had done of it; it ends with a recovery."""
        clock = asyncio.get_running_loop().time() - max(0.0, time.time() - started)
        steps = list(steps)
        return cls(
            target,
            count,
            options,
            requester,
            id,
            started,
            plan=max(plans_of((step.index, step.status) for step in steps), default=0),
            steps=steps,
            recovery=True,
            resumed=True,
            _clock=clock,
        )

    @property
    def options_in_force(self) -> Options:
        """Nobody is ended or waited for by a recovery after a crash since somebody once asked for another switch so."""
        return Options() if self.resumed else self.options

    def at(self, event: StepEvent) -> None:
        self.index, self.count = event.index, event.count
        self.step, self.step_kind, self.deadline = event.step.title, event.step.kind, event.deadline
        self.step_started = began = self._at(asyncio.get_running_loop().time()) - event.seconds
        if event.status is Status.RUNNING and event.index == 1:
            self.plan += 1
        if event.status in {Status.RUNNING, Status.REVERTING}:
            self.waits("", None)
        else:
            self.steps.append(
                StepRecord(event.index, event.step.title, event.step.kind, event.status, began, event.seconds)
            )

    def waits(self, what: str, until: float | None) -> None:
        """The step that is under way waits for this, "" for nothing; `until` is a time of the loop."""
        self.waiting_for = what
        self.waiting_until = self._at(until) if until is not None else 0.0

    def _at(self, loop_time: float) -> float:
        """In seconds since the epoch, as its beginning is: a clock that is set meanwhile moves nothing."""
        return self.started + loop_time - self._clock

    def finish(self, result: Result, reason: str) -> None:
        self.seconds = asyncio.get_running_loop().time() - self._clock
        self.finished = self.started + self.seconds
        self.result, self.reason = result, reason
        self.waits("", None)
        if result is not Result.REVERTED:
            self.error = ""
        self._over.set()

    async def wait(self) -> None:
        """Until it is over."""
        await self._over.wait()
