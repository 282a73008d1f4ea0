"""What the command line says of a switch that is over."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any, cast

import pytest

from gpuswitch.cli import switch as move
from gpuswitch.cli.client import CtlError, Gpu, Service, StepChange
from tests.unit.test_cli import gpu

TO_VFIO = Namespace(json=False, target="vfio")


def outcome(result: str) -> dict[str, Any]:
    return {"result": result, "reason": "because", "count": 3, "started": 0, "finished": 0.005}


def finish(result: str, state: str) -> int:
    """What a switch that ended so ends with, its GPU being in this state."""
    here = cast("Gpu", StandingGpu(state))
    purpose = "move 0000:01:00.0 to vfio"
    return move.finish(outcome(result), here, "0000:01:00.0", TO_VFIO, purpose=purpose, remark="not all went well")


class StandingGpu:
    def __init__(self, state: str) -> None:
        self._state = state

    def properties(self) -> dict[str, Any]:
        return gpu(State=self._state, Driver="xe-vfio-pci")


@pytest.mark.parametrize("result", ["reverted", "failed"])
def test_what_is_left_to_do_about_a_failed_gpu_is_said(result: str) -> None:
    with pytest.raises(CtlError) as error:
        finish(result, "failed")
    assert str(error.value).splitlines()[1:] == [
        "put right what is named here, then: gpuswitchctl recover 0000:01:00.0"
    ]


@pytest.mark.parametrize(("result", "exit_code"), [("reverted", 1), ("failed", 1), ("cancelled", 1), ("wedged", 7)])
def test_a_switch_that_was_not_done_is_an_error(result: str, exit_code: int) -> None:
    with pytest.raises(CtlError) as error:
        finish(result, "vfio")
    assert str(error.value) == f"cannot move 0000:01:00.0 to vfio ({result}): because"
    assert error.value.exit_code == exit_code


class Cancelled:
    """A GPU whose switch ends so, once it is cancelled."""

    def __init__(self, result: str) -> None:
        self.result = result
        self.asked = ""

    def gpu(self, _selector: str) -> Cancelled:
        return self

    def properties(self) -> dict[str, Any]:
        return gpu(Switch={"id": "5f", "target": "vfio"})

    def cancel(self, switch: str) -> None:
        self.asked = switch

    def follow(self, switch: str, _seconds: float | None) -> list[object]:
        assert self.asked == switch
        return [StepChange(2, 3, "module", "load vfio-pci", "reverted", 0.005), outcome(self.result)]


def test_cancelled_is_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert move.cancel(cast("Service", Cancelled("cancelled")), Namespace(json=False, gpu="", timeout=None)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[2/3] load vfio-pci: reverted (5.0 ms)",
        "switch 5f of 0000:01:00.0 to vfio is cancelled: all is as before",
    ]


@pytest.mark.parametrize(("result", "exit_code"), [("done", 1), ("reverted", 1), ("failed", 1), ("wedged", 7)])
def test_a_switch_that_was_to_be_cancelled_and_was_not_is_an_error(
    result: str, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CtlError) as error:
        move.cancel(cast("Service", Cancelled(result)), Namespace(json=True, gpu="", timeout=None))
    assert str(error.value) == f"cannot cancel switch 5f: it is {result}: because"
    assert error.value.exit_code == exit_code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["result"] == result


def test_a_switch_that_was_done_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish("done", "vfio") == 0
    out, err = capsys.readouterr()
    assert out == "0000:01:00.0 is on xe-vfio-pci now, after 5.0 ms\n"
    assert err == "gpuswitchctl: not all went well: because\n"


class Recovering:
    """A GPU whose recovery ends so."""

    def __init__(self, **ends: object) -> None:
        self._ends = outcome("done") | {"target": "host"} | ends

    def gpu(self, _selector: str) -> Recovering:
        return self

    def properties(self) -> dict[str, Any]:
        return gpu(Driver="vfio-pci")

    def recover(self) -> str:
        return "5f"

    def follow(self, switch: str, _seconds: float | None) -> list[object]:
        assert switch == "5f"
        return [StepChange(1, 3, "reset", "reset 0000:01:00.0", "done", 0.005), self._ends]


def recovered(*, no_wait: bool = False, **ends: object) -> int:
    """What `recover` ends with."""
    args = Namespace(json=False, gpu="", timeout=None, no_wait=no_wait, target="host")
    return move.recover(cast("Service", Recovering(**ends)), args)


def test_recovered_is_home_and_what_was_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert recovered() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "[1/3] reset 0000:01:00.0: done (5.0 ms)",
        "0000:01:00.0 is on the host now, after 5.0 ms",
    ]
    assert err == "gpuswitchctl: it has recovered from this: because\n"
    assert recovered(no_wait=True) == 0
    assert capsys.readouterr().out == "5f\n"


def test_one_that_needs_no_recovery_stays_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert recovered(target="vfio", count=0, reason="") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0000:01:00.0 is on vfio-pci already"


@pytest.mark.parametrize(("result", "exit_code"), [("reverted", 1), ("failed", 1), ("cancelled", 1), ("wedged", 7)])
def test_a_recovery_that_ends_anywhere_but_home_is_an_error(result: str, exit_code: int) -> None:
    with pytest.raises(CtlError) as error:
        recovered(result=result)
    assert str(error.value) == f"cannot recover 0000:01:00.0 ({result}): because"
    assert error.value.exit_code == exit_code
