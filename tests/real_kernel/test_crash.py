"""SIGKILL at every write of the journal: whatever had been done by then, the next start finds it, and puts it right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from tests.harness.setups.crash import AWAY, Forked, Told, desktop_gpu, last_nvidia_gpu
from tests.harness.virtual_machines.machine import Machine


def assert_home(forked: Forked, first: Told, before: str) -> None:
    """As the service tells when it has just started, the GPU is on its drivers; all around it comes back by itself."""
    assert first.drivers == forked.home[1]
    # It is on its way as long as a unit starts that it is owed, which no service waits for before it is ready.
    assert first.state == ("reattaching" if first.moving else "host")
    assert first.moving == "" or (first.moving == "host" and first.restore_state)
    assert forked.switch("ToHost").where == forked.home
    assert forked.condition() == before


@pytest.mark.campaign
@pytest.mark.parametrize("make", [desktop_gpu, last_nvidia_gpu])
def test_killed_at_every_write(machine: Machine, make: Callable[[Machine], Forked]) -> None:
    """Of a GPU of a desktop, and of one that has its driver's modules to itself."""
    forked = make(machine)
    before = forked.condition()
    killed_on_both_ways(forked, before)

    # A switch that went through: a virtual machine may have the GPU by now, and there it stays, whoever dies.
    assert forked.switch("ToVfio").where == AWAY
    assert forked.kill().killed
    assert forked.start().where == AWAY

    killed_as_the_journal_goes(forked, before)
    killed_over_and_over_while_it_comes_home(forked, before)
    assert forked.switch("ToVfio").where == AWAY


@pytest.mark.smoke
def test_killed_at_three_writes(machine: Machine) -> None:
    """As the switch begins, in the middle of it, and on the way home: a few of those above."""
    forked = desktop_gpu(machine)
    before = forked.condition()
    for number in (1, 6):
        assert forked.switch("ToVfio", f"kill os.rename {number}").killed
        assert_home(forked, forked.start(), before)
    assert forked.switch("ToVfio").where == AWAY
    assert forked.switch("ToHost", "kill os.rename 6").killed
    assert_home(forked, forked.start(), before)


def killed_on_both_ways(forked: Forked, before: str) -> None:
    for number in count(1):
        there = forked.switch("ToVfio", f"kill os.rename {number}")
        if there.killed:
            assert_home(forked, forked.start(), before)
            assert forked.switch("ToVfio").where == AWAY
        back = forked.switch("ToHost", f"kill os.rename {number}")
        if back.killed:
            first = forked.start()
            # Before the first write nothing had begun, and nothing says that it was to.
            assert (first.where == AWAY) is (number == 1)
            assert_home(forked, first if number > 1 else forked.switch("ToHost"), before)
        if not (there.killed or back.killed):
            assert number > 1
            assert (there.result, there.where) == ("done", AWAY)
            assert (back.result, back.where) == ("done", forked.home)
            return


def killed_as_the_journal_goes(forked: Forked, before: str) -> None:
    """At the end of the way to the host nothing is owed any more."""
    for number in count(1):
        back = forked.switch("ToHost", f"kill os.remove {number}")
        if not back.killed:
            assert number > 1
            assert back.where == forked.home
            return
        assert_home(forked, forked.start(), before)
        assert forked.switch("ToVfio").where == AWAY


def killed_over_and_over_while_it_comes_home(forked: Forked, before: str) -> None:
    """In the middle of a switch, then at the first write of the start that follows, at the second of the next, ..."""
    assert forked.switch("ToVfio", "kill os.rename 9").killed
    for number in count(1):
        first = forked.start(f"kill os.rename {number}")
        if not first.killed:
            assert number > 1
            assert_home(forked, first, before)
            return
