"""A full disk under the journal: a switch is refused, taken back or finished; never stuck, and the host never pays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from tests.harness.setups import units
from tests.harness.setups.crash import AWAY, FILLER, Forked, Told, desktop_gpu
from tests.harness.virtual_machines.machine import Machine

SMALL = "mkdir -p /run/gpuswitch; mount -t tmpfs -o size=256k,mode=755 small /run/gpuswitch"


def small_disk(machine: Machine) -> Forked:
    """A service with a small runtime directory."""
    units.stop(machine, "gpuswitchd")
    machine.sh(SMALL)
    return desktop_gpu(machine)


def strained(forked: Forked, method: str) -> Iterator[Told]:
    """What comes of a switch when from its first write on none works, from its second, ..., and at last all do."""
    for number in count(1):
        told = forked.switch(method, f"fail os.rename {number}")
        yield told
        if not told.met:
            return


def assert_in_order(results: list[str]) -> None:
    """Refused, then taken back for as long as the GPU is not where it was to go, then done."""
    refused, *rest = results
    assert refused == ""
    assert rest == ["reverted"] * rest.count("reverted") + ["done"] * rest.count("done")
    assert set(rest) == {"reverted", "done"}


@pytest.mark.campaign
def test_no_write_works_any_more_on_the_way_to_vfio(machine: Machine) -> None:
    """Nothing begins that is not written down; what is to be taken back is, also without."""
    forked = small_disk(machine)
    before = forked.condition()
    results = []
    for told in strained(forked, "ToVfio"):
        results.append(told.result)
        assert told.where == (AWAY if told.result == "done" else forked.home)
        if told.result == "done":
            assert forked.switch("ToHost").where == forked.home
        assert forked.condition() == before
    assert_in_order(results)


@pytest.mark.campaign
def test_no_write_works_any_more_on_the_way_home(machine: Machine) -> None:
    forked = small_disk(machine)
    before = forked.condition()
    assert forked.switch("ToVfio").where == AWAY
    results = []
    for told in strained(forked, "ToHost"):
        results.append(told.result)
        assert told.where == (forked.home if told.result == "done" else AWAY)
        if told.result == "done":
            assert forked.condition() == before
            assert forked.switch("ToVfio").where == AWAY
    assert_in_order(results)
    assert forked.switch("ToHost").where == forked.home
    assert forked.condition() == before


def test_no_room_in_the_runtime_directory(machine: Machine) -> None:
    """None to begin with: refused. None from some write on: what was kept free is enough for the whole switch."""
    forked = small_disk(machine)
    before = forked.condition()
    forked.machine.sh(f"cat /dev/zero >{FILLER}", check=False)
    told = forked.switch("ToVfio")
    assert "cannot write the journal" in told.refused
    assert "No space left on device" in told.refused
    assert told.where == forked.home
    assert forked.condition() == before
    for number in (1, 2, 5):
        for method, where in (("ToVfio", AWAY), ("ToHost", forked.home)):
            forked.machine.sh(f"rm {FILLER}")
            told = forked.switch(method, f"fill os.rename {number}")
            assert told.met > 0
            assert (told.where, told.result) == (where, "done")
        assert forked.condition() == before
    forked.machine.sh(f"rm {FILLER}")
    assert forked.switch("ToVfio").where == AWAY
    assert forked.switch("ToHost").where == forked.home
    assert forked.condition() == before
