"""Words for the tests: gpuswitch and the GPU's drivers as somebody in the machine sees them.

Clients of the service run out here, at the machine's bus: what they say and are told is the same, and they start in
no time. Where it matters that gpuswitchctl runs in the machine, a test starts it there.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jeepney import MatchRule

from tests.harness.machines.bus import BusInterface
from tests.harness.machines.errors import CommandFailedError, Result
from tests.harness.machines.inside import words
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

BUS_NAME = "org.gpuswitch1"
MANAGER = BusInterface(BUS_NAME, "/org/gpuswitch1", "org.gpuswitch1.Manager")
ANSWER_SECONDS = 10.0
"""Within these the daemon answers, whatever it does: in an emulated machine, with its like beside it."""
SWITCH_SECONDS = 100.0

CTL = Path(sys.executable).with_name("gpuswitchctl")


class Ctl:
    """gpuswitchctl, running; what it says goes to nobody's terminal."""

    def __init__(self, machine: Machine, arguments: str) -> None:
        self._machine = machine
        self._command = f"gpuswitchctl {arguments}"
        self._process = subprocess.Popen(
            [CTL, *shlex.split(arguments)],
            env={"DBUS_SYSTEM_BUS_ADDRESS": machine.bus_address, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, *, check: bool = True) -> Result:
        """Wait until it ends. With check, another status than 0 is a CommandFailedError."""
        stdout, stderr = self._process.communicate()
        result = Result(self._command, self._process.returncode, stdout, stderr)
        if check and result.status != 0:
            problem = f"ended with status {result.status}"
            raise CommandFailedError(problem, result, self._machine.console_tail())
        return result


def ctl(machine: Machine, arguments: str, *, check: bool = True) -> Result:
    """Run gpuswitchctl."""
    return Ctl(machine, arguments).wait(check=check)


def ctl_inside(machine: Machine, arguments: str, *, check: bool = True) -> Result:
    """Run gpuswitchctl as it is installed in the machine."""
    return machine.sh(f"gpuswitchctl {arguments}", check=check)


def path_of(gpu: str) -> str:
    return "/org/gpuswitch1/gpu/" + gpu.replace(":", "_").replace(".", "_")


def gpu_interface(gpu: str) -> BusInterface:
    return BusInterface(BUS_NAME, path_of(gpu), "org.gpuswitch1.Gpu")


def prop(machine: Machine, gpu: str, name: str) -> Any:
    """One property of a GPU. The test fails where the daemon does not answer within ANSWER_SECONDS."""
    return machine.bus.get(gpu_interface(gpu), name, timeout=ANSWER_SECONDS)


def state(machine: Machine, gpu: str = GPU) -> str:
    return str(prop(machine, gpu, "State"))


def switch_field(machine: Machine, gpu: str, field: str) -> Any:
    return prop(machine, gpu, "Switch")[field]


def start_switch(machine: Machine, gpu: str, method: str) -> str:
    """Start a switch as a D-Bus client would, without waiting for it; returns its id."""
    [switch] = machine.bus.call(gpu_interface(gpu), method, "a{sv}", {})
    return str(switch)


def wait_switch(machine: Machine, gpu: str, switch: str) -> dict[str, Any]:
    """Wait for the end of a switch, in the daemon."""
    [fields] = machine.bus.call(gpu_interface(gpu), "Wait", "s", switch, timeout=SWITCH_SECONDS)
    return {name: value for name, (_, value) in fields.items()}


def wait_prop(machine: Machine, gpu: str, name: str, met: Callable[[Any], bool]) -> None:
    """Wait for a property by listening to what the GPU tells: subscribe first, then look, then wait."""
    rule = MatchRule(type="signal", path=path_of(gpu))
    target = gpu_interface(gpu)
    # the daemon may have to be started for the answer
    machine.bus.until(rule, lambda: met(machine.bus.get(target, name)), timeout=SWITCH_SECONDS)


def wait_state(machine: Machine, gpu: str, wanted: str) -> None:
    wait_prop(machine, gpu, "State", lambda state: state == wanted)


def drivers(machine: Machine, *functions: str) -> list[str]:
    """The driver of each function, by its link in sysfs; "" for none."""
    links = machine.do(words.look, [f"/sys/bus/pci/devices/{function}/driver" for function in functions])
    return [Path(link or "").name for link in links]


def snapshot(machine: Machine, functions: Iterable[str] = (GPU, GPU_AUDIO)) -> str:
    """Everything of these functions that a switch touches, and must give back."""
    functions = tuple(functions)
    await_sound(machine, *functions)
    names = ("driver_override", "power/control", "driver")
    paths = [f"/sys/bus/pci/devices/{function}/{name}" for function in functions for name in names]
    *found, vfio, cards, sounds = machine.do(words.look, [*paths, "/dev/vfio", "/dev/dri", "/dev/snd"])
    lines = [f"{path}: {(text or '').strip()}" for path, text in zip(paths, found, strict=True)]
    return "\n".join([*lines, vfio or "", str((cards or "").count("card")), str((sounds or "").count("control")), ""])


def registers(machine: Machine) -> str:
    """What libvirt's reset takes away: the base addresses of both functions, and whether they decode memory."""
    return "\n".join(
        machine.sh(
            f"config=/sys/bus/pci/devices/{function}/config; od -An -tx4 -j16 -N24 $config; "
            "echo $(($(od -An -tu1 -j4 -N1 $config) & 2))"
        ).stdout
        for function in (GPU, GPU_AUDIO)
    )


def node_of_sound(machine: Machine, function: str = GPU_AUDIO) -> str:
    """The control node of a function's sound card, which PipeWire holds open for ever on a desktop.

    The driver makes the card after it is bound (azx_probe_work in sound/pci/hda/hda_intel.c): that is waited for.
    """
    card = machine.do(words.await_text, f"/sys/bus/pci/devices/{function}/sound", "^card")
    node = f"/dev/snd/controlC{card.removeprefix('card')}"
    machine.do(words.await_there, node)
    return node


def await_sound(machine: Machine, *functions: str) -> None:
    """Wait until those of these functions that are on their sound driver have a sound card."""
    for function, driver in zip(functions, drivers(machine, *functions), strict=True):
        if driver == AUDIO_DRIVER:
            node_of_sound(machine, function)


def hold_open(machine: Machine, node: str) -> str:
    """Start a program that keeps a node open; returns its pid. It has it when this returns."""
    return machine.sh(f"exec 3<>{node}; sleep infinity </dev/null >/dev/null 2>&1 & echo $!").stdout.strip()


def kill(machine: Machine, pid: str) -> None:
    """End a process, and wait until it is gone."""
    machine.sh(f"kill {pid}")
    machine.do(words.await_end, int(pid))


def configure(machine: Machine, toml: str) -> None:
    """Give the service this configuration."""
    machine.push(toml, "/etc/gpuswitch/config.toml")
    machine.bus.call(MANAGER, "Reload")
