"""`gpuswitchctl run` with a real QEMU that really holds the group: it ends in many ways, and the GPU is home."""

from __future__ import annotations

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.guest import configure, ctl, ctl_inside, drivers, prop, state, wait_prop, wait_state
from tests.harness.setups.libvirt import AT_HOME, AWAY, MANAGED, await_home
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

pytestmark = pytest.mark.beside

QEMU = "/usr/bin/qemu-system-x86_64 -machine q35 -nodefaults -display none -S -device vfio-pci,host={}"
STAYS = f'{MANAGED}on_release = "stay"\n'
USER = "tester"
AS_USER = f"--uid={USER} --property=LimitMEMLOCK=infinity"
LAST = f"""[Unit]
Before=gpuswitchd.service runner.service
[Service]
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'readlink /sys/bus/pci/devices/{GPU}/driver /sys/bus/pci/devices/{GPU_AUDIO}/driver >/dev/ttyS0'
"""
"""Says in the end where the GPU is."""


def start(machine: Machine, *, unit: str = "", options: str = "") -> str:
    """In a unit, for want of a terminal; the pid of QEMU, once it has the group open."""
    run = f"gpuswitchctl run --gpu {GPU} {options} -- {QEMU}"
    machine.sh(f"systemd-run --unit=runner --collect --property=KillMode=process {unit} {run}")
    wait_state(machine, GPU, "vfio")
    pid = str(prop(machine, GPU, "Owner")[0]).partition("(pid ")[2].rstrip(")")
    machine.do(words.await_open, pid, node(machine))
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    return pid


def service_dies(machine: Machine) -> None:
    units.kill(machine, "gpuswitchd", 9, whom="main")


def await_service(machine: Machine) -> None:
    """Until systemd has seen that it has died, once, and started it anew."""
    units.await_shown(machine, "gpuswitchd", "NRestarts", 1)
    units.await_active(machine, "gpuswitchd")


def node(machine: Machine) -> str:
    return f"/dev/vfio/{prop(machine, GPU, 'IommuGroups')[0]}"


def may_open(machine: Machine) -> tuple[bool, str]:
    """Whether the user may open the group, as the kernel decides it, and its mode."""
    group = node(machine)
    asked = machine.sh(f"setpriv --reuid={USER} --clear-groups test -r {group} -a -w {group}", check=False)
    return asked.status == 0, machine.sh(f"stat -c %a {group}").stdout.strip()


def test_a_command_has_the_gpu_however_it_ends(machine: Machine) -> None:
    configure(machine, MANAGED)
    pid = start(machine)
    has_it = prop(machine, GPU, "Owner")
    # Whoever started it is killed, and so is the service: QEMU has the GPU all the same.
    machine.sh(f"kill -KILL {units.main_pid(machine, 'runner')}")
    service_dies(machine)
    await_service(machine)
    assert prop(machine, GPU, "Owner") == has_it
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    machine.sh(f"kill -KILL {pid}")
    await_home(machine)


def test_a_users_command_has_it_and_nobody_may_open_it_afterwards(machine: Machine) -> None:
    """Where it stays on vfio, so that its node does; and whatever is killed meanwhile."""
    machine.sh(f"usermod -aG gpuswitch {USER}")
    # Emulated, it needs a while to start, and whoever asks it waits a minute at most.
    units.start(machine, "polkit")
    configure(machine, STAYS)
    pid = start(machine, unit=AS_USER, options="--user")
    assert machine.sh(f"stat -c %U /proc/{pid}").stdout.strip() == USER
    assert may_open(machine) == (True, "660")
    second = ctl_inside(machine, f"run --gpu {GPU} -- true", check=False)
    assert (second.status, "belongs to process qemu-system" in second.stderr) == (3, True)
    machine.sh(f"kill -KILL {units.main_pid(machine, 'runner')}")
    service_dies(machine)
    # It ends while the service starts anew, which finds out.
    machine.sh(f"kill -KILL {pid}")
    await_service(machine)
    wait_prop(machine, GPU, "Owner", lambda owner: not owner[0])
    assert (state(machine), may_open(machine)) == ("vfio", (False, "600"))


def test_one_that_cannot_come_home_and_a_machine_that_goes_down(machine: Machine) -> None:
    """The command never opens it; what keeps the GPU is said by the one that ran it. QEMU ends with the machine."""
    configure(machine, MANAGED)
    machine.push(f"install {AUDIO_DRIVER} /bin/false\n", "/etc/modprobe.d/broken.conf")
    ran = machine.sh(f"gpuswitchctl run --gpu {GPU} -- sh -c 'rmmod {AUDIO_DRIVER}; exit 42'", check=False)
    assert (ran.status, AUDIO_DRIVER in ran.stderr) == (42, True)
    assert (state(machine), AUDIO_DRIVER in prop(machine, GPU, "Reason")) == ("vfio", True)
    assert prop(machine, GPU, "Owner") == ("", "")
    machine.sh("rm /etc/modprobe.d/broken.conf")
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME

    start(machine)
    machine.push(LAST, "/run/systemd/system/last.service")
    units.start(machine, "last")
    machine.sh("systemctl poweroff", check=False)
    machine.wait_off()
    assert machine.console_tail().count("drivers/vfio-pci") == 2
