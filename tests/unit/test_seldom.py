"""How often it is logged what others bring about."""

from __future__ import annotations

from gpuswitch.runtime.seldom import LINES, SECONDS, Seldom


def test_so_many_in_any_minute_and_no_more() -> None:
    now = 100.0
    seldom = Seldom(lambda: now)
    assert [seldom() for _ in range(LINES + 2)] == [True] * LINES + [False] * 2
    now += SECONDS / 2
    assert not seldom()
    now += SECONDS / 2
    assert [seldom() for _ in range(LINES + 1)] == [True] * LINES + [False]
