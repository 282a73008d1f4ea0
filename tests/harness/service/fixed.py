"""A service of fixed answers in the place of the command's own, for what no hardware gives; and the values it has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from jeepney import HeaderFields, MatchRule, Message

from gpuswitch.cli.client import GPU, PROPERTIES, ROOT, Gpu, Options, Service, Signal
from gpuswitch.cli.failures import CtlError
from gpuswitch.errors import EXIT_UNREACHABLE, InvalidArgument, NoSuchGpu
from gpuswitch.sentence import Sentence

CARD = "0000:01:00.0"
A_WHILE = "nothing is told for a while"
"""Among events: whoever waits until a time has waited that long."""


def gpu(**changes: object) -> dict[str, Any]:
    """The properties of a GPU as the bus has them."""
    return {
        "Address": CARD,
        "Name": "",
        "Model": "NVIDIA Corporation GA104",
        "Vendor": "nvidia",
        "Managed": False,
        "State": "host",
        "Driver": "nvidia",
        "HostDriver": "nvidia",
        "Functions": [("0000:01:00.0", "display", "nvidia"), ("0000:01:00.1", "audio", "")],
        "IommuGroups": [13],
        "Adds": [],
        "Owner": ("", ""),
        "Switch": {},
        "Reason": "",
        "StaysOut": False,
        "Remedies": [],
        "AtBoot": "keep",
        "Match": {"vendor": "10de", "device": "2484", "port": "0000:00:01.0"},
        "StateSince": 1_700_000_000.0,
        "TrialEnds": 0.0,
        "StoppedUnits": [],
        **changes,
    }


def remedy(kind: str, template: str, **data: object) -> dict[str, Any]:
    """One of what property Remedies says."""
    sentence = Sentence(template, **data)
    return {"kind": kind, "text": str(sentence), "template": template, "data": dict(sentence.data)}


def switch(**changes: object) -> dict[str, Any]:
    """What property Switch says of one that was done in 5 ms."""
    return {
        "id": "5f",
        "target": "vfio",
        "plan": 1,
        "index": 3,
        "count": 3,
        "kind": "module",
        "title": "load vfio-pci",
        "step_started": 1.0,
        "deadline": 0.0,
        "waiting_for": "",
        "waiting_until": 0.0,
        "started": 1.0,
        "finished": 1.005,
        "result": "done",
        "reason": "",
        "error": "",
        "forgone": [],
        "returned": {},
        "asker": {"service": False, "uid": 4_000_000_000, "pid": os.getpid(), "unit": "", "command": "x", "vm": ""},
        **changes,
    }


def function(address: str, group: int, kind: str, gpu: str = "", driver: str = "") -> dict[str, Any]:
    """A function as `Groups` tells it."""
    return {
        "group": group,
        "address": address,
        "kind": kind,
        "class": 0x030000,
        "vendor": 0x10DE,
        "device": 0x2484,
        "maker": "NVIDIA Corporation",
        "model": "",
        "driver": driver,
        "gpu": gpu,
        "adds": [],
    }


class FixedGpu(Gpu):
    """One that always looks so; `plan` may be the refusal of one, `refused` words that no options may have."""

    def __init__(
        self,
        service: FixedService,
        properties: dict[str, Any],
        holders: Sequence[dict[str, Any]] = (),
        plan: Sequence[dict[str, Any]] | CtlError = (),
        refused: Sequence[str] = (),
    ) -> None:
        path = f"{ROOT}/gpu/" + str(properties["Address"]).replace(":", "_").replace(".", "_")
        super().__init__(cast("Service", service), ":1.1", path, properties)
        self._holders = holders
        self._plan = plan
        self._refused = refused

    def look(self) -> dict[str, Any]:
        return self.properties

    def holders(self) -> list[dict[str, Any]]:
        return list(self._holders)

    def plan(self, _target: str, _options: Options) -> list[dict[str, Any]]:
        if isinstance(self._plan, CtlError):
            raise self._plan
        return list(self._plan)

    def blockers(self, _target: str, options: Options) -> list[dict[str, Any]]:
        return [{}] if any(word in repr(options) for word in self._refused) else []


class FixedService:
    """Its GPUs and what else it knows; a call that begins a switch answers "5f", and then come the events.

    `events` are signals, or a method whose call is answered at that point; then all calls of Wait are; `kept` are
    signals that came before it said how its GPUs are. `outcomes` is
    how each switch ended, by the address of its GPU; `begins` is the error that none is begun with;
    no GPU has one of the `unknown` names.
    """

    def __init__(
        self,
        *gpus: dict[str, Any],
        functions: Iterable[dict[str, Any]] = (),
        warnings: Iterable[str] = (),
        history: Iterable[dict[str, Any]] = (),
        config: Iterable[dict[str, Any]] = (),
        holders: Sequence[dict[str, Any]] = (),
        plan: Sequence[dict[str, Any]] | CtlError = (),
        refused: Sequence[str] = (),
        events: Iterable[Signal | str] = (),
        kept: Iterable[Signal] = (),
        outcomes: Mapping[str, dict[str, Any]] | None = None,
        begins: CtlError | None = None,
        unknown: Sequence[str] = (),
    ) -> None:
        self._gpus = [FixedGpu(self, properties, holders, plan, refused) for properties in gpus]
        self._functions = list(functions)
        self._warnings = list(warnings)
        self._history = list(history)
        self._config = list(config)
        self._events = list(events)
        self._kept = list(kept)
        self._outcomes = outcomes or {}
        self._begins = begins
        self._unknown = unknown
        self._calls: list[Message] = []
        self.asked: list[str] = []
        """The methods that were called, in order."""

    deadline = None

    def gpus(self) -> list[FixedGpu]:
        return self._gpus

    def gpu(self, selector: str) -> FixedGpu:
        if selector in self._unknown:
            raise CtlError.of(NoSuchGpu, f"no GPU is named {selector!r}")
        return self._gpus[0]

    def groups(self) -> list[dict[str, Any]]:
        return self._functions

    def warnings(self) -> list[str]:
        return self._warnings

    def about(self) -> dict[str, Any]:
        """One that is older says nothing of where it reads its configuration."""
        return {}

    def config(self) -> list[dict[str, Any]]:
        return self._config

    def history(self, limit: int) -> list[dict[str, Any]]:
        return self._history[: limit or None]

    def history_entry(self, switch: str) -> dict[str, Any]:
        for each in self._history:
            if each["id"] == switch:
                return each
        raise CtlError.of(InvalidArgument, f"the history knows of no switch {switch!r}")

    def ask(self, _message: Message, _seconds: float | None = None) -> SimpleNamespace:
        """Of others on its bus: there are none."""
        raise CtlError("there is nobody of that name", EXIT_UNREACHABLE)

    def own_pid(self) -> int:
        return os.getpid()

    def owner(self) -> str:
        return ":1.1"

    def subscribe(self, rule: MatchRule) -> None:
        """Its signals come anyway."""

    def unsubscribe(self, rule: MatchRule) -> None:
        """As above."""

    def send(self, message: Message) -> int:
        self._calls.append(message)
        self.asked.append(message.header.fields[HeaderFields.member])
        return len(self._calls)

    def answer_allowed(self, _message: Message, _serial: int) -> SimpleNamespace:
        if self._begins is not None:
            raise self._begins
        return SimpleNamespace(body=("5f",))

    def ask_allowed(self, message: Message) -> SimpleNamespace:
        return self.answer_allowed(message, self.send(message))

    def answer(self, serial: int) -> SimpleNamespace:
        fields = self._calls[serial - 1].header.fields
        [gpu] = [gpu for gpu in self._gpus if gpu.path == fields[HeaderFields.path]]
        if fields[HeaderFields.member] == "GetAll":
            return _values({**gpu.properties, "Switch": _values(gpu.properties["Switch"]).body[0]}, Switch="a{sv}")
        return _values(self._outcomes[gpu.address])

    def next_event(self, deadline: float | None = None) -> Signal | int | None:
        event = self._events.pop(0) if self._events else "Wait"
        if event == A_WHILE and deadline is None:
            return self.next_event()
        if isinstance(event, Signal):
            return event
        if event not in self.asked:
            return None
        serial = self.asked.index(event)
        self.asked[serial] += ", answered"
        return serial + 1

    def take_kept(self, path: str) -> list[Signal]:
        taken = [each for each in self._kept if each.path == path]
        self._kept = [each for each in self._kept if each.path != path]
        return taken

    def end_with_its_reader(self) -> None:
        """Its events come at once."""

    def close(self) -> None:
        """There is no connection."""


def _values(values: Mapping[str, Any], **signatures: str) -> SimpleNamespace:
    """An answer of one `a{sv}`."""
    return SimpleNamespace(body=({key: (signatures.get(key, "v"), value) for key, value in values.items()},))


def fixed(*gpus: dict[str, Any], **knows: Any) -> Service:
    """As the command takes it."""
    return cast("Service", FixedService(*gpus, **knows))


def changed(*, gpu: str = CARD, **properties: object) -> Signal:
    """The signal that tells of new values of properties."""
    path = f"{ROOT}/gpu/" + gpu.replace(":", "_").replace(".", "_")
    return Signal(path, PROPERTIES, "PropertiesChanged", (GPU, {key: ("v", v) for key, v in properties.items()}, []))


def stepped(index: int, count: int, title: str, status: str, seconds: float = 0.0, *, gpu: str = CARD) -> Signal:
    """The signal that tells of a step of switch 5f."""
    path = f"{ROOT}/gpu/" + gpu.replace(":", "_").replace(".", "_")
    return Signal(path, GPU, "StepChanged", ("5f", index, count, "module", title, status, seconds))
