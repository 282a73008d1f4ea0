"""A virtual machine has the GPU, or wants it, and something dies, is not there, or says no."""

from __future__ import annotations

import signal

import pytest

from tests.harness.setups import units
from tests.harness.setups.guest import configure, drivers, prop, state
from tests.harness.setups.libvirt import (
    AT_HOME,
    AWAY,
    DISK,
    HOOK,
    MANAGED,
    await_home,
    await_owner,
    await_seen,
    call_hook,
    check_given,
    define,
    domain,
    domains,
    owner,
    qemu_pid,
    seen,
    set_up,
    virsh,
)
from tests.harness.setups.programs import card, install, start_game
from tests.harness.setups.units import main_pid
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO, SINGLE_GPU
from tests.harness.virtual_machines.machine import Machine

WAITING = f'{MANAGED}busy = "wait"\nwait_seconds = 600\nacquire_seconds = 600\n'

ENTITIES = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 50}'>" for n in range(1, 10))
BOMB = f"<!DOCTYPE domain [<!ENTITY e0 'x'>{ENTITIES}]><domain><hostdev>&e9;</hostdev></domain>"


def restart_killed(machine: Machine, unit: str) -> None:
    """Kill a service's process, and wait until systemd has started it anew."""
    restarts = units.show(machine, unit, "NRestarts")
    units.kill(machine, unit, signal.SIGKILL, whom="main")
    units.await_shown(machine, unit, "NRestarts", restarts + 1)
    units.await_active(machine, unit)


@pytest.mark.smoke
def test_qemu_is_killed(machine: Machine) -> None:
    set_up(machine)
    define(machine, "win11", GPU, GPU_AUDIO)
    virsh(machine, "start win11")
    machine.sh(f"kill -KILL {qemu_pid(machine, 'win11')}")
    await_home(machine)
    await_seen(machine, "win11 release")
    assert domains(machine) == {"win11": "shut off"}


def test_a_vm_lives_on_while_services_come_and_go(machine: Machine) -> None:
    """It keeps the GPU through all of it; a release that nobody was there to hear is missed, and made up for."""
    set_up(machine)
    define(machine, "win11", GPU, GPU_AUDIO)
    virsh(machine, "start win11")
    pid = qemu_pid(machine, "win11")
    units.restart(machine, "libvirtd")
    await_seen(machine, "win11 reconnect")
    check_given(machine, "win11")
    units.restart(machine, "gpuswitchd")
    check_given(machine, "win11")
    restart_killed(machine, "gpuswitchd")
    check_given(machine, "win11")
    machine.sh("systemctl mask --runtime --now gpuswitchd")
    restart_killed(machine, "libvirtd")
    assert domains(machine) == {"win11": "running"}
    machine.sh("systemctl unmask --runtime gpuswitchd; systemctl start gpuswitchd")
    check_given(machine, "win11")
    assert qemu_pid(machine, "win11") == pid
    configure(machine, f"{MANAGED}start_grace = 2\nrelease_grace = 2\n")
    machine.sh("systemctl mask --runtime --now gpuswitchd")
    virsh(machine, "destroy win11")
    assert "win11 release: vfio-pci vfio-pci" in seen(machine)
    machine.sh("systemctl unmask --runtime gpuswitchd; systemctl start gpuswitchd")
    await_home(machine)


def test_a_start_is_refused_with_the_name_of_who_has_the_gpu(machine: Machine) -> None:
    set_up(machine)
    define(machine, "win11", GPU, GPU_AUDIO)
    pid = start_game(machine, card(GPU))
    refused = virsh(machine, "start win11", check=False)
    assert refused.status == 1
    assert "gpuswitch: " in refused.stderr
    assert f"pid {pid}, game.service" in refused.stderr
    assert domains(machine) == {"win11": "shut off"}
    await_home(machine)
    assert main_pid(machine, "game") == pid


def test_a_hook_is_killed_while_it_waits(machine: Machine) -> None:
    """With it goes the wish: nobody waits for the GPU any longer, and who has it is not disturbed."""
    set_up(machine, WAITING)
    define(machine, "win11", GPU, GPU_AUDIO)
    game = start_game(machine, card(GPU))
    machine.push(domain("other", GPU, GPU_AUDIO), "/run/other.xml")
    hook = machine.sh(f"{HOOK} other prepare begin - </run/other.xml >/dev/null 2>&1 & echo $!").stdout.strip()
    await_owner(machine, "other")
    machine.sh(f"kill -KILL {hook}")
    await_home(machine)

    start = machine.start("virsh start win11")
    await_owner(machine, "win11")
    machine.sh("kill -KILL $(pgrep -P $(pgrep -x libvirtd))")
    assert start.wait(check=False).status == 1
    await_home(machine)
    assert main_pid(machine, "game") == game


def test_the_service_is_restarted_while_a_hook_waits(machine: Machine) -> None:
    set_up(machine, WAITING)
    define(machine, "win11", GPU, GPU_AUDIO)
    game = start_game(machine, card(GPU))
    for killed in (False, True):
        start = machine.start("virsh start win11")
        await_owner(machine, "win11")
        if killed:
            units.kill(machine, "gpuswitchd", signal.SIGKILL, whom="main")
        else:
            units.restart(machine, "gpuswitchd")
        refused = start.wait(check=False)
        assert refused.status == 1
        assert "gpuswitch: " in refused.stderr
        await_home(machine)
    assert main_pid(machine, "game") == game


def test_a_vm_that_cannot_start_gives_the_gpu_back(machine: Machine) -> None:
    """Libvirt finds out after it has called the hook: there is no such disk."""
    set_up(machine)
    machine.sh("virsh define /dev/stdin", stdin=domain("win11", GPU, GPU_AUDIO, more=DISK))
    failed = virsh(machine, "start win11", check=False)
    assert failed.status == 1
    assert "gpuswitch" not in failed.stderr
    assert f"win11 prepare: {' '.join(AWAY)}" in seen(machine)
    await_home(machine)


def test_the_service_is_not_there(machine: Machine) -> None:
    """What does not concern it starts all the same: a VM without a GPU, one with a GPU that its owner sees to."""
    set_up(machine)
    machine.sh(f"{install(machine, 'bare_writes.sh')} to-vfio {SINGLE_GPU}")
    define(machine, "win11", GPU, GPU_AUDIO)
    define(machine, "plain")
    define(machine, "own", SINGLE_GPU)
    machine.sh("systemctl mask --runtime --now gpuswitchd")
    refused = virsh(machine, "start win11", check=False)
    assert refused.status == 1
    assert "gpuswitchd" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    for name in ("plain", "own"):
        virsh(machine, f"start {name}")
    machine.sh("systemctl unmask --runtime gpuswitchd; systemctl start gpuswitchd")
    assert (state(machine, SINGLE_GPU), owner(machine, SINGLE_GPU)) == ("vfio", "")
    virsh(machine, "destroy own")
    assert (state(machine, SINGLE_GPU), drivers(machine, SINGLE_GPU)) == ("vfio", ["vfio-pci"])
    assert prop(machine, SINGLE_GPU, "Switch") == {}


def test_a_vm_that_never_opens_the_gpu_loses_it(machine: Machine) -> None:
    """The hook is the first who asks for the service, too."""
    set_up(machine, f"{MANAGED}start_grace = 2\n")
    units.stop(machine, "gpuswitchd")
    call_hook(machine, "win11 prepare begin -", domain("win11", GPU, GPU_AUDIO))
    await_home(machine)


def test_a_hook_that_cannot_read_its_xml(machine: Machine) -> None:
    """It says so, in one line; a VM that runs already is left alone."""
    set_up(machine)
    for xml, why in (
        (BOMB, "document type"),
        (f"<domain>{'<hostdev/>' * 200_000}</domain>", "MiB"),
        ("hostdev", "well"),
    ):
        refused = call_hook(machine, "win11 prepare begin -", xml, check=False)
        assert (refused.status, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"gpuswitch: cannot give {GPU} to win11: ")
        assert why in refused.stderr
        assert refused.stderr.count("\n") == 1
        for operation in ("started begin", "reconnect begin", "release end"):
            assert call_hook(machine, f"win11 {operation} -", xml).stdout == ""
    await_home(machine)
