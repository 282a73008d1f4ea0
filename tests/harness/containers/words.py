"""Words for the tests: gpuswitch and systemd as somebody in the machine sees them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from tests.harness.machines.errors import Result
from tests.harness.machines.machine import COMMAND_SECONDS, Machine

PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"
UNIT_FILE = "/usr/local/lib/systemd/system/gpuswitchd.service"
DROP_INS = "/run/systemd/system/gpuswitchd.service.d"
JOURNAL = "/run/gpuswitch/gpus"
PAGES = "*_??_??_?.json"
"""Files of GPUs there; what is noted of the boot is none."""

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"
GPU = "0000:01:00.0"
"""Of the simulated host `laptop`: on nvidia, with three companions."""

INSIDE = Path(__file__).parent / "inside"
"""Where the programs are that tests push into a machine."""

AS_NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups"


PROGRAM = "/usr/local/sbin/gpuswitchd"


def simulated(*faults: str, scenario: str = "laptop", program: str = PROGRAM) -> dict[str, str]:
    """The file that has the installed service run on a simulated host, with all else as it is."""
    words = ("--simulate", scenario, "--runtime", "${RUNTIME_DIRECTORY}", "--state", "${STATE_DIRECTORY}")
    command = " ".join((program, *words, *(f"--fault={fault}" for fault in faults)))
    return {f"{DROP_INS}/simulated.conf": f"[Service]\nExecStart=\nExecStart={command}\n"}


def hybrid(*faults: str, python: str = PYTHON) -> dict[str, str]:
    """The files for a simulated host that nobody uses, with real units, sessions and inhibitors around it.

    `python` is that of the installation.
    """
    name = "hybrid.py"
    program = {f"/srv/{name}": (INSIDE / name).read_text()}
    return program | simulated(*faults, scenario="plain", program=f"{python} /srv/{name}")


def add_drop_in(machine: Machine, name: str, *lines: str) -> None:
    """Change the unit of the service; it takes effect with its next start, or at once where systemd says so."""
    machine.push("\n".join(("[Service]", *lines, "")), f"{DROP_INS}/{name}.conf")
    machine.sh("systemctl daemon-reload")


def ctl(machine: Machine, arguments: str, *, check: bool = True) -> Result:
    """Run gpuswitchctl."""
    return machine.sh(f"gpuswitchctl {arguments}", check=check)


def show(machine: Machine, field: str, unit: str = "gpuswitchd") -> str:
    """A property of a unit."""
    return machine.sh(f"systemctl show -P {field} {unit}").stdout.strip()


def path_of(gpu: str = GPU) -> str:
    return f"{ROOT}/gpu/" + gpu.replace(":", "_").replace(".", "_")


def call(machine: Machine, path: str, method: str, *arguments: str) -> Any:
    """Call a method of the service, with arguments as busctl wants them; what it returns."""
    interface, _, member = method.rpartition(".")
    words = shlex.join(("--json=short", "--timeout=60", "call", NAME, path, interface, member, *arguments))
    said = machine.sh(f"busctl {words}").stdout
    return json.loads(said)["data"] if said.strip() else None


def prop(machine: Machine, name: str, gpu: str = GPU) -> Any:
    """One property of a GPU."""
    read = f"busctl --json=short get-property {NAME} {path_of(gpu)} {NAME}.Gpu {name}"
    return json.loads(machine.sh(read).stdout)["data"]


def start_switch(machine: Machine, method: str, gpu: str = GPU) -> str:
    """Start a switch without waiting for it; its id."""
    [switch] = call(machine, path_of(gpu), f"{NAME}.Gpu.{method}", "a{sv}", "0")
    return str(switch)


def until(machine: Machine, condition: str, *, timeout: float = COMMAND_SECONDS) -> None:
    """Wait until a shell command succeeds."""
    machine.sh(f"until {condition}; do :; done", timeout=timeout)


def until_state(machine: Machine, state: str, gpu: str = GPU) -> None:
    until(machine, f"busctl get-property {NAME} {path_of(gpu)} {NAME}.Gpu State | grep -qx 's \"{state}\"'")


def until_restarted(machine: Machine, times: int = 1) -> None:
    """Wait until systemd has started the service anew so often by itself, and it is ready."""
    until(machine, f"[ $(systemctl show -P NRestarts gpuswitchd) = {times} ]")
    until(machine, "systemctl --quiet is-active gpuswitchd")


def until_all_is_given_back(machine: Machine) -> None:
    """Wait until nothing is owed any more: a service that starts anew starts units when it is ready, not before."""
    until(machine, f"[ -z \"$(find {JOURNAL} -name '{PAGES}')\" ]")


def history(machine: Machine) -> list[tuple[str, str]]:
    """The finished switches, newest first: target and result."""
    told = json.loads(ctl(machine, "history --json").stdout)
    return [(entry["target"], entry["result"]) for entry in told["switches"]]
