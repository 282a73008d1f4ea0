"""The options of a switch, as a stranger on the bus may send them."""

from __future__ import annotations

from collections.abc import Mapping

from gpuswitch.config.schema import LONGEST_WAIT, unit
from gpuswitch.errors import InvalidArgument
from gpuswitch.model.policy import Busy, Options
from gpuswitch.sentence import Sentence

LONGEST_TRIAL = 86400
"""Seconds: a day."""

_KNOWN = ("busy", "wait_seconds", "stop_units")


def options_of(values: Mapping[str, object]) -> Options:
    """`busy` (refuse, wait, terminate, kill), `wait_seconds` (up to a day), `stop_units` (full names).

    Raises:
        InvalidArgument: one is unknown, or has no such value.
    """
    unknown = sorted(set(values) - set(_KNOWN))
    if unknown:
        raise InvalidArgument(
            Sentence(
                "unknown option {option}: there are {known}",
                option=repr(", ".join(unknown)[:80]),
                known=", ".join(_KNOWN),
            )
        )
    return Options(
        _busy(values["busy"]) if "busy" in values else None,
        _seconds(values["wait_seconds"]) if "wait_seconds" in values else None,
        _units(values.get("stop_units", [])),
    )


def access_of(values: Mapping[str, object]) -> tuple[bool, Mapping[str, object]]:
    """What a process that is to have GPUs has besides: `access`, whether its user may open them; and the others.

    Raises:
        InvalidArgument: it is no boolean.
    """
    others = dict(values)
    access = others.pop("access", False)
    if not isinstance(access, bool):
        raise InvalidArgument(Sentence("access must be true or false, not {value}", value=repr(str(access)[:80])))
    return access, others


def trial_seconds(seconds: float) -> float:
    """How long a trial may last: 1 to 86400.

    Raises:
        InvalidArgument: not so long.
    """
    if 1 <= seconds <= LONGEST_TRIAL:
        return seconds
    raise InvalidArgument(f"a trial lasts from 1 to {LONGEST_TRIAL} seconds, not {seconds}")


def _busy(value: object) -> Busy:
    try:
        return Busy(str(value))
    except ValueError:
        raise InvalidArgument(
            Sentence(
                "busy has no value {value}; it is one of {known}", value=repr(str(value)[:80]), known=", ".join(Busy)
            )
        ) from None


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LONGEST_WAIT:
        return float(value)
    raise InvalidArgument(
        Sentence(
            "wait_seconds must be a number of seconds up to {most}, not {value}",
            most=LONGEST_WAIT,
            value=repr(str(value)[:80]),
        )
    )


def _units(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InvalidArgument(Sentence("stop_units must be a list of names"))
    try:
        return tuple(unit(name) for name in value)
    except ValueError as error:
        raise InvalidArgument(f"stop_units: {error}") from None
