"""What a line of the log is about, beside its text: fields that `journalctl` finds it by.

A task says once what it is about, and all that is logged in it says so too, whichever module logs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, copy_context
from typing import Any

from gpuswitch.log.events import LogEvent

FIELDS: Mapping[str, str] = {
    "GPU": "the address of the GPU: `0000:01:00.0`",
    "STATE": "the state that it is in now",
    "SWITCH_ID": "the id of the switch, as `history` lists it",
    "TARGET": "where the switch goes: `host` or `vfio`",
    "STEP": "the kind of the step, as in `[deadlines]`; at the end of a switch, of the one that it ended in",
    "RESULT": "how the switch ended: `done`, `reverted`, `failed`, `cancelled`, `wedged`",
    "REASON": "why, in words",
    "OWNER": "the name of the virtual machine, or the process, that owns the GPU, or its UUID where it has none",
}
"""Each with its meaning. What is not known, or is nothing, is left out."""

_ATTRIBUTE = "gpuswitch_fields"
_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039 -- nobody changes a mapping


def about(**fields: object) -> None:
    """What this task logs from here on, and tasks that it begins, is about this too; "": of that no more."""
    _about.set(_texts({**_about.get(), **fields}))


def about_nothing(work: Callable[[], None]) -> None:
    """Do this, and what it begins, as if this task were about nothing: what it logs says itself what it is about."""
    context = copy_context()
    context.run(_about.set, {})
    context.run(work)


def told(event: LogEvent | None = None, /, **fields: object) -> dict[str, Any]:
    """For `extra` of a logging call: this event, with these fields over those of the task. None or "": it has none."""
    named = {"MESSAGE_ID": event.message_id} if event is not None else {}
    return {_ATTRIBUTE: _texts({**fields, **named})}


def in_one_line(text: str) -> str:
    """What is told in a sentence a line, for a line of the log."""
    return "; ".join(text.splitlines())


def fields_of(record: object) -> Mapping[str, str]:
    """What a record of the log is about, as far as this task and `told` say it."""
    found = {**_about.get(), **getattr(record, _ATTRIBUTE, {})}
    return {name: text for name, text in found.items() if text}


def _texts(fields: Mapping[str, object]) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in fields.items()}
