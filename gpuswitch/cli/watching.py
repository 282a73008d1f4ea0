"""Follows all that the service tells of GPUs, over its ends and starts, for as long as somebody listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from jeepney import MatchRule

from gpuswitch.cli.client import GPU, NAME, OBJECTS, Gpu, Service, Signal, gpus_named, plain_values, signals_of
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import Lasting, Plans, StepChange, Waiting, Waits, step_under_way
from gpuswitch.cli.translate import _
from gpuswitch.errors import EXIT_UNREACHABLE

BUS = "org.freedesktop.DBus"
_SHOWN = ("State", "Driver", "Owner", "Reason")


class Teller(Protocol):
    """Who hears of what happens, in its order. `state`: how a GPU is, at first and whenever that is another.
    `under_way`: the step that it was at when it was first heard of, and what that waits for. `lasts`: one that has
    begun since takes its time, told once. `gone`: it has left the host.
    """

    def service(self, text: str, *, running: bool) -> None: ...
    def state(self, gpu: Gpu) -> None: ...
    def under_way(self, gpu: Gpu, change: StepChange, waiting: Waiting | None) -> None: ...
    def lasts(self, gpu: Gpu, switch: str, change: StepChange) -> None: ...
    def gone(self, gpu: Gpu) -> None: ...
    def step(self, gpu: Gpu, switch: str, change: StepChange) -> None: ...
    def waits(self, gpu: Gpu, switch: str, waiting: Waiting) -> None: ...
    def finished(self, gpu: Gpu, switch: str, result: str, reason: str) -> None: ...


class Watching:
    """Some GPUs, all where none is named, as far as they were heard of."""

    def __init__(self, service: Service, selectors: Sequence[str], teller: Teller) -> None:
        self._service = service
        self._selectors = selectors
        self._teller = teller
        self._owner = ""
        """The process of the service that they are from; "": none."""
        self._gpus: dict[str, Gpu] = {}
        self._told = Waits()
        self._plans = Plans()
        self._lasting = Lasting()
        self._cut_off: dict[str, str] = {}
        """The switches, by the paths of their GPUs, that were under way when the service ended."""
        self._ended: set[str] = set()
        """Those of them whose end was told by the history: a signal may be on its way."""

    def for_ever(self) -> None:
        """Until the bus is lost.

        Raises:
            CtlError: it is; or the service cannot be asked, at first.
        """
        self._service.subscribe(name_owner())
        self._begin()
        while True:
            event = self._service.next_event(when := self._lasting.first)
            if isinstance(event, Signal):
                self._take(event)
            elif event is None and when is not None:
                for path, switch, change in self._lasting.until(when):
                    self._teller.lasts(self._gpus[path], switch, change)

    def _begin(self) -> None:
        """Subscribe to all that the service tells from here on, and say how its GPUs are."""
        self._owner = self._service.owner()
        self._service.subscribe(signals_of(self._owner))
        found = [(gpu, self._looked_at(gpu)) for gpu in gpus_named(self._service, self._selectors)]
        for gpu, earlier in found:
            self._add(gpu, earlier)

    def _looked_at(self, gpu: Gpu) -> list[Signal]:
        """What was told of it before how it is. Of what changed that is the older word; the others are news."""
        _known = gpu.properties  # asked for now, where it was only named
        return [each for each in self._service.take_kept(gpu.path) if each.member != "PropertiesChanged"]

    def _add(self, gpu: Gpu, earlier: Sequence[Signal]) -> None:
        """Tell in its order what happened."""
        self._gpus[gpu.path] = gpu
        over = max((place for place, each in enumerate(earlier, 1) if each.member == "SwitchFinished"), default=0)
        self._tell_how_it_ended(gpu)
        for event in earlier[:over]:
            self._take(event)
        self._teller.state(gpu)
        for event in earlier[over:]:
            self._take(event)
        switch = gpu.properties["Switch"]
        self._plans.heard(gpu, switch)
        if (change := step_under_way(switch)) is not None:
            self._lasting.told(gpu)
            self._teller.under_way(gpu, change, self._told.news(gpu, switch))

    def _tell_how_it_ended(self, gpu: Gpu) -> None:
        """The switch that the service ended in: the next one may have brought it to its end before we heard of that."""
        if (switch := self._cut_off.pop(gpu.path, None)) is None:
            return
        with suppress(CtlError):  # it is not over: that will be told
            entry = self._service.history_entry(switch)
            self._ended.add(switch)
            self._teller.finished(gpu, switch, entry["result"], entry["reason"])

    def _take(self, event: Signal) -> None:
        if event.interface == BUS:
            self._owner_changed(*event.body)
        elif event.interface == OBJECTS:
            self._objects_changed(event)
        elif (gpu := self._gpus.get(event.path)) is None:
            return
        elif event.member == "StepChanged":
            change = self._plans.of(gpu, event.body[0], StepChange(*event.body[1:]))
            self._lasting.heard(gpu, event.body[0], change)
            self._teller.step(gpu, event.body[0], change)
        elif event.member == "SwitchFinished" and event.body[0] not in self._ended:
            self._lasting.told(gpu)
            self._teller.finished(gpu, *event.body)
        elif event.member == "PropertiesChanged" and event.body[0] == GPU:
            self._changed(gpu, plain_values(event.body[1]))

    def _owner_changed(self, _name: str, before: str, now: str) -> None:
        if before and before == self._owner:
            self._owner = ""
            self._cut_off |= {
                path: switch["id"]
                for path, gpu in self._gpus.items()
                if (switch := gpu.properties["Switch"]) and not switch["result"]
            }
            self._gpus.clear()
            self._told.clear()
            self._lasting.clear()
            self._teller.service(_("the service has ended"), running=False)
            self._service.unsubscribe(signals_of(before))
        # The one that answers already, which our own call may have started, needs no second beginning.
        if now and now != self._owner:
            self._teller.service(_("the service is there"), running=True)
            try:
                self._begin()
            except CtlError as error:
                # It has ended again, or knows none of these any more.
                self._teller.service(str(error), running=error.exit_code != EXIT_UNREACHABLE)

    def _objects_changed(self, event: Signal) -> None:
        """A GPU came to the host, or left it: of those that are named, only their end is told."""
        path, interfaces = event.body
        if event.member == "InterfacesRemoved" and path in self._gpus:
            gone = self._gpus.pop(path)
            self._lasting.told(gone)
            self._teller.gone(gone)
        elif event.member == "InterfacesAdded" and GPU in interfaces and path not in self._gpus and not self._selectors:
            with suppress(CtlError):  # it has left again
                gpu = Gpu(self._service, self._owner, path)
                self._add(gpu, self._looked_at(gpu))

    def _changed(self, gpu: Gpu, changed: Mapping[str, Any]) -> None:
        before = [gpu.properties[name] for name in _SHOWN]
        gpu.properties.update(changed)
        if before != [gpu.properties[name] for name in _SHOWN]:
            self._teller.state(gpu)
        switch = gpu.properties["Switch"]
        self._plans.heard(gpu, switch)
        # What does not say how long it is waited for is there in a moment, or fails.
        if (waiting := self._told.news(gpu, switch)) is not None and waiting.until:
            self._lasting.told(gpu)
            self._teller.waits(gpu, switch["id"], waiting)


def name_owner() -> MatchRule:
    """Tells when the service ends and starts."""
    rule = MatchRule(type="signal", sender=BUS, interface=BUS, member="NameOwnerChanged")
    rule.add_arg_condition(0, NAME)
    return rule
