"""Words for the tests: gpuswitch and the GPU's drivers as somebody in the machine sees them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tests.machines.errors import Result
from tests.vm.rig.hardware import GPU, GPU_AUDIO
from tests.vm.rig.machine import Machine

BUS_NAME = "org.gpuswitch1"


def ctl(machine: Machine, arguments: str, *, check: bool = True) -> Result:
    """Run gpuswitchctl."""
    return machine.sh(f"gpuswitchctl {arguments}", check=check)


def path_of(gpu: str) -> str:
    return "/org/gpuswitch1/gpu/" + gpu.replace(":", "_").replace(".", "_")


def prop(machine: Machine, gpu: str, name: str) -> Any:
    """One property of a GPU. busctl gives up, and the test fails, where the daemon does not answer within a second."""
    read = f"busctl --timeout=1 --json=short get-property {BUS_NAME} {path_of(gpu)} org.gpuswitch1.Gpu {name}"
    return json.loads(machine.sh(read).stdout)["data"]


def state(machine: Machine, gpu: str = GPU) -> str:
    return str(prop(machine, gpu, "State"))


def switch_field(machine: Machine, gpu: str, field: str) -> Any:
    return prop(machine, gpu, "Switch")[field]["data"]


def start_switch(machine: Machine, gpu: str, method: str) -> str:
    """Start a switch as a D-Bus client would, without waiting for it; returns its id."""
    call = f"busctl --json=short call {BUS_NAME} {path_of(gpu)} org.gpuswitch1.Gpu {method} 'a{{sv}}' 0"
    return str(json.loads(machine.sh(call).stdout)["data"][0])


def wait_switch(machine: Machine, gpu: str, switch: str) -> dict[str, Any]:
    """Wait for the end of a switch, in the daemon."""
    call = f"busctl --timeout=100 --json=short call {BUS_NAME} {path_of(gpu)} org.gpuswitch1.Gpu Wait s {switch}"
    fields = json.loads(machine.sh(call).stdout)["data"][0]
    return {name: value["data"] for name, value in fields.items()}


def wait_state(machine: Machine, gpu: str, wanted: str) -> None:
    """Wait for a state by listening for its change: subscribe first, then look, then wait."""
    rule = f"type='signal',path='{path_of(gpu)}',member='PropertiesChanged'"
    machine.sh(
        f"""set -eu
        fifo=$(mktemp -u); mkfifo $fifo
        dbus-monitor --system "{rule}" >$fifo & monitor=$!
        trap 'kill $monitor' EXIT
        exec 3<$fifo
        # Its first lines say that it is connected: from here on no change is missed.
        read -r line <&3
        while :; do
            now=$(busctl get-property {BUS_NAME} {path_of(gpu)} org.gpuswitch1.Gpu State)
            [ "$now" = 's "{wanted}"' ] && exit 0
            read -r line <&3
        done""",
        timeout=100,
    )


def drivers(machine: Machine, *functions: str) -> list[str]:
    """The driver of each function, by its link in sysfs; "" for none."""
    links = "; ".join(f"basename $(readlink /sys/bus/pci/devices/{f}/driver || echo /)" for f in functions)
    return [line.strip("/") for line in machine.sh(links).stdout.splitlines()]


def snapshot(machine: Machine, functions: Iterable[str] = (GPU, GPU_AUDIO)) -> str:
    """Everything of these functions that a switch touches, and must give back."""
    attributes = " ".join(
        f"/sys/bus/pci/devices/{f}/{attribute}" for f in functions for attribute in ("driver_override", "power/control")
    )
    links = " ".join(f"/sys/bus/pci/devices/{f}/driver" for f in functions)
    nodes = "ls /dev/vfio; ls /dev/dri | grep -c card; ls /dev/snd | grep -c control"
    return machine.sh(f"head -n 1 {attributes}; readlink {links}; {nodes}", check=False).stdout


def node_of_sound(machine: Machine, function: str = GPU_AUDIO) -> str:
    """The control node of a function's sound card, which PipeWire holds open for ever on a desktop."""
    card = machine.sh(f"basename /sys/bus/pci/devices/{function}/sound/card*").stdout.strip()
    return f"/dev/snd/controlC{card.removeprefix('card')}"


def hold_open(machine: Machine, node: str) -> str:
    """Start a program that keeps a node open; returns its pid. It has it when this returns."""
    return machine.sh(f"exec 3<>{node}; sleep infinity </dev/null >/dev/null 2>&1 & echo $!").stdout.strip()


def configure(machine: Machine, toml: str) -> None:
    """Give the service this configuration."""
    machine.push(toml, "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
