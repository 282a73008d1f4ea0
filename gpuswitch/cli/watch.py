"""The verbs that follow what happens: `watch`, until it is ended, and `wait`, until GPUs are where they shall be."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from jeepney import MatchRule

from gpuswitch.cli.client import GPU, NAME, OBJECTS, Gpu, Service, Signal, gpus_named, plain_values, signals_of
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import StepChange, Waiting, at_work
from gpuswitch.cli.output import as_json_line, clock, duration, line, numbered, rfc3339
from gpuswitch.cli.records import gpu_record, state_label
from gpuswitch.errors import EXIT_UNREACHABLE, Failed, Timeout, Wedged

_BUS = "org.freedesktop.DBus"
_MOVING = frozenset({"detaching", "reattaching", "recovering"})
_LOST = frozenset({"failed", "wedged", "unknown", "absent"})


def watch(service: Service, args: Namespace) -> int:
    """Tell each event; a service that ends or starts again is one of them."""
    service.subscribe(_name_owner())
    watched = _Watched(service, args.gpus, as_json=args.json)
    watched.begin()
    while True:
        event = service.next_event()
        if isinstance(event, Signal):
            watched.take(event)


class _Watched:
    """The GPUs that somebody watches, as far as they were heard of."""

    def __init__(self, service: Service, selectors: Sequence[str], *, as_json: bool) -> None:
        self._service = service
        self._selectors = selectors
        self._as_json = as_json
        self._owner = ""
        """The process of the service that they are from; "": none."""
        self._gpus: dict[str, Gpu] = {}
        self._waiting: dict[str, str] = {}

    def begin(self) -> None:
        """Subscribe to all that the service tells from here on, and say how its GPUs are."""
        self._owner = self._service.owner()
        self._service.subscribe(signals_of(self._owner))
        for gpu in gpus_named(self._service, self._selectors):
            self._add(gpu)

    def take(self, event: Signal) -> None:
        if event.interface == _BUS:
            self._owner_changed(*event.body)
        elif event.interface == OBJECTS:
            self._objects_changed(event)
        elif (gpu := self._gpus.get(event.path)) is None:
            return
        elif event.member == "StepChanged":
            self._stepped(gpu, event.body[0], StepChange(*event.body[1:]))
        elif event.member == "SwitchFinished":
            self._finished(gpu, *event.body)
        elif event.member == "PropertiesChanged" and event.body[0] == GPU:
            self._changed(gpu, plain_values(event.body[1]))

    def _add(self, gpu: Gpu) -> None:
        self._gpus[gpu.path] = gpu
        self._state(gpu)

    def _owner_changed(self, _: str, before: str, now: str) -> None:
        if before and before == self._owner:
            self._owner = ""
            self._gpus.clear()
            self._waiting.clear()
            self._tell("service", "the service has ended; it is waited for", running=False)
            self._service.unsubscribe(signals_of(before))
        # The one that answers already, which our own call may have started, needs no second beginning.
        if now and now != self._owner:
            self._tell("service", "the service is there", running=True)
            try:
                self.begin()
            except CtlError as error:
                # It has ended again, or knows none of these any more.
                self._tell("service", str(error), running=error.exit_code != EXIT_UNREACHABLE)

    def _objects_changed(self, event: Signal) -> None:
        """A GPU came to the host, or left it: of those that are named, only their end is told."""
        path, interfaces = event.body
        if event.member == "InterfacesRemoved" and path in self._gpus:
            address = self._gpus.pop(path).address
            self._tell("gone", f"{address}: it is not on this host any more", gpu=address)
        elif event.member == "InterfacesAdded" and GPU in interfaces and path not in self._gpus and not self._selectors:
            with suppress(CtlError):  # it has left again
                self._add(Gpu(self._service, self._owner, path))

    def _changed(self, gpu: Gpu, changed: Mapping[str, Any]) -> None:
        before = dict(gpu.properties)
        gpu.properties.update(changed)
        if any(before[name] != gpu.properties[name] for name in ("State", "Driver", "Owner", "Reason")):
            self._state(gpu)
        switch = gpu.properties["Switch"]
        what = switch.get("waiting_for", "")
        if what and switch["waiting_until"] and self._waiting.get(gpu.path) != what:
            self._waits(gpu, switch["id"], Waiting(what, switch["step_started"], switch["waiting_until"]))
        self._waiting[gpu.path] = what

    def _state(self, gpu: Gpu) -> None:
        known = gpu.properties
        words = [state_label(known)]
        if any(known["Owner"]):
            words.append(f"owned by {known['Owner'][0] or known['Owner'][1]}")
        if known["Reason"]:
            words.append("; ".join(known["Reason"].splitlines()))
        self._tell("state", f"{gpu.address}: {', '.join(words)}", gpu=gpu.address, now=gpu_record(known))

    def _stepped(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        took = "" if at_work(change) else f" ({duration(change.seconds)})"
        text = f"{gpu.address}: {numbered(change.index, change.count, change.title)}: {change.status}{took}"
        if self._as_json or not at_work(change):
            self._tell("step", text, gpu=gpu.address, id=switch, **change._asdict())

    def _waits(self, gpu: Gpu, switch: str, waiting: Waiting) -> None:
        text = f"{gpu.address}: waiting until {clock(waiting.until)}: {waiting.what}"
        times = {"since": rfc3339(waiting.since), "until": rfc3339(waiting.until)}
        self._tell("waiting", text, gpu=gpu.address, id=switch, **{"for": waiting.what}, **times)

    def _finished(self, gpu: Gpu, switch: str, result: str, reason: str) -> None:
        text = f"{gpu.address}: switch {switch} is {result}"
        text += f": {'; '.join(reason.splitlines())}" if reason else ""
        self._tell("finished", text, gpu=gpu.address, id=switch, result=result, reason=reason)

    def _tell(self, event: str, text: str, **data: object) -> None:
        now = time.time()
        if self._as_json:
            as_json_line({"event": event, "at": rfc3339(now), **data})
        else:
            line(f"{clock(now)}  {text}")


def wait(service: Service, args: Namespace) -> int:
    """Until no switch of these GPUs is under way; with a state, until all of them are there, or wedged.

    Raises:
        CtlError: the time is over, or the service has gone.
    """
    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    service.subscribe(_name_owner())
    owner = service.owner()
    service.subscribe(signals_of(owner))
    gpus = gpus_named(service, args.gpus)
    by_path = {gpu.path: gpu for gpu in gpus}
    arrived = _arrived(args.state)
    while waiting := [gpu for gpu in gpus if not arrived(gpu.properties)]:
        event = service.next_event(deadline)
        if event is None:
            named = " and ".join(f"{gpu.address} ({gpu.properties['State']})" for gpu in waiting)
            where = f"on {args.state}" if args.state else "at rest"
            raise CtlError.of(Timeout, f"not {where} within {args.timeout:g} s: {named}")
        if isinstance(event, Signal) and event.interface == _BUS and event.body[1] == owner:
            raise CtlError("the service went away; it may have been restarted", EXIT_UNREACHABLE, name="Unreachable")
        if isinstance(event, Signal) and event.path in by_path and event.member == "PropertiesChanged":
            by_path[event.path].properties.update(plain_values(event.body[1]))
    return _told(gpus, args)


def _arrived(state: str | None) -> Callable[[Mapping[str, Any]], bool]:
    def arrived(properties: Mapping[str, Any]) -> bool:
        if state is None or properties["State"] == "wedged":
            return properties["State"] not in _MOVING
        return bool(properties["State"] == state)

    return arrived


def _told(gpus: Sequence[Gpu], args: Namespace) -> int:
    for gpu in gpus:
        if args.json:
            as_json_line({"event": "state", "gpu": gpu.address, "now": gpu_record(gpu.properties)})
        else:
            line(f"{gpu.address} is {state_label(gpu.properties)}")
    states = {str(gpu.properties["State"]) for gpu in gpus}
    if "wedged" in states:
        return Wedged.exit_code
    return Failed.exit_code if states & _LOST else 0


def _name_owner() -> MatchRule:
    rule = MatchRule(type="signal", sender=_BUS, interface=_BUS, member="NameOwnerChanged")
    rule.add_arg_condition(0, NAME)
    return rule
