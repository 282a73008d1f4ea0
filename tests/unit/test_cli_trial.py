"""What the countdown of a trial shows, and how it ends, without a service."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, cast

import pytest

from gpuswitch.cli import query as look
from gpuswitch.cli import trial
from gpuswitch.cli.client import Gpu, Service
from gpuswitch.cli.failures import CtlError
from tests.harness.service.fixed import gpu

NOBODY = cast("Service", None)
IT = Gpu(NOBODY, ":1.7", "/org/gpuswitch1/gpu/0000_01_00_0", gpu())


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("seconds", [86400, 1, 0, -5])
def test_it_stays_on_its_line(columns: int, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = trial._words(seconds)
    assert len(shown) < columns
    assert shown.startswith("home in" if seconds > 0 else "home when possible")
    assert "press h for back now, k to keep it" in shown or columns == 40


@pytest.mark.parametrize(
    ("now", "said", "status"),
    [
        (gpu(State="vfio", StaysOut=True, Reason="why"), "cannot bring 0000:01:00.0 home: it is vfio: why", 1),
        (gpu(State="failed", Reason="why"), "cannot bring 0000:01:00.0 home: it is failed: why", 1),
        (gpu(State="wedged", Reason="why"), "cannot bring 0000:01:00.0 home: it is wedged: why", 7),
    ],
)
def test_what_does_not_come_home_is_an_error(now: dict[str, Any], said: str, status: int) -> None:
    with pytest.raises(CtlError) as error:
        trial._ended(now, NOBODY, IT, Namespace(json=False), before=None)
    assert (str(error.value), error.value.exit_code) == (said, status)


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        (("win11", "5b0f"), "0000:01:00.0 stays on vfio: it belongs to win11\n"),
        (("", "5b0f"), "0000:01:00.0 stays on vfio: it belongs to 5b0f\n"),
        (("", ""), "0000:01:00.0 stays on vfio: gpuswitchctl to-host 0000:01:00.0 brings it home\n"),
    ],
)
def test_what_stays_says_whose_it_is(owner: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trial._ended(gpu(State="vfio", Owner=owner), NOBODY, IT, Namespace(json=False), before=None) == 0
    assert capsys.readouterr().out == said


def test_status_says_when_and_how_to_keep_it() -> None:
    shown = dict(look._status_lines(gpu(State="vfio", TrialEnds=1_700_000_000.0)))
    assert shown["trial ends"].endswith("; to keep it on vfio: gpuswitchctl to-vfio 0000:01:00.0")
    assert "trial ends" not in dict(look._status_lines(gpu()))
