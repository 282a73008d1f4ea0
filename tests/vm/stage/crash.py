"""A service that dies, or finds the disk full, at a chosen write of its journal; and what it leaves of the host.

The service is forked from a process that has imported it (guest/forkserver.py): in the emulated machine that takes half
a second, where its start by systemd takes ten. It runs in the sandbox of the installed unit, and none of its own code
knows of any of this: an audit hook of Python around it decides where it fails.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.vm.guest import ctl
from tests.vm.rig.hardware import BARE_GPU, BARE_GPU_AUDIO, GPU, GPU_AUDIO, TWIN_GPU
from tests.vm.rig.machine import Machine
from tests.vm.stage.desk import show_terminal_on
from tests.vm.stage.nvidia import load_nvidia, start_persistenced
from tests.vm.stage.programs import PLACE, install

PYTHON = "/usr/local/lib/gpuswitch/current/bin/python"
FOLDER = "/run/crash"
JOURNAL = "/run/gpuswitch/gpus"
FILLER = "/run/gpuswitch/filler"
"""A file that takes what is free in the runtime directory."""

AWAY = ("vfio", ("vfio-pci", "vfio-pci"))
"""State and drivers of a GPU with two functions."""

FORKSERVER = f"""\
set -e
systemctl mask --quiet --runtime --now gpuswitchd.service
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
systemctl daemon-reload
systemctl start gpuswitchd-forked
# They stay loaded, whoever needed them.
modprobe -a vfio-pci vfio_iommu_type1
"""

TELL = f"""\
tell() {{ echo "$1" >{FOLDER}/ask && read -r told <{FOLDER}/told && printf '%s\\n' "$told"; }}
"""

# Of a sleep inhibitor that was let go, logind hears when it comes to it.
CONDITION = """\
while grep -qs WHO=gpuswitch /run/systemd/inhibit/*; do :; done
udevadm settle
cd /sys/bus/pci/devices
for function in {functions}; do readlink $function/driver; done
head -n 1 {attributes} /sys/class/vtconsole/*/bind
cut -d ' ' -f 1 /proc/modules | sort
ls /dev/dri/by-path /dev/snd/by-path /dev/vfio
find {journal} -name '*.json'
"""


def condition(*functions: str) -> str:
    """The command that tells all that a switch touches of the host around these functions, and what is kept of any."""
    attributes = " ".join(f"{f}/{name}" for f in functions for name in ("driver_override", "power/control"))
    return CONDITION.format(functions=" ".join(functions), attributes=attributes, journal=JOURNAL)


@dataclass(frozen=True)
class Told:
    """What the forkserver answers (see there): where the GPU is, and what came of a command."""

    state: str = ""
    drivers: tuple[str, ...] = ()
    moving: str = ""
    owed: tuple[str, ...] = ()
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
        await_unit = f"until systemctl --quiet is-active {self._unit}; do :; done"
        shown = f"readlink /sys/class/graphics/fb$(tell 'terminal {self._terminal}')/device" if self._terminal else ""
        return self.machine.sh("\n".join((TELL, await_unit, condition(*self._functions), shown))).stdout

    def _tell(self, what: str) -> Told:
        told = json.loads(self.machine.sh(f"{TELL}tell '{what}'", timeout=200).stdout)
        return Told(**told | {name: tuple(told.get(name, ())) for name in ("drivers", "owed")})


def side_by_side(*works: Callable[[], None]) -> None:
    """Do them all at once, and to the end of each: an emulated machine keeps one processor busy."""
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(work) for work in works]
    for end in ends:
        end.result()


def desktop_gpu(machine: Machine) -> Forked:
    """A GPU with a terminal on it, and a unit that stops for it."""
    machine.push("[Service]\nExecStart=/usr/bin/sleep infinity\n", "/run/systemd/system/listed.service")
    machine.push('[defaults]\nstop_units = ["listed.service"]\n', "/etc/gpuswitch/config.toml")
    machine.sh("systemctl daemon-reload; systemctl start listed")
    buffer = machine.sh(f"ls /sys/bus/pci/devices/{GPU}/graphics").stdout.strip().removeprefix("fb")
    show_terminal_on(machine, 2, int(buffer))
    return Forked(machine, GPU, GPU_AUDIO, unit="listed.service", terminal=2)


def last_nvidia_gpu(machine: Machine) -> Forked:
    """One whose detach is the unload of its driver's modules, and a unit that has it open."""
    load_nvidia(machine)
    ctl(machine, f"to-vfio {TWIN_GPU}")
    start_persistenced(machine)
    return Forked(machine, BARE_GPU, BARE_GPU_AUDIO, unit="nvidia-persistenced.service")
