"""Points in time as people type them: the forms of systemd.time(7) that journalctl --since takes, and RFC 3339."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day

_UNITS = {
    **dict.fromkeys(("ms", "msec"), 0.001),
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
    **dict.fromkeys(("w", "week", "weeks"), 604800.0),
    **dict.fromkeys(("M", "month", "months"), 2629800.0),
    **dict.fromkeys(("y", "year", "years"), 31557600.0),
}
"""Seconds of each: a month has 30.44 days, a year 365.25 (systemd.time(7), "Parsing Time Spans")."""
_SPAN = re.compile(r"(?:\d{1,9}(?:\.\d{1,6})? ?[A-Za-z]+ ?)+")
_PART = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)")
_CLOCK = re.compile(r"\d{1,2}:\d\d(?::\d\d(?:\.\d{1,6})?)?")
_EPOCH = re.compile(r"@(\d{1,11}(?:\.\d{1,6})?)")


def point_in_time(text: str, now: float | None = None) -> float:
    """Seconds since the epoch. A span of time, such as `2h`, is that long ago; without a distance from UTC, a time is
    local; without a day, it is of today. `now` is in seconds since the epoch.

    Raises:
        ValueError: it is none.
    """
    now = time.time() if now is None else now
    words = " ".join(text.split())
    if words == "now":
        return now
    if (days := {"today": 0, "yesterday": 1}.get(words)) is not None:
        return _midnight(now, days)
    if (epoch := _EPOCH.fullmatch(words)) is not None:
        return float(epoch[1])
    span = words.removesuffix(" ago").removeprefix("-")
    if _SPAN.fullmatch(span) is not None:
        return now - _seconds(span)
    if _CLOCK.fullmatch(words) is not None:
        hour, colon, rest = words.partition(":")
        at = time_of_day.fromisoformat(f"{hour:0>2}{colon}{rest}")
        return datetime.combine(datetime.fromtimestamp(now).date(), at).timestamp()  # noqa: DTZ006 -- local, as typed
    return _absolute(words)


def as_seconds(text: str) -> str:
    """A span of time, such as `5m`, as a number of seconds is typed; "" where it is none."""
    span = " ".join(text.split())
    try:
        return f"{_seconds(span):g}" if _SPAN.fullmatch(span) else ""
    except ValueError:  # of a unit that there is not
        return ""


def _midnight(now: float, days: int) -> float:
    day = datetime.fromtimestamp(now).date() - timedelta(days=days)  # noqa: DTZ006 -- local days
    return datetime.combine(day, time_of_day()).timestamp()


def _absolute(words: str) -> float:
    in_utc = words.endswith(" UTC")
    try:
        at = datetime.fromisoformat(words.removesuffix(" UTC"))
        return (at.replace(tzinfo=UTC) if in_utc else at).timestamp()
    except OverflowError:
        raise ValueError(words) from None


def _seconds(span: str) -> float:
    """How long a span is, `1h 30min`.

    Raises:
        ValueError: one of its units is none.
    """
    try:
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(span))
    except KeyError:
        raise ValueError(span) from None
