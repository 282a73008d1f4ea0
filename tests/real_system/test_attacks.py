"""The service under attack by users without rights, on a real bus with its limits: it answers, and stays as it is.

How fast it answers meanwhile, and how much memory it takes: `make bench`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.harness.containers.attacks import attack, bystander, memory
from tests.harness.containers.container import Container
from tests.harness.containers.people import INA, KIM, NOBODY, move_in
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, prop, show, simulated, until
from tests.real_system.conftest import Boot

GROWTH = 10 << 20
"""Bytes that it may take more than before."""


@pytest.fixture
def machine(boot: Boot, system: System) -> Iterator[Container]:
    """One whose service is the same before and after, and has switched a GPU there and back meanwhile."""
    machine = boot(system.installed, simulated())
    move_in(machine)
    machine.sh(f"gpuswitchctl to-vfio {GPU}; gpuswitchctl to-host {GPU}")
    before = show(machine, "MainPID"), memory(machine)
    yield machine
    machine.sh(f"gpuswitchctl to-vfio {GPU}; gpuswitchctl to-host {GPU}")
    assert (show(machine, "MainPID"), show(machine, "NRestarts")) == (before[0], "0")
    assert memory(machine) - before[1] < GROWTH
    told = json.loads(machine.sh("gpuswitchctl history --json").stdout)
    results = [each["result"] for each in told["switches"]]
    assert results == ["done"] * len(results)
    assert "Traceback" not in machine.sh("journalctl -u gpuswitchd --output=cat").stdout


def test_messages_of_every_kind(machine: Container) -> None:
    """100,000: most are such as the bus passes on, the others not, or they have no end, or are megabytes long."""
    attackers = [attack(machine, name, "messages", 50_000, seed) for seed, name in enumerate((NOBODY, KIM))]
    for each in attackers:
        done = each.end()
        assert done["odd"] + done["broken"] + done["large"] == 50_000
        assert done["odd"] > 30_000
    assert prop(machine, "State") == "host"


@pytest.mark.parametrize(("what", "count"), [("flood", 40), ("one_by_one", 200), ("deaf", 200), ("half_open", 25)])
def test_who_looks_and_who_switches_is_served_meanwhile(machine: Container, what: str, count: int) -> None:
    """Of those that have not said who they are, dbus-daemon has 64 at most, and lets nobody else in then."""
    other = bystander(machine)
    attackers = [attack(machine, name, what, count, seed) for seed, name in enumerate((NOBODY, INA))]
    for each in attackers:
        each.until_there()
    for each in attackers:
        each.begin()
    seen = other.end()
    assert seen["calls"] >= 100
    assert seen["switches"] >= 2
    for each in attackers:
        each.end()
    until(machine, f"gpuswitchctl status {GPU}")


@pytest.mark.parametrize("what", ["names", "leave"])
def test_names_that_change_hands_and_callers_that_leave(machine: Container, what: str) -> None:
    done = attack(machine, NOBODY, what, 1500, 1).end()
    assert sum(done.values()) > 500
    assert prop(machine, "State") == "host"
