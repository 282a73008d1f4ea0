"""What the service finds when it starts and leaves when it ends, on a real kernel. All else: tests/real_system."""

from __future__ import annotations

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.guest import ctl, drivers, prop, snapshot, start_switch, state
from tests.harness.setups.tracer import inject
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine


def show(machine: Machine, field: str) -> str:
    return str(units.show(machine, "gpuswitchd", field))


def test_a_restart_leaves_a_gpu_on_vfio_and_remembers_its_home(machine: Machine) -> None:
    before = snapshot(machine)
    ctl(machine, f"to-vfio {GPU}")
    units.restart(machine, "gpuswitchd")
    assert state(machine) == "vfio"
    assert prop(machine, GPU, "HostDriver") == DISPLAY_DRIVER
    ctl(machine, f"to-host {GPU}")
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)


def test_a_gpu_that_was_on_vfio_before_the_service_started(machine: Machine) -> None:
    """Nobody saw its host driver: the one module whose aliases fit it is it, by the kernel's own tables."""
    machine.sh(
        f"""systemctl stop gpuswitchd; modprobe vfio-pci; cd /sys/bus/pci
        for f in {GPU} {GPU_AUDIO}; do echo vfio-pci >devices/$f/driver_override; done
        for f in {GPU_AUDIO} {GPU}; do echo $f >devices/$f/driver/unbind; echo $f >drivers_probe; done
        systemctl start gpuswitchd"""
    )
    assert state(machine) == "vfio"
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    overrides = machine.sh(f"cat /sys/bus/pci/devices/{GPU}/driver_override").stdout
    assert overrides == "(null)\n"


def test_killed_in_the_middle_of_a_switch_it_brings_the_gpu_home(machine: Machine) -> None:
    """The journal says what is owed, and the new daemon pays before it says READY.

    The worker is stopped, from outside, as it unbinds the display; so the signal comes in the middle for sure.
    """
    before = snapshot(machine)
    inject(machine, GPU, f"/sys/bus/pci/drivers/{DISPLAY_DRIVER}/unbind", "signal=STOP:when=1")
    start_switch(machine, GPU, "ToVfio")
    machine.do(words.await_gone, f"/sys/bus/pci/devices/{GPU}/driver")
    # systemd must not start the next one before the unbind is over.
    machine.push("[Service]\nRestart=no\n", "/run/systemd/system/gpuswitchd.service.d/once.conf")
    machine.sh("systemctl daemon-reload; systemctl kill -s KILL gpuswitchd; systemctl stop gpuswitchd")
    machine.sh("pkill -CONT -f '[w]orker_main'; while pgrep -f '[w]orker_main' >/dev/null; do :; done")
    assert drivers(machine, GPU, GPU_AUDIO) == ["", ""]

    units.start(machine, "gpuswitchd")
    assert state(machine) == "host"
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)
    ctl(machine, f"to-vfio {GPU}")
