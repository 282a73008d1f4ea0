"""A service that dies, or finds the disk full, at a chosen write of its journal; and what it leaves of the host.

The service is forked from a process that has imported it (guest/forkserver.py): in the emulated machine that takes half
a second, where its start by systemd takes ten. It runs in the sandbox of the installed unit, and none of its own code
knows of any of this: an audit hook of Python around it decides where it fails.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import Any

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.desk import frame_buffer, show_terminal_on
from tests.harness.setups.guest import await_sound, ctl
from tests.harness.setups.logind import await_may_sleep
from tests.harness.setups.nvidia import load_nvidia, start_persistenced
from tests.harness.setups.programs import PLACE, install
from tests.harness.virtual_machines.hardware import BARE_GPU, BARE_GPU_AUDIO, GPU, GPU_AUDIO, TWIN_GPU
from tests.harness.virtual_machines.machine import Machine

PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"
FOLDER = "/run/crash"
JOURNAL = "/run/gpuswitch/gpus"
FILLER = "/run/gpuswitch/filler"
"""A file that takes what is free in the runtime directory."""

AWAY = ("vfio", ("vfio-pci", "vfio-pci"))
"""State and drivers of a GPU with two functions."""

FORKSERVER = f"""\
set -e
mkdir {FOLDER}
mkfifo {FOLDER}/ask {FOLDER}/told
unit=/run/systemd/system/gpuswitchd-forked.service
sed -E '/^(ExecStart|ExecReload|Type|NotifyAccess|Watchdog|Restart)/d' \
    /usr/local/lib/systemd/system/gpuswitchd.service >$unit
mkdir $unit.d
cat >$unit.d/forked.conf <<END
[Service]
ExecStart={PYTHON} {PLACE}/forkserver.py {FOLDER} {{functions}}
END
# Reads all units anew, too.
systemctl mask --quiet --runtime --now gpuswitchd.service
systemctl start gpuswitchd-forked
# They stay loaded, whoever needed them.
modprobe -a vfio-pci vfio_iommu_type1
"""


def condition(machine: Machine, *functions: str) -> str:
    """All that a switch touches of the host around these functions, and what is kept of any."""
    await_may_sleep(machine)
    await_sound(machine, *functions)
    machine.sh("udevadm settle")
    names = ("driver", "driver_override", "power/control")
    modules = sorted(line.split()[0] for line in machine.read("/proc/modules").splitlines())
    found = machine.do(
        words.find,
        [
            *(f"/sys/bus/pci/devices/{function}/{name}" for function in functions for name in names),
            *("/sys/class/vtconsole/*/bind", "/dev/dri/by-path", "/dev/snd/by-path", "/dev/vfio", f"{JOURNAL}/*.json"),
        ],
    )
    return "\n".join([f"modules: {' '.join(modules)}", *(f"{path}: {text}" for path, text in found.items())])


@dataclass(frozen=True)
class Told:
    """What the forkserver answers (see there): where the GPU is, and what came of a command."""

    state: str = ""
    drivers: tuple[str, ...] = ()
    moving: str = ""
    restore_state: tuple[str, ...] = ()
    ended: int | None = None
    result: str = ""
    refused: str = ""
    met: int = 0

    @property
    def killed(self) -> bool:
        return self.ended == -signal.SIGKILL

    @property
    def where(self) -> tuple[str, tuple[str, ...]]:
        return self.state, self.drivers


class Forked:
    """The service of one machine, as a child of the forkserver, and one GPU that it switches.

    `home` is where that is now; `unit` is one that a switch of it stops; `terminal` is a virtual terminal that it
    shows, 0 for none. A `trap` is what goes wrong, as the forkserver takes it.
    """

    def __init__(self, machine: Machine, gpu: str, *companions: str, unit: str, terminal: int = 0) -> None:
        self.machine = machine
        self._functions = (gpu, *companions)
        self._unit = unit
        self._terminal = terminal
        install(machine, "forkserver.py")
        machine.sh(FORKSERVER.format(functions=" ".join(self._functions)))
        self.home = self.start().where

    def start(self, trap: str = "") -> Told:
        """Start the service, and look as soon as it says that it is ready."""
        return self._tell(f"start {trap}")

    def kill(self) -> Told:
        """Kill it, whatever it does."""
        return self._tell("kill")

    def switch(self, method: str, trap: str = "") -> Told:
        """Switch the GPU, and look."""
        return self._tell(f"switch {method} {trap}")

    def condition(self) -> str:
        """As that function tells, once what is given back without being waited for is back: the unit."""
        units.await_active(self.machine, self._unit)
        seen = condition(self.machine, *self._functions)
        if not self._terminal:
            return seen
        buffer = self._ask(f"terminal {self._terminal}")
        [device] = self.machine.do(words.look, [f"/sys/class/graphics/fb{buffer}/device"])
        return f"{seen}\nterminal {self._terminal}: {device}"

    def _tell(self, what: str) -> Told:
        told = self._ask(what)
        return Told(**told | {name: tuple(told.get(name, ())) for name in ("drivers", "restore_state")})

    def _ask(self, what: str) -> Any:
        return json.loads(self.machine.do(words.exchange, f"{FOLDER}/ask", f"{FOLDER}/told", what))


def desktop_gpu(machine: Machine) -> Forked:
    """A GPU with a terminal on it, and a unit that stops for it."""
    machine.push("[Service]\nExecStart=/usr/bin/sleep infinity\n", "/run/systemd/system/listed.service")
    machine.push('[defaults]\nstop_units = ["listed.service"]\n', "/etc/gpuswitch/config.toml")
    units.start(machine, "listed")
    show_terminal_on(machine, 2, frame_buffer(machine, GPU))
    return Forked(machine, GPU, GPU_AUDIO, unit="listed.service", terminal=2)


def last_nvidia_gpu(machine: Machine) -> Forked:
    """One whose detach is the unload of its driver's modules, and a unit that has it open."""
    load_nvidia(machine)
    ctl(machine, f"to-vfio {TWIN_GPU}")
    start_persistenced(machine)
    return Forked(machine, BARE_GPU, BARE_GPU_AUDIO, unit="nvidia-persistenced.service")
