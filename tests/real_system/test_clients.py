"""The interface as other people's programs use it: by introspection, properties, methods, signals and errors."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest

from gpuswitch.api.gpu import GpuObject
from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, INSIDE, NAME, ctl, path_of, simulated, start_switch, until
from tests.real_system.conftest import Boot

HERE = f"{NAME} {path_of()}"
INVALID = f"{NAME}.Error.InvalidArgument"
TEXT = "'mars' is not a target; it is one of host, vfio"
METHODS = sorted(GpuObject.methods)


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    return boot(system.installed, simulated())


def program(machine: Container, name: str) -> list[object]:
    """What one of `inside` says of the GPU, a line of JSON each; run with the system's own Python."""
    machine.push((INSIDE / name).read_text(), f"/run/harness/{name}")
    said = machine.sh(f"/usr/bin/python3 /run/harness/{name} {path_of()}").stdout
    return [json.loads(line) for line in said.splitlines()]


def test_busctl(machine: Container) -> None:
    shown = machine.sh(f"busctl introspect {HERE} {NAME}.Gpu").stdout
    members = {line.split()[0].removeprefix("."): line.split()[1] for line in shown.splitlines()[1:]}
    wanted = dict.fromkeys(GpuObject.methods, "method") | dict.fromkeys(GpuObject.signals, "signal")
    assert members == wanted | dict.fromkeys(GpuObject.properties, "property")
    assert machine.sh(f"busctl get-property {HERE} {NAME}.Gpu State").stdout == 's "host"\n'
    refused = machine.sh(f"busctl set-property {HERE} {NAME}.Gpu State s vfio", check=False)
    assert "cannot set org.gpuswitch1.Gpu.State to vfio: it is host and read only" in refused.stderr
    machine.start(f"busctl monitor {NAME} >/run/heard 2>&1")
    until(machine, "grep -q Monitoring /run/heard")
    refused = machine.sh(f"busctl call {HERE} {NAME}.Gpu Plan 'sa{{sv}}' mars 0", check=False)
    assert refused.stderr == f"Call failed: {TEXT}\n"
    until(machine, f"grep -q {INVALID} /run/heard")


def test_gdbus(machine: Container) -> None:
    where = f"--system --dest {NAME} --object-path {path_of()}"
    document = ET.fromstring(machine.sh(f"gdbus introspect {where} --xml").stdout)  # noqa: S314 -- of our service
    found = {each.attrib["name"] for each in document.findall(f"interface[@name='{NAME}.Gpu']/method")}
    assert found == set(METHODS)
    machine.start(f"gdbus monitor {where} >/run/heard")
    until(machine, "grep -q 'is owned by' /run/heard")
    [switch] = machine.sh(f"gdbus call {where} --method {NAME}.Gpu.ToVfio '{{}}'").stdout.strip("()\n").split(",")[:1]
    until(machine, f"""grep -q "SwitchFinished ({switch}, 'done', '')" /run/heard""")
    assert "'State': <'vfio'>" in machine.sh("cat /run/heard").stdout
    read = f"--method org.freedesktop.DBus.Properties.Get {NAME}.Gpu State"
    assert machine.sh(f"gdbus call {where} {read}").stdout == "(<'vfio'>,)\n"
    refused = machine.sh(f"gdbus call {where} --method {NAME}.Gpu.Plan mars '{{}}'", check=False)
    assert refused.stderr == f"Error: GDBus.Error:{INVALID}: {TEXT}\n"


def test_dbus_send(machine: Container) -> None:
    """It cannot write variants, so it starts no switch: options have them."""
    send = f"dbus-send --system --print-reply=literal --dest={HERE}"
    read = "org.freedesktop.DBus.Properties.Get"
    assert machine.sh(f"{send} {read} string:{NAME}.Gpu string:State").stdout.split() == ["variant", "host"]
    found = machine.sh(f"{send} org.freedesktop.DBus.Introspectable.Introspect").stdout
    assert all(f'<method name="{name}">' in found for name in METHODS)
    assert machine.sh(f"{send} {NAME}.Gpu.Holders").stdout.split()[0] == "array"
    switch = start_switch(machine, "ToVfio")
    assert "done" in machine.sh(f"{send} {NAME}.Gpu.Wait string:{switch}").stdout
    refused = machine.sh(f"{send} {NAME}.Gpu.Wait string:x", check=False)
    assert refused.stderr == f"Error {INVALID}: {GPU} knows of no switch 'x'\n"


def test_dbus_test_tool(machine: Container) -> None:
    """It calls com.example.Spam, which nobody has: each call is refused, and the service is as it was."""
    spam = f"dbus-test-tool spam --system --dest={NAME}"
    refused = machine.sh(f"{spam} --count=1", check=False)
    assert "there is no object /" in refused.stderr or "has no interface com.example" in refused.stderr
    machine.sh(f"{spam} --count=20000 --queue=100 --ignore-errors")
    machine.sh(f"{spam} --count=20000 --no-reply")
    machine.sh(f"{spam} --count=500 --messages-per-conn=5 --ignore-errors --bytes --payload={'x' * 5000}")
    assert GPU in ctl(machine, "list").stdout


def test_cockpit(machine: Container) -> None:
    assert program(machine, "cockpit.py") == ["host", METHODS, ["SwitchFinished", True, "done"], [INVALID, [TEXT]]]


def test_dbus_python(machine: Container) -> None:
    """By the connection that python-dbusmock gives to tests. It reads all that introspection describes."""
    standard = [f"org.freedesktop.DBus.{name}" for name in ("Introspectable", "Peer", "Properties")]
    of_all = ["GetMachineId", "Introspect", "Ping"]
    assert program(machine, "dbus_python.py") == [
        "host",
        [*standard, f"{NAME}.Gpu"],
        [[], sorted([*of_all, "Holders"])],
        [[], sorted([*of_all, "Config", "GetManagedObjects", "Groups", "Reload", "Warnings"])],
        [True, "vfio"],
        [INVALID, TEXT],
    ]
