"""Follows switches to their end, one or several at once."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from gpuswitch.cli.client import GPU, Gpu, Service, Signal, Typed, plain_values
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.interrupts import INTERRUPTS
from gpuswitch.cli.output import clock
from gpuswitch.cli.requesters import requester_words
from gpuswitch.cli.translate import _
from gpuswitch.errors import EXIT_UNREACHABLE, Timeout

MOMENT = 1.0
"""Seconds that a step may take before it is told that it is at work."""
StepChange = namedtuple("StepChange", "index count kind title status seconds plan", defaults=[1])
"""What has just become of step `index` (from 1) of `count`; `seconds` is how long it took, or has run until now.
`plan` is which plan of its switch it is of, from 1: those after the first are of its recovery."""
Waiting = namedtuple("Waiting", "what since until")
"""What the step under way waits for, a sentence a line; since when; and when it gives that up (0: it does not say).

Times are seconds since the epoch."""


def at_work(change: StepChange) -> bool:
    """It has begun, and is not over."""
    return change.status in {"running", "reverting"}


def step_under_way(switch: Mapping[str, Any]) -> StepChange | None:
    """The step that a switch is at, by property Switch; None: at none."""
    if not switch or switch["result"] or not switch["index"]:
        return None
    seconds, plan = max(time.time() - switch["step_started"], 0.0), max(switch.get("plan", 1), 1)
    return StepChange(switch["index"], switch["count"], switch["kind"], switch["title"], "running", seconds, plan)


def joined_words(gpu: Gpu, switch: Mapping[str, Any]) -> str:
    """That somebody else had begun this switch, which property Switch tells of: who, and when."""
    return _(
        "joined switch {id} of {gpu} to {target}, which runs since {time}; asked for by {requester}",
        id=switch["id"],
        gpu=gpu.title,
        target=switch["target"],
        time=clock(switch["started"]),
        requester=requester_words(switch["asker"], whole=True) if switch.get("asker") else _("somebody"),
    )


def limit_of(switch: Mapping[str, Any], step: StepChange) -> float:
    """Within how many seconds this step has to be over, by property Switch; 0: that does not say, or is at another."""
    at_it = (switch.get("index"), switch.get("title")) == (step.index, step.title)
    return float(switch.get("deadline", 0.0)) if at_it else 0.0


class Lasting:
    """Steps that have begun and take their time, each to be told once: most are over before anybody has to know that
    they have begun.
    """

    def __init__(self) -> None:
        self._untold: dict[str, tuple[float, str, StepChange]] = {}
        """When it is to be told, by the monotonic clock; of which switch it is."""

    @property
    def first(self) -> float | None:
        """When there is something to tell, by the monotonic clock; None: as far as is known, never."""
        return min((when for when, _switch, _change in self._untold.values()), default=None)

    def heard(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        """This has become of a step."""
        self.told(gpu)
        if at_work(change):
            self._untold[gpu.path] = time.monotonic() + MOMENT - change.seconds, switch, change

    def told(self, gpu: Gpu) -> None:
        """Whoever looks on knows of the step that this GPU is at, or has no need to."""
        self._untold.pop(gpu.path, None)

    def clear(self) -> None:
        """Whatever was heard is of a service that has ended."""
        self._untold.clear()

    def until(self, when: float) -> Iterator[tuple[str, str, StepChange]]:
        """Those that were to be told by then: the path of their GPU, the switch, and the step as it is by now."""
        for path, (due, switch, change) in list(self._untold.items()):
            if due <= when:
                del self._untold[path]
                yield path, switch, change._replace(seconds=MOMENT)


class Display(Protocol):
    """Shows the steps of switches, in the order of their events. `joined`: that somebody else had begun one, a
    sentence. `lasts`: a step that has begun takes its time, told once.
    """

    def joined(self, gpu: Gpu, sentence: str) -> None: ...
    def step(self, gpu: Gpu, switch: str, change: StepChange) -> None: ...
    def lasts(self, gpu: Gpu, switch: str, change: StepChange) -> None: ...
    def waits(self, gpu: Gpu, switch: str, waiting: Waiting) -> None: ...


class Waits:
    """What the steps under way wait for, each told once."""

    def __init__(self) -> None:
        self._told: dict[str, Waiting] = {}

    def news(self, gpu: Gpu, switch: Mapping[str, Any]) -> Waiting | None:
        """What it waits for by property Switch, unless that was so when this was last asked."""
        before, what = self._told.get(gpu.path), str(switch.get("waiting_for", ""))
        if not what:
            self.over(gpu)
            return None
        if before is not None and before.what == what:
            return None
        self._told[gpu.path] = told = Waiting(what, switch["step_started"], switch["waiting_until"])
        return told

    def last(self, gpu: Gpu) -> Waiting | None:
        """What was told last of a step that waits still."""
        return self._told.get(gpu.path)

    def over(self, gpu: Gpu) -> None:
        """That step waits no more: the next one may wait for the same."""
        self._told.pop(gpu.path, None)

    def clear(self) -> None:
        """Whatever was told is of a service that has ended."""
        self._told.clear()


class Plans:
    """Which plan of its switch each step is of, which its signal does not say: a plan begins with its first step."""

    def __init__(self) -> None:
        self._now: dict[str, tuple[str, int]] = {}

    def heard(self, gpu: Gpu, switch: Mapping[str, Any]) -> None:
        """What property Switch says of the step that it was at when that was told."""
        if "plan" in switch:
            self._now[gpu.path] = switch["id"], switch["plan"]

    def of(self, gpu: Gpu, switch: str, change: StepChange) -> StepChange:
        """The same, with its plan."""
        known, plan = self._now.get(gpu.path, ("", 0))
        plan = (plan if known == switch else 0) + (change.status == "running" and change.index == 1)
        self._now[gpu.path] = switch, plan
        return change._replace(plan=max(plan, 1))


class Following:
    """Of switches that were begun, by their GPUs. Signals were subscribed to before that, so nothing is missed. Until
    the deadline of the service, which is `seconds` from when its user asked. `is_joined` says, by property Switch,
    whether somebody else had begun one: that is told.

    `outcomes` are what property Switch says of those that are over, by the address of their GPU.
    """

    def __init__(
        self,
        service: Service,
        begun: Iterable[tuple[Gpu, str]],
        seconds: float | None,
        *,
        is_joined: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    ) -> None:
        self._service = service
        self._seconds = seconds
        self._switches = {gpu.path: (gpu, switch) for gpu, switch in begun}
        self._asked = {service.send(gpu.wait(switch)): gpu for gpu, switch in self._switches.values()}
        # A switch that was joined tells nothing of the step that it is at, and it may stand there for long.
        self._looks = {service.send(gpu.properties_now()): (gpu, switch) for gpu, switch in self._switches.values()}
        self._is_joined = is_joined
        self._shown: set[str] = set()
        """The paths of those GPUs of whose switch a step was shown: what it waits for belongs below that."""
        self._told = Waits()
        self._plans = Plans()
        self._lasting = Lasting()
        self.outcomes: dict[str, dict[str, Any]] = {}

    @property
    def under_way(self) -> list[tuple[Gpu, str]]:
        """Those that are not over, with the ids of their switches."""
        return [(gpu, switch) for gpu, switch in self._switches.values() if gpu.address not in self.outcomes]

    def tell_again(self, display: Display) -> None:
        """What they wait for, and until when, where what was told of that is not seen any more."""
        for gpu, switch in self.under_way:
            if (waiting := self._told.last(gpu)) is not None:
                display.waits(gpu, switch, waiting)

    def to_the_end(self, display: Display) -> None:
        """Show what happens until all are over. May be called again after an interrupt.

        Raises:
            CtlError: also where they have not finished in time.
        """
        deadline = self._service.deadline
        with INTERRUPTS.held():
            while self._asked:
                first = min((each for each in (deadline, self._lasting.first) if each is not None), default=None)
                event = self._next_event(first)
                if event is None and first is not None and first != deadline:
                    self._tell_what_lasts(first, display)
                elif event is None:
                    ids = _(" and ").join(switch for _gpu, switch in self.under_way)
                    text = _(
                        "the time is over: switch {ids} has not finished within {seconds} s, and goes on: {command} "
                        "waits for it",
                        ids=ids,
                        seconds=f"{self._seconds:g}",
                        command=f"gpuswitchctl wait {' '.join(gpu.word for gpu, _switch in self.under_way)}",
                    )
                    raise CtlError.of(Timeout, text, is_whole=True)
                else:
                    self._take(event, display)

    def _next_event(self, deadline: float | None) -> Signal | int | None:
        try:
            return self._service.next_event(deadline)
        except CtlError as error:
            if error.exit_code == EXIT_UNREACHABLE:
                raise self._left_alone(error) from None
            raise

    def _tell_what_lasts(self, when: float, display: Display) -> None:
        for path, switch, change in self._lasting.until(when):
            display.lasts(self._switches[path][0], switch, change)

    def until_typed(self, display: Display, terminal: int) -> bool:
        """The same, until something can be read from there (True), or all are over."""
        try:
            with self._service.listening_to(terminal):
                self.to_the_end(display)
        except Typed:
            return True
        return False

    def _take(self, event: Signal | int, display: Display) -> None:
        if isinstance(event, int):
            self._answered(event, display)
        elif event.path in self._switches and event.interface == GPU and event.member == "StepChanged":
            self._stepped(*self._switches[event.path], event.body, display)
        elif event.path in self._switches and event.member == "PropertiesChanged" and event.body[0] == GPU:
            self._changed(*self._switches[event.path], event.body[1], display)

    def _answered(self, serial: int, display: Display) -> None:
        if serial in self._looks:
            gpu, switch = self._looks.pop(serial)
            with suppress(CtlError):  # it has left the bus; how its switch ends is told all the same
                now = plain_values(self._service.answer(serial).body[0])["Switch"]
                self._plans.heard(gpu, now)
                if now.get("id") == switch and not now["result"]:
                    if self._is_joined(now):
                        display.joined(gpu, joined_words(gpu, now))
                    self._catch_up(gpu, switch, now, display)
            return
        try:
            outcome = plain_values(self._service.answer(serial).body[0])
        except CtlError as error:
            if error.exit_code == EXIT_UNREACHABLE:
                raise self._left_alone(error) from None
            raise
        gpu = self._asked.pop(serial)
        self._lasting.told(gpu)
        self.outcomes[gpu.address] = outcome

    def _left_alone(self, error: CtlError) -> CtlError:
        """The service has gone in the midst of it, with what there is to type to see what becomes of that."""
        under_way = self.under_way
        hint = _(
            "what it had begun is brought to a known-good state as soon as it runs again: {status} starts it and shows "
            "where the GPU is, {show} each step",
            status=f"gpuswitchctl status {' '.join(gpu.word for gpu, _switch in under_way)}",
            show=_(" and ").join(f"gpuswitchctl show {switch}" for _gpu, switch in under_way),
        )
        return CtlError(f"{error}\n{hint}", error.exit_code, name=error.name)

    def _catch_up(self, gpu: Gpu, switch: str, now: Mapping[str, Any], display: Display) -> None:
        """Show the step that it is at. What was told before this answer was given has been shown."""
        if gpu.path in self._shown or (change := step_under_way(now)) is None:
            return
        self._shown.add(gpu.path)
        display.step(gpu, switch, change)
        self._waits(gpu, switch, now, display)

    def _stepped(self, gpu: Gpu, switch: str, body: tuple[Any, ...], display: Display) -> None:
        if body[0] == switch:
            self._shown.add(gpu.path)
            self._told.over(gpu)
            change = self._plans.of(gpu, switch, StepChange(*body[1:]))
            self._lasting.heard(gpu, switch, change)
            display.step(gpu, switch, change)

    def _changed(self, gpu: Gpu, switch: str, changed: Mapping[str, tuple[str, Any]], display: Display) -> None:
        # Kept for who says how it ended, and may have no time left to ask.
        gpu.properties.update(now := plain_values(changed))
        self._plans.heard(gpu, now.get("Switch", {}))
        # Until a step is shown, the answer is on its way that has the step and what it waits for (`_looks`).
        if gpu.path in self._shown:
            self._waits(gpu, switch, now.get("Switch", {}), display)

    def _waits(self, gpu: Gpu, switch: str, now: Mapping[str, Any], display: Display) -> None:
        if now.get("id") == switch and (waiting := self._told.news(gpu, now)) is not None:
            if waiting.until:
                self._lasting.told(gpu)
            display.waits(gpu, switch, waiting)
