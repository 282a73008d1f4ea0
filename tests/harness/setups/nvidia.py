"""The driver with NVIDIA's manners, on BARE_GPU and TWIN_GPU; its sources are in harness/modules."""

from __future__ import annotations

from tests.harness.setups.programs import start_holder
from tests.harness.virtual_machines.disk import MODULES
from tests.harness.virtual_machines.machine import Machine
from tests.harness.virtual_machines.modules import NVIDIA_VERSIONS

CHAIN = ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")
"""Its modules, in an order in which they can be unloaded."""


def load_nvidia(machine: Machine, *options: str, version: str = NVIDIA_VERSIONS[0]) -> None:
    """Load all its modules; from here on they are loaded at boot and when such a GPU comes, as on any such host.

    Options are those of modprobe.d, and stay: "nvidia_drm modeset=1" keeps every GPU in use, "nvidia_drm fb=1" gives
    each a frame buffer, "nvidia interruptible=1" lets its remove() wait in state S, as NVIDIA's, instead of D.
    """
    machine.push("".join(f"options {option}\n" for option in options), "/etc/modprobe.d/nvidia.conf")
    machine.sh(
        f"""set -e
        cp /{MODULES}/{version}/*.ko /lib/modules/$(uname -r)/updates
        modprobe -a nvidia_drm nvidia_uvm
        udevadm settle
        test -c /dev/nvidiactl -a -c /dev/nvidia-uvm -a -c /dev/nvidia-modeset"""
    )


def nvidia_node(machine: Machine, gpu: str) -> str:
    """The GPU's own node."""
    information = machine.read(f"/proc/driver/nvidia/gpus/{gpu}/information")
    fields = dict(line.split(":", 1) for line in information.splitlines())
    return f"/dev/nvidia{fields['Device Minor'].strip()}"


def loaded(machine: Machine) -> list[str]:
    """Those of its modules that are loaded, in the order of CHAIN."""
    present = [line.split()[0] for line in machine.read("/proc/modules").splitlines()]
    return [module for module in CHAIN if module in present]


def start_persistenced(machine: Machine) -> str:
    """nvidia-persistenced.service: has every GPU open that there is when it starts; returns its pid."""
    return start_holder(machine, "nvidia-persistenced.service", "/dev/nvidiactl", "/dev/nvidia?")


def start_unbind(machine: Machine, function: str) -> str:
    """Unbind a GPU that is in use; returns the pid of the writer, when the driver's remove() is waiting."""
    started = machine.sh(
        f"""device=/sys/bus/pci/devices/{function}/driver/unbind
        setsid sh -c "echo {function} >$device" </dev/null >/dev/null 2>&1 & echo $!"""
    )
    machine.sh(f"grep -q -m 1 'remove device {function} with non-zero usage count' /dev/kmsg")
    return started.stdout.strip()
