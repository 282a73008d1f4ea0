"""Tells the log what happens to GPUs: each state once, how each switch ended, who else moved one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.log import events
from gpuswitch.log.events import LogEvent
from gpuswitch.log.fields import in_one_line, told
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import Drift, Result, Switch

_log = logging.getLogger("gpuswitch")
_ENDS: Mapping[Result | None, LogEvent] = {
    Result.DONE: events.SWITCH_DONE,
    Result.REVERTED: events.SWITCH_REVERTED,
    Result.FAILED: events.SWITCH_FAILED,
    Result.CANCELLED: events.SWITCH_CANCELLED,
    Result.WEDGED: events.SWITCH_WEDGED,
}


class LogObserver:
    """Writes a line for what has changed, and none for a look that shows the same. An `Observer`."""

    def __init__(self) -> None:
        self._said: dict[PciAddress, tuple[str, str]] = {}
        """The state of each, and why, as the log has it."""

    def appeared(self, actor: Actor) -> None:
        self.changed(actor.record)

    def vanished(self, actor: Actor) -> None:
        self._said.pop(actor.gpu.address, None)
        _log.info("%s: belongs to another GPU now", actor.gpu.address, extra=told(GPU=actor.gpu.address))

    def changed(self, record: GpuRecord) -> None:
        gpu, now = record.gpu.address, (str(record.state), record.reason)
        if self._said.get(gpu) == now:
            return
        self._said[gpu] = now
        why = f" ({in_one_line(record.reason)})" if record.reason else ""
        extra = told(events.STATE, **_of(record), **_of_switch(record.switch), REASON=record.reason)
        _log.info("%s: %s%s", gpu, record.state, why, extra=extra)

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        extra = told(**_of(record), **_of_switch(switch))
        _log.debug("%s: switch %s: %s: %s", record.gpu.address, switch.id, event.step.title, event.status, extra=extra)

    def waits(self, record: GpuRecord) -> None:
        """Nothing to say: what came of it is told when the step ends."""

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        why = f" ({in_one_line(switch.reason)})" if switch.reason else ""
        step = switch.step_kind if switch.result is not Result.DONE else ""
        own = {"SWITCH_ID": switch.id, "TARGET": switch.target, "RESULT": switch.result, "STEP": step}
        extra = told(_ENDS[switch.result], **_of(record), **own, REASON=switch.reason)
        _log.info(
            "%s: switch %s to %s: %s%s", record.gpu.address, switch.id, switch.target, switch.result, why, extra=extra
        )

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        extra = told(**_of(record), SWITCH_ID=switch.id, TARGET=switch.target)
        _log.info(
            "%s: the kernel has returned from switch %s: %s", record.gpu.address, switch.id, record.state, extra=extra
        )

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        extra = told(events.DRIFT, **_of(record), REASON=drift.text)
        _log.warning("%s: changed by somebody else: %s", record.gpu.address, drift.text, extra=extra)

    def recovered(self, record: GpuRecord) -> None:
        extra = told(events.RECOVERED, **_of(record), REASON=record.reason)
        _log.info("%s: recovery is over: %s", record.gpu.address, record.state, extra=extra)


def _of(record: GpuRecord) -> dict[str, object]:
    owner = record.owner
    return {"GPU": record.gpu.address, "STATE": record.state, "OWNER": owner and owner.label}


def _of_switch(switch: Switch | None) -> dict[str, object]:
    """Of the one that is under way."""
    if switch is None or switch.result is not None:
        return {}
    return {"SWITCH_ID": switch.id, "TARGET": switch.target, "STEP": switch.step_kind}
