"""Who may lock how much memory, and what is said of it before a command has a GPU."""

from __future__ import annotations

import resource

import pytest

from gpuswitch.cli import memlock
from gpuswitch.cli.failures import CtlError

ALL = resource.RLIM_INFINITY
LITTLE, MUCH = 8 << 20, (8 << 20) + 1


@pytest.fixture(autouse=True)
def _not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "_may_lock_all", lambda: False)


def limits(soft: int, hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))


@pytest.mark.parametrize("soft", [MUCH, 1 << 40, ALL])
@pytest.mark.parametrize("user", [True, False])
def test_whoever_was_given_more_knows_what_he_needs(
    soft: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, user: bool
) -> None:
    limits(soft, ALL, monkeypatch)
    memlock.check(user=user, yes=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("size", [0, 64 << 10, LITTLE])
def test_what_everybody_has_is_enough_for_no_machine(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(size, size, monkeypatch)
    with pytest.raises(CtlError, match=f"it may lock {size >> 10} KiB of memory.*sudo prlimit --pid") as raised:
        memlock.check(user=True, yes=False)
    assert raised.value.exit_code == 3


def test_what_the_hard_limit_allows_takes_no_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits(LITTLE, ALL, monkeypatch)
    with pytest.raises(CtlError, match="for this shell: ulimit -l unlimited; or, to run it all the same, add --yes"):
        memlock.check(user=True, yes=False)
    memlock.check(user=False, yes=False)
    assert "unless the command becomes root, it may lock 8192 KiB of memory" in capsys.readouterr().err


def test_a_hard_limit_that_is_more_and_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(LITTLE, 1 << 40, monkeypatch)
    with pytest.raises(CtlError, match="sudo prlimit --pid"):
        memlock.check(user=True, yes=False)


def test_who_has_the_capability_is_counted_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(0, 0, monkeypatch)
    monkeypatch.setattr(memlock, "_may_lock_all", lambda: True)
    memlock.check(user=True, yes=False)
