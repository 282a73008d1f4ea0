"""Points in time, as people type them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from gpuswitch.cli.main import main
from gpuswitch.cli.times import point_in_time

NOW = 1795000000.0
"""2026-11-18 11:06:40 UTC; an hour more in Berlin."""
DAY = 86400.0


@pytest.fixture(autouse=True)
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From October to March one hour before UTC, in summer two."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


MIDNIGHT = 1794956400.0
"""2026-11-18 00:00:00+01:00"""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("now", NOW),
        ("today", MIDNIGHT),
        ("yesterday", MIDNIGHT - DAY),
        ("2h ago", NOW - 7200),
        ("2h", NOW - 7200),
        ("-2h", NOW - 7200),
        ("2 hours  ago", NOW - 7200),
        ("1d 30min ago", NOW - DAY - 1800),
        ("1h30m", NOW - 5400),
        ("0.5 day", NOW - DAY / 2),
        ("5m", NOW - 300),
        ("1M ago", NOW - 2629800),
        ("1w", NOW - 7 * DAY),
        ("@1795000000", NOW),
        ("09:05", MIDNIGHT + 9 * 3600 + 300),
        ("9:05:07", MIDNIGHT + 9 * 3600 + 307),
        ("2026-11-18", MIDNIGHT),
        ("2026-11-18 12:06", NOW - 40),
        ("2026-11-18 12:06:40", NOW),
        ("2026-11-18 12:06:40+01:00", NOW),
        ("2026-11-18 11:06:40 UTC", NOW),
        ("2026-11-18T11:06:40Z", NOW),
        ("2026-11-18T11:06:40.5Z", NOW + 0.5),
        # in summer
        ("2026-07-01 02:00", 1782864000.0),
    ],
)
def test_a_time_is_understood(text: str, seconds: float) -> None:
    assert point_in_time(text, NOW) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "soon", "5", "2 fortnights ago", "25:00", "2026-13-01", "2026-11-18 25:00", "tomorrow ago", "@x", "-", "1h x"],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- the sentence is the parser's
        point_in_time(text, NOW)


def test_years_that_no_clock_has_are_refused() -> None:
    """Before the first one that a distance from UTC leaves room for."""
    with pytest.raises(ValueError):  # noqa: PT011 -- as above
        point_in_time("0001-01-01", NOW)


@pytest.mark.parametrize("option", ["--since", "--until"])
def test_the_command_says_how_to_write_it(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", option, "last week"]) == 2
    sentence = "'last week' is not a time; write it like '2h ago', yesterday, 20:00, '2026-11-29 20:00', 2026-11-29T"
    assert f"argument {option}: {sentence}" in " ".join(capsys.readouterr().err.split())
