"""The verbs that follow what happens: `watch`, until it is ended, and `wait`, until GPUs are where they shall be."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpuswitch.cli.client import GPU, Gpu, Service, Signal, plain_values, signals_of
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import StepChange, Waiting, Waits, step_under_way
from gpuswitch.cli.layout import hung
from gpuswitch.cli.output import (
    LIST,
    as_json_line,
    cells,
    clock,
    line,
    lines_of,
    moment,
    numbered,
    on_terminal,
    problem,
)
from gpuswitch.cli.parser import STATES, TARGETS
from gpuswitch.cli.records import came_back, gpu_record, naming, reasons, state_label
from gpuswitch.cli.steps import Ended, JsonLines, running_words
from gpuswitch.cli.translate import _, mark, recognized, state_word
from gpuswitch.cli.watching import BUS, Watching, name_owner
from gpuswitch.errors import EXIT_UNREACHABLE, Failed, NoSuchGpu, Timeout, Wedged

_MOVING = frozenset({"detaching", "reattaching", "recovering"})
_LOST = frozenset({"failed", "wedged", "unknown", "absent"})


def watch(service: Service, args: Namespace) -> int:
    """Tell each event; a service that ends or starts again is one of them."""
    service.end_with_its_reader()
    Watching(service, args.gpus, _JsonEvents() if args.json else _Lines()).for_ever()
    return 0


class _Lines:
    """One line for each event that people want to know of."""

    def __init__(self) -> None:
        self._states: dict[str, list[str]] = {}
        self._known: set[str] = set()
        """The switches whose end was told, or is going to be."""
        self._ended = Ended()
        self._why: dict[str, str] = {}
        """Why each GPU is where it is, as it was told last."""

    def service(self, text: str, *, running: bool) -> None:
        # How a GPU is is said again by a service that is another one.
        self._states.clear()
        self._say(text if running else _("{text}; it is waited for", text=text))

    def state(self, gpu: Gpu) -> None:
        known = gpu.properties
        words, below = [state_label(known)], list[str]()
        if any(known["Owner"]):
            words.append(_("owned by {machine}", machine=known["Owner"][0] or known["Owner"][1]))
        now, past = reasons(known)
        if now:
            first, *below = lines_of(now)
            words.append(first)
        self._why[gpu.path] = now
        # Of one that was seen under way, the end comes next.
        if past and known["Switch"]["id"] not in self._known:
            first, *more = _last_switch(known["Switch"])
            words.append(first)
            below += more
        below += came_back(known["Switch"])
        if known["Switch"] and not known["Switch"]["result"]:
            self._known.add(known["Switch"]["id"])
        # Not all that changes is told here, such as drivers on their way.
        said, before = [", ".join(words), *below], self._states.get(gpu.path, [])
        self._states[gpu.path] = said
        if said == before:
            return
        # More has become known, and all else was said.
        told = said[len(before) :] if before and said[: len(before)] == before else said
        self._say(f"{gpu.title}: {told[0].strip()}", told[1:])

    def under_way(self, gpu: Gpu, change: StepChange, waiting: Waiting | None) -> None:
        self._say(f"{gpu.title}: {at_step(gpu, change, waiting)}")

    def lasts(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        for each in self._ended.lasting(gpu, switch, change):
            self._say(f"{gpu.title}: {each}")

    def gone(self, gpu: Gpu) -> None:
        self._states.pop(gpu.path, None)
        self._say(_("{gpu}: it is not on this host any more", gpu=gpu.title))

    def step(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        for each in self._ended.of(gpu, switch, change):
            self._say(f"{gpu.title}: {each}")

    def waits(self, gpu: Gpu, _switch: str, waiting: Waiting) -> None:
        self._say(f"{gpu.title}: {_waiting_words(waiting)}")

    def finished(self, gpu: Gpu, switch: str, result: str, reason: str) -> None:
        self._known.add(switch)
        ended, below = _("switch {id} is {result}", id=switch, result=state_word(result)), list[str]()
        if reason and reason not in self._why.get(gpu.path, ""):
            why, *below = lines_of(reason)
            ended = f"{ended}: {why}"
        self._say(f"{gpu.title}: {ended}", below)

    def _say(self, text: str, below: Iterable[str] = ()) -> None:
        # Who sits there knows the day, and which time is theirs; a file may be read elsewhere.
        at = clock(time.time()) if on_terminal(sys.stdout) else moment(time.time())
        lead = f"{at}  "
        line(f"{lead}{text}")
        for each in below:
            hung(" " * cells(lead) + LIST, each)


def at_step(gpu: Gpu, change: StepChange, waiting: Waiting | None) -> str:
    """The step under way, and whom it waits for; else for how long it is at work, and its limit."""
    if waiting is not None and waiting.until:
        return f"{numbered(change.index, change.count, change.title)}: {_waiting_words(waiting)}"
    return running_words(gpu, change)


def _waiting_words(waiting: Waiting) -> str:
    what = "; ".join(recognized(waiting.what).splitlines())
    return _("waiting until {time}: {what}", time=clock(waiting.until), what=what)


def _last_switch(switch: Mapping[str, Any]) -> list[str]:
    """How it ended, and when: it may be long ago. What comes after the first sentence is below it."""
    reason, *more = lines_of(switch["reason"])
    # Where the kernel has returned since, it is where it is since then.
    text = mark("since {moment}, when switch {id} to {target} was {result}: {reason}")
    if came_back(switch):
        text = mark("switch {id} to {target} was {result}: {reason}")
    ended = _(
        text,
        moment=moment(switch["finished"]),
        id=switch["id"],
        target=switch["target"],
        result=state_word(switch["result"]),
        reason=reason,
    )
    return [ended, *more]


class _JsonEvents(JsonLines):
    """One JSON object for each event."""

    def service(self, text: str, *, running: bool) -> None:
        self._say("service", running=running, text=text)

    def state(self, gpu: Gpu) -> None:
        self._say("state", **naming(gpu), now=gpu_record(gpu.properties))

    def under_way(self, gpu: Gpu, change: StepChange, waiting: Waiting | None) -> None:
        """The state has it, as data."""

    def gone(self, gpu: Gpu) -> None:
        self._say("gone", **naming(gpu))

    def finished(self, gpu: Gpu, switch: str, result: str, reason: str) -> None:
        self._say("finished", **naming(gpu), id=switch, result=result, reason=reason)

    def _say(self, event: str, **data: object) -> None:
        as_json_line({"event": event, **data})


def wait(service: Service, args: Namespace) -> int:
    """Until no switch of these GPUs is under way; with a state, until all of them are there, or wedged.

    Raises:
        CtlError: the time is over, or the service has gone.
    """
    service.end_with_its_reader()
    service.subscribe(name_owner())
    owner = service.owner()
    service.subscribe(signals_of(owner))
    gpus = _waited_for(service, args.gpus)
    by_path = {gpu.path: gpu for gpu in gpus}
    arrived = _arrived(args.state)
    # On a terminal somebody sits there. Who reads standard output gets how it ends alone.
    told = _Meanwhile() if on_terminal(sys.stderr) and not args.json else None
    while waiting := [gpu for gpu in gpus if not arrived(gpu.properties)]:
        if told is not None:
            told.of(waiting)
        event = service.next_event(service.deadline)
        if event is None:
            states = [_("{gpu} is {state}", gpu=gpu.title, state=state_label(gpu.properties)) for gpu in waiting]
            named, seconds = _(" and ").join(states), f"{args.timeout:g}"
            if args.state in TARGETS:
                text = _(
                    "the time is over: not on {state} within {seconds} s: {gpus}",
                    state=args.state,
                    seconds=seconds,
                    gpus=named,
                )
            elif args.state:
                text = _(
                    "the time is over: not {state} within {seconds} s: {gpus}",
                    state=state_word(args.state),
                    seconds=seconds,
                    gpus=named,
                )
            else:
                text = _("the time is over: not at rest within {seconds} s: {gpus}", seconds=seconds, gpus=named)
            raise CtlError.of(Timeout, text, is_whole=True)
        if isinstance(event, Signal) and event.interface == BUS and event.body[1] == owner:
            text = _("the service went away; it may have been restarted")
            raise CtlError(text, EXIT_UNREACHABLE, name="Unreachable")
        if isinstance(event, Signal) and event.member == "InterfacesRemoved" and event.body[0] in by_path:
            gone = by_path[event.body[0]]
            if args.state != "absent":
                raise CtlError.of(NoSuchGpu, _("{gpu}: it is not on this host any more", gpu=gone.title))
            gone.properties["State"] = "absent"
        if isinstance(event, Signal) and event.path in by_path and event.member == "PropertiesChanged":
            _take(by_path[event.path], event.body)
    return _told(gpus, args)


class _Meanwhile:
    """What GPUs are at while somebody waits for them: the step of each at first, and whom it has to wait for."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._waits = Waits()

    def of(self, gpus: Sequence[Gpu]) -> None:
        for gpu in gpus:
            switch = gpu.properties["Switch"]
            waiting = self._waits.news(gpu, switch)
            if (change := step_under_way(switch)) is None:
                continue
            # Of a wait that does not say how long it is, there is nothing to tell: it is over in a moment, or fails.
            if switch["id"] not in self._seen or (waiting is not None and waiting.until):
                problem(f"{gpu.title}: {at_step(gpu, change, waiting)}")
            self._seen.add(switch["id"])


def _take(gpu: Gpu, body: tuple[Any, ...]) -> None:
    if body[0] == GPU:
        gpu.properties.update(plain_values(body[1]))


def _waited_for(service: Service, selectors: Sequence[str]) -> list[Gpu]:
    """Those GPUs, each by what it is called or by the id of its switch; all of them where none is named. Who names a
    state among them is told how that is done.
    """
    try:
        return list({gpu.path: gpu for gpu in (_of_switch(service, each) for each in selectors)}.values()) or (
            service.gpus()
        )
    except CtlError as error:
        states = [each for each in selectors if each.lower() in STATES]
        if error.name != NoSuchGpu.name or not states:
            raise
        others = [each for each in selectors if each not in states]
        command = " ".join(["gpuswitchctl wait", *others, "--for", states[-1].lower()])
        hint = _("a state is waited for by: {command}", command=command)
        raise CtlError(f"{error}\n{hint}", error.exit_code, name=error.name) from None


def _of_switch(service: Service, selector: str) -> Gpu:
    """The GPU that is called so; else the one whose switch, the one under way or the last, has this id."""
    try:
        return service.gpu(selector)
    except CtlError as error:
        if error.name == NoSuchGpu.name:
            for gpu in service.gpus():
                if gpu.properties["Switch"].get("id") == selector.lower():
                    return gpu
        raise


def _arrived(state: str | None) -> Callable[[Mapping[str, Any]], bool]:
    def arrived(properties: Mapping[str, Any]) -> bool:
        if state is None or properties["State"] == "wedged":
            return properties["State"] not in _MOVING
        return bool(properties["State"] == state)

    return arrived


def _told(gpus: Sequence[Gpu], args: Namespace) -> int:
    for gpu in gpus:
        if args.json:
            as_json_line({"event": "state", **naming(gpu), "now": gpu_record(gpu.properties)})
        else:
            line(_("{gpu} is {state}", gpu=gpu.title, state=state_label(gpu.properties)))
    # One that was waited for is no failure.
    states = {str(gpu.properties["State"]) for gpu in gpus} - {args.state}
    if "wedged" in states:
        return Wedged.exit_code
    return Failed.exit_code if states & _LOST else 0
