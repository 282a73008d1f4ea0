"""What the bus shows of a GPU, a switch, a holder, a function: the last three are an `a{sv}` each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.history.archive import Entry, ReturnEntry, StepEntry
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import PciFunction
from gpuswitch.model.holders import Holder
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import Status
from gpuswitch.switch.holder_policy import is_machine, remedy
from gpuswitch.switch.record import Returned, Switch, plans_of
from gpuswitch.switch.steps.step import Step

_VENDORS = {0x10DE: "nvidia", 0x1002: "amd", 0x8086: "intel"}


def model_of(record: GpuRecord) -> str:
    """Maker and model of its display function, from the hardware database; empty where it is not there."""
    display = record.facts.functions.get(record.gpu.address)
    return " ".join(filter(None, (display.maker, display.model))) if display else ""


def vendor_of(record: GpuRecord) -> str:
    """The maker in a word, or by its id; empty where it is not there."""
    display = record.facts.functions.get(record.gpu.address)
    return _VENDORS.get(display.vendor, f"0x{display.vendor:04x}") if display else ""


def switch_values(switch: Switch) -> dict[str, object]:
    return {
        "id": switch.id,
        "target": str(switch.target),
        "plan": switch.plan,
        "index": switch.index,
        "count": switch.count,
        "kind": switch.step_kind,
        "title": switch.step,
        "step_started": _as_kept(switch.step_started),
        "deadline": switch.deadline,
        "waiting_for": switch.waiting_for,
        "waiting_until": _as_kept(switch.waiting_until),
        "started": _as_kept(switch.started),
        "finished": _as_kept(switch.finished or 0.0),
        "result": str(switch.result or ""),
        "reason": switch.reason,
        "error": switch.error,
        "forgone": list(switch.forgone),
        "returned": _returned_values(switch.returned),
        "asker": switch.requester.as_data(),
    }


def _returned_values(returned: Returned | None) -> dict[str, object]:
    if returned is None:
        return {}
    return {"at": _as_kept(returned.at), "state": str(returned.state), "reason": returned.reason}


def _as_kept(seconds: float) -> float:
    """As the history has it later: to the microsecond."""
    return int(seconds * 1e6) / 1e6


def planned_values(step: Step, deadlines: Mapping[str, float]) -> dict[str, object]:
    return {
        "kind": step.kind,
        "title": step.title,
        "deadline": step.deadline(deadlines),
        "stops": list(step.stops),
        "starts": list(step.starts),
        "ends_programs": step.ends_programs,
        "drivers": {str(function): driver for function, driver in step.drivers.items()},
    }


def entry_values(entry: Entry) -> dict[str, object]:
    return {
        "id": entry.id,
        "gpu": entry.gpu,
        "target": entry.target,
        "count": entry.count,
        "started": entry.started / 1e6,
        "finished": entry.finished / 1e6,
        "result": entry.result,
        "reason": entry.reason,
        "options": dict(entry.options),
        "asker": dict(entry.requester),
        "returned": _return_entry_values(entry.returned) if entry.returned else {},
    }


def _return_entry_values(entry: ReturnEntry) -> dict[str, object]:
    return {"at": entry.at / 1e6, "state": entry.state, "reason": entry.reason}


def steps_values(entry: Entry) -> list[dict[str, object]]:
    """Its steps. The last that was interrupted, and all before it, are of runs of the service that ended then."""
    interrupted = [place for place, step in enumerate(entry.steps, 1) if step.status == Status.INTERRUPTED]
    last = max(interrupted, default=0)
    plans = plans_of((step.number, step.status) for step in entry.steps)
    return [
        _step_values(step, plan, before_restart=place <= last)
        for place, (step, plan) in enumerate(zip(entry.steps, plans, strict=True), 1)
    ]


def _step_values(step: StepEntry, plan: int, *, before_restart: bool) -> dict[str, object]:
    return {
        "plan": plan,
        "index": step.number,
        "kind": step.kind,
        "title": step.title,
        "status": step.status,
        "started": step.started / 1e6,
        "seconds": step.usec / 1e6,
        "before_restart": before_restart,
    }


def sentence_values(text: str) -> dict[str, object]:
    """What a sentence is made of: its `template`, and the `data` in its fields, each a text or such values itself."""
    sentence = Sentence.of(text)
    data: dict[str, object] = {
        name: sentence_values(value) if isinstance(value, Sentence) else value for name, value in sentence.data.items()
    }
    return {"template": sentence.template, "data": data}


def holder_values(holder: Holder) -> dict[str, object]:
    freed_by = remedy([holder])
    return {
        "pid": holder.pid,
        "command": holder.command,
        "uid": holder.uid,
        "user": holder.user,
        "unit": holder.unit.name if holder.unit else "",
        "user_unit": holder.unit is not None and holder.unit.user is not None,
        "session": holder.session,
        "nodes": list(holder.nodes),
        "doubt": holder.doubt,
        "machine": is_machine(holder),
        "remedy": freed_by,
        "words": {key: sentence_values(text) for key, text in (("doubt", holder.doubt), ("remedy", freed_by)) if text},
    }


def function_values(function: PciFunction, gpu: PciAddress | None, adds: Sequence[str]) -> dict[str, object]:
    return {
        "group": function.iommu_group or 0,
        "address": str(function.address),
        "kind": str(function.kind),
        "class": function.class_code,
        "vendor": function.vendor,
        "device": function.device,
        "maker": function.maker,
        "model": function.model,
        "driver": function.driver_name or "",
        "gpu": str(gpu or ""),
        "adds": list(adds),
    }
