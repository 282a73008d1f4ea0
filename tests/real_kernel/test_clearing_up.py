"""libvirt clears up after a machine, late or not at all: what that had is on vfio until then, and whole at home.

libvirt resets by the bus what is on a host driver when it clears up. Only the configuration space shows that.
"""

from __future__ import annotations

import signal

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.guest import ctl, drivers, prop, registers, state, wait_prop
from tests.harness.setups.libvirt import (
    AT_HOME,
    AWAY,
    MANAGED,
    await_home,
    await_seen,
    check_given,
    define,
    domains,
    owner,
    qemu_pid,
    seen,
    set_up,
    virsh,
)
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

QUICK = f"{MANAGED}release_grace = 2\n"
LIBVIRTD = "libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket"


def start(machine: Machine, *, managed: str = "yes") -> None:
    define(machine, "win11", GPU, GPU_AUDIO, managed=managed)
    virsh(machine, "start win11")


def kill_qemu(machine: Machine) -> None:
    machine.sh(f"kill -KILL {qemu_pid(machine, 'win11')}")


def kill_libvirtd(machine: Machine) -> None:
    """For good: nobody but us starts it again."""
    machine.push("[Service]\nRestart=no\n", "/run/systemd/system/libvirtd.service.d/once.conf")
    units.reload_manager(machine)
    units.kill(machine, "libvirtd", signal.SIGKILL, whom="main")


def check_cleared_up(machine: Machine) -> None:
    """What libvirt let go of was on vfio; when its `release` comes, the GPU may be on its way home."""
    await_seen(machine, "win11 release")
    assert f"win11 stopped: {' '.join(AWAY)}" in seen(machine)


def await_reason(machine: Machine, part: str) -> None:
    wait_prop(machine, GPU, "Reason", lambda reason: part in reason)


@pytest.mark.parametrize("managed", ["yes", pytest.param("no", marks=pytest.mark.campaign)])
def test_libvirtd_is_killed_and_then_qemu(machine: Machine, managed: str) -> None:
    """Nobody is left to tell of the end of the machine: its process is watched. libvirtd is started, and clears up."""
    set_up(machine, QUICK)
    before = registers(machine)
    start(machine, managed=managed)
    kill_libvirtd(machine)
    check_given(machine, "win11")
    kill_qemu(machine)
    await_home(machine)
    check_cleared_up(machine)
    assert units.active(machine, "libvirtd") == ["active"]
    assert domains(machine) == {"win11": "shut off"}
    assert registers(machine) == before
    # All that is left of it: it starts and ends as any.
    virsh(machine, "start win11")
    check_given(machine, "win11")
    virsh(machine, "destroy win11")
    await_home(machine)
    assert registers(machine) == before


def test_libvirtd_is_stopped_and_qemu_is_killed(machine: Machine) -> None:
    set_up(machine, QUICK)
    before = registers(machine)
    start(machine)
    machine.sh(f"systemctl stop {LIBVIRTD}")
    kill_qemu(machine)
    await_home(machine)
    check_cleared_up(machine)
    assert registers(machine) == before


@pytest.mark.campaign
def test_libvirtd_is_slow(machine: Machine) -> None:
    set_up(machine, QUICK)
    before = registers(machine)
    start(machine)
    units.kill(machine, "libvirtd", signal.SIGSTOP, whom="main")
    kill_qemu(machine)
    await_reason(machine, "libvirt is not done with it")
    assert (state(machine), owner(machine), drivers(machine, GPU, GPU_AUDIO)) == ("vfio", "win11", AWAY)
    units.kill(machine, "libvirtd", signal.SIGCONT, whom="main")
    await_home(machine)
    await_seen(machine, "win11 release")
    assert registers(machine) == before


@pytest.mark.campaign
def test_libvirtd_starts_while_qemu_is_killed(machine: Machine) -> None:
    set_up(machine, QUICK)
    before = registers(machine)
    start(machine)
    units.stop(machine, "libvirtd")
    starting = machine.start("systemctl start libvirtd")
    kill_qemu(machine)
    starting.wait()
    await_home(machine)
    await_seen(machine, "win11 release")
    assert registers(machine) == before


@pytest.mark.campaign
def test_the_service_is_started_anew_while_libvirt_is_gone(machine: Machine) -> None:
    set_up(machine, f"{QUICK}start_grace = 2\n")
    before = registers(machine)
    start(machine)
    kill_libvirtd(machine)
    units.stop(machine, "gpuswitchd")
    kill_qemu(machine)
    units.start(machine, "gpuswitchd")
    await_home(machine)
    check_cleared_up(machine)
    assert registers(machine) == before


@pytest.mark.campaign
def test_libvirtd_cannot_be_had(machine: Machine) -> None:
    """The GPU goes home all the same, and what libvirt does to it there is told."""
    set_up(machine, f"{QUICK}libvirt_patience = 3\n")
    before = registers(machine)
    start(machine)
    machine.sh(f"systemctl mask --runtime --now {LIBVIRTD}")
    kill_qemu(machine)
    await_home(machine)
    await_reason(machine, "libvirt still has the virtual machine win11 in its books")
    assert registers(machine) == before
    machine.sh("systemctl unmask --runtime libvirtd.service; systemctl start libvirtd")
    await_seen(machine, "win11 release")
    wait_prop(machine, GPU, "Reason", lambda reason: "in its books" not in reason)
    assert ("libvirt has reset" in prop(machine, GPU, "Reason")) == (registers(machine) != before)


def test_nobody_brings_home_what_libvirt_is_not_done_with(machine: Machine) -> None:
    """A GPU that is not managed: somebody gave it to the machine, and wants it back when that has ended."""
    set_up(machine, "")
    before = registers(machine)
    ctl(machine, f"to-vfio {GPU}")
    start(machine)
    machine.sh(f"systemctl stop {LIBVIRTD}")
    kill_qemu(machine)
    refused = ctl(machine, f"to-host {GPU}", check=False)
    assert refused.status != 0
    assert "libvirt has the virtual machine win11 in its books, with 0000:01:00.0, 0000:01:00.1" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    machine.sh("systemctl start libvirtd")
    machine.do(words.await_gone, "/run/libvirt/qemu/win11.xml")
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert registers(machine) == before


@pytest.mark.campaign
def test_who_waits_for_a_machine_waits_for_libvirt(machine: Machine) -> None:
    set_up(machine, "")
    before = registers(machine)
    ctl(machine, f"to-vfio {GPU}")
    start(machine)
    units.kill(machine, "libvirtd", signal.SIGSTOP, whom="main")
    waiting = machine.start(f"gpuswitchctl to-host {GPU} --wait 600")
    wait_prop(machine, GPU, "State", lambda state: state == "reattaching")
    kill_qemu(machine)
    wait_prop(machine, GPU, "Switch", lambda switch: "libvirt is done" in str(switch))
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    units.kill(machine, "libvirtd", signal.SIGCONT, whom="main")
    waiting.wait()
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert registers(machine) == before
