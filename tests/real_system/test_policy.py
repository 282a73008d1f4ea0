"""Who may call what: the policy of a real system bus, for each method that the service shows.

A method that is new is closed to everybody but root until it is named here and in units/org.gpuswitch1.conf.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    AS_NOBODY,
    GPU,
    INSIDE,
    NAME,
    PYTHON,
    ROOT,
    call,
    path_of,
    prop,
    simulated,
    start_switch,
    until_state,
)
from tests.real_system.conftest import Boot

FREEDESKTOP = "org.freedesktop.DBus"
STANDARD = ("Introspectable.Introspect", "ObjectManager.GetManagedObjects", "Peer.GetMachineId", "Peer.Ping")
OPEN = {
    *(f"{FREEDESKTOP}.{member}" for member in (*STANDARD, "Properties.Get", "Properties.GetAll")),
    *(f"{NAME}.Manager.{member}" for member in ("Config", "GetGpu", "Groups", "History", "HistoryEntry", "Warnings")),
    *(f"{NAME}.Gpu.{member}" for member in ("Holders", "Plan", "Wait")),
}
"""What anyone may call, to look."""
CLOSED = {
    f"{FREEDESKTOP}.Properties.Set",
    *(f"{NAME}.Manager.{member}" for member in ("AcquireForVm", "AdoptVm", "ReleaseFromVm", "Reload")),
    *(f"{NAME}.Gpu.{member}" for member in ("Cancel", "Recover", "ToHost", "ToVfio")),
}
"""What root may call and nobody else."""
REFUSED = f"{FREEDESKTOP}.Error.AccessDenied"


class Call(NamedTuple):
    """With an argument that no method takes; `interface` may be empty."""

    destination: str
    path: str
    interface: str
    member: str


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    return boot(system.installed, simulated())


def methods(machine: Container) -> dict[str, str]:
    """All that the service shows: each method, and the path of an object that has it."""
    found = {}
    for path in (ROOT, path_of()):
        [text] = call(machine, path, f"{FREEDESKTOP}.Introspectable.Introspect")
        for interface in ET.fromstring(text).iterfind("interface"):  # noqa: S314 -- our own service wrote it
            for method in interface.iterfind("method"):
                found[f"{interface.attrib['name']}.{method.attrib['name']}"] = path
    return found


def answers(machine: Container, calls: Iterable[Call], *, user: str = "") -> list[str]:
    """The error that each call is answered with, by root or who else makes it."""
    machine.push((INSIDE / "calls.py").read_text(), "/run/harness/calls.py")
    said = machine.sh(f"{user} {PYTHON} /run/harness/calls.py", stdin=json.dumps(list(calls))).stdout
    return [json.loads(line) for line in said.splitlines()]


def refused(machine: Container, calls: Mapping[str, Call], *, user: str = "") -> set[str]:
    """Those that the bus does not let through."""
    said = answers(machine, calls.values(), user=user)
    return {name for name, error in zip(calls, said, strict=True) if error == REFUSED}


def named(machine: Container, destination: str = NAME, *, interfaces: bool = True) -> dict[str, Call]:
    """A call of each method there is."""
    calls = {}
    for name, path in methods(machine).items():
        interface, _, member = name.rpartition(".")
        calls[name] = Call(destination, path, interface if interfaces else "", member)
    return calls


def test_each_method_is_open_to_all_or_to_root_alone(machine: Container) -> None:
    calls = named(machine)
    assert calls.keys() == OPEN | CLOSED
    assert refused(machine, calls, user=AS_NOBODY) == CLOSED
    assert refused(machine, calls) == set()
    assert prop(machine, "State") == "host"


def test_it_is_the_same_by_the_number_of_its_connection(machine: Container) -> None:
    [number] = json.loads(
        machine.sh(
            f"busctl --json=short call {FREEDESKTOP} /org/freedesktop/DBus {FREEDESKTOP} GetNameOwner s {NAME}"
        ).stdout
    )["data"]
    calls = named(machine, number)
    assert refused(machine, calls, user=AS_NOBODY) == CLOSED
    assert refused(machine, calls) == set()


def test_a_call_that_names_no_interface_opens_nothing(machine: Container) -> None:
    """The bus may leave it to the service which one is meant; then its rules have nothing to go by."""
    calls = named(machine, interfaces=False)
    assert refused(machine, calls, user=AS_NOBODY) >= CLOSED
    assert refused(machine, calls) == set()


def test_who_looks_hears_of_what_happens(machine: Container) -> None:
    machine.push((INSIDE / "listen.py").read_text(), "/run/harness/listen.py")
    listening = machine.start(f"{AS_NOBODY} {PYTHON} /run/harness/listen.py SwitchFinished | tee /run/heard")
    machine.sh("until grep -qs ready /run/heard; do :; done")
    start_switch(machine, "ToVfio")
    heard = listening.wait().stdout.split()
    assert {"ready", "PropertiesChanged", "StepChanged", "SwitchFinished"} == set(heard)
    until_state(machine, "vfio")


def test_nobody_else_can_be_the_service(machine: Container) -> None:
    machine.sh("systemctl mask --runtime --now gpuswitchd")
    request = f"busctl call {FREEDESKTOP} /org/freedesktop/DBus {FREEDESKTOP} RequestName su {NAME} 4"
    said = machine.sh(f"{AS_NOBODY} {request}", check=False)
    assert said.status != 0
    assert "denied" in said.stderr or "not allowed" in said.stderr
    machine.sh(request)


def test_anyone_may_look_and_root_may_switch(machine: Container) -> None:
    """As people do it."""
    look = machine.sh(f"{AS_NOBODY} gpuswitchctl status {GPU}")
    assert "host" in look.stdout
    turned_away = machine.sh(f"{AS_NOBODY} gpuswitchctl to-vfio {GPU}", check=False)
    assert turned_away.status == 4
    assert (prop(machine, "State"), prop(machine, "Switch")) == ("host", {})
    machine.sh(f"gpuswitchctl to-vfio {GPU}")
    assert prop(machine, "State") == "vfio"
