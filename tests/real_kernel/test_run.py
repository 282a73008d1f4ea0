"""`gpuswitchctl run` with a real QEMU that really holds the group: it ends in many ways, and the GPU is home."""

from __future__ import annotations

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.guest import configure, drivers, prop, wait_state
from tests.harness.setups.libvirt import AWAY, MANAGED, await_home
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

QEMU = "/usr/bin/qemu-system-x86_64 -machine q35 -nodefaults -display none -S -device vfio-pci,host={}"


def start(machine: Machine, command: str = QEMU) -> str:
    """In a unit, for want of a terminal; the pid of QEMU, once it has the group open."""
    machine.sh(
        f"systemd-run --unit=runner --collect --property=KillMode=process gpuswitchctl run --gpu {GPU} -- {command}"
    )
    wait_state(machine, GPU, "vfio")
    pid = str(prop(machine, GPU, "Owner")[0]).partition("(pid ")[2].rstrip(")")
    machine.do(words.await_open, pid, f"/dev/vfio/{prop(machine, GPU, 'IommuGroups')[0]}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    return pid


def test_a_command_has_the_gpu_however_it_ends(machine: Machine) -> None:
    configure(machine, MANAGED)
    pid = start(machine)
    has_it = prop(machine, GPU, "Owner")
    # Whoever started it is killed, and so is the service: QEMU has the GPU all the same.
    machine.sh(f"kill -KILL {units.main_pid(machine, 'runner')}")
    units.kill(machine, "gpuswitchd", 9, whom="main")
    units.await_active(machine, "gpuswitchd")
    assert prop(machine, GPU, "Owner") == has_it
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    machine.sh(f"kill -KILL {pid}")
    await_home(machine)
