"""`gpuswitchctl run --user`: real polkit says who may, and the bus who it is; real limits are what is told of them."""

from __future__ import annotations

import re

import pytest

from gpuswitch.cli.memlock import FILE
from tests.harness.containers.container import Container
from tests.harness.containers.people import KIM, MAX, as_user, move_in
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, prop, simulated, until_state
from tests.real_system.conftest import Boot


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    machine = boot(system.installed, simulated())
    move_in(machine)
    return machine


def test_who_may_open_it_is_who_asked(machine: Container) -> None:
    """Of the group gpuswitch; what he says he is, nobody asks."""
    run = f"gpuswitchctl run --user --yes --gpu {GPU}"
    refused = machine.sh(f"{as_user(KIM)} {run} -- true", check=False)
    assert (refused.status, prop(machine, "State")) == (4, "host")
    said = machine.sh(f"{as_user(MAX)} env USER=root LOGNAME=root {run} -- id -u").stdout.strip()
    until_state(machine, "host")
    log = machine.sh("journalctl --sync; journalctl -u gpuswitchd -o cat").stdout
    assert re.findall(r"uid (\d+) may open ", log) == [said]
    assert re.findall(r"uid (\d+) may not open \S+ any more", log) == [said]
    assert said != "0"


def test_the_remedies_are_some(machine: Container) -> None:
    """A line in that file counts for every session, and for a user's systemd, which cannot give more.

    A container cannot give more than it has itself, so the line gives less.
    """
    machine.push(f"{KIM} - memlock 32\n", FILE)
    machine.sh("loginctl enable-linger kim; until systemctl is-active user@$(id -u kim); do :; done")
    asked = f"systemd-run --user --machine={KIM}@.host --quiet --pipe --wait"
    for given in ("", "-p LimitMEMLOCK=infinity"):
        assert machine.sh(f"{asked} {given} sh -c 'ulimit -l'").stdout == "32\n"
    assert machine.sh(f"su - {KIM} -c 'ulimit -l'").stdout == "32\n"
