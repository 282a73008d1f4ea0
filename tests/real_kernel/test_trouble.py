"""What goes wrong on a real kernel: binds that fail half-way, devices that leave."""

from __future__ import annotations

from tests.harness.setups.guest import (
    configure,
    ctl,
    drivers,
    hold_open,
    kill,
    prop,
    snapshot,
    state,
    switch_field,
    wait_state,
)
from tests.harness.setups.tracer import inject
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DEVICE_IDS, DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.harness.virtual_machines.machine import Machine


def test_a_bind_to_vfio_that_fails_half_way_is_reverted(machine: Machine) -> None:
    """The worker's second write to drivers_probe fails, as if vfio-pci had turned the display function down."""
    before = snapshot(machine)
    machine.sh("modprobe vfio-pci")
    inject(machine, GPU, "/sys/bus/pci/drivers_probe", "error=EINVAL:when=2")
    failed = ctl(machine, f"to-vfio {GPU}", check=False)
    assert failed.status == 1
    assert f"cannot bind {GPU} to " in failed.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)
    assert state(machine) == "host"
    assert switch_field(machine, GPU, "result") == "reverted"


def test_a_bind_to_the_host_that_fails_half_way_is_reverted(machine: Machine) -> None:
    """The sound driver turns its card down; both functions are on vfio-pci again, and later the way home is free."""
    configure(machine, "[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n")
    ctl(machine, f"to-vfio {GPU}")
    machine.sh(f"modprobe -r {AUDIO_DRIVER} && modprobe {AUDIO_DRIVER} enable=0,0,0,0")
    assert ctl(machine, f"to-host {GPU}", check=False).status == 1
    assert drivers(machine, GPU, GPU_AUDIO) == ["vfio-pci", "vfio-pci"]
    assert state(machine) == "vfio"
    machine.sh(f"modprobe -r {AUDIO_DRIVER} && modprobe {AUDIO_DRIVER}")
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]


def test_a_device_that_leaves_is_absent_and_comes_back(machine: Machine) -> None:
    machine.device_del(DEVICE_IDS[SINGLE_GPU])
    wait_state(machine, SINGLE_GPU, "absent")
    refused = ctl(machine, f"to-vfio {SINGLE_GPU}", check=False)
    assert refused.status == 3
    assert SINGLE_GPU in refused.stderr
    machine.device_add(DEVICE_IDS[SINGLE_GPU])
    wait_state(machine, SINGLE_GPU, "host")
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    assert drivers(machine, SINGLE_GPU) == ["vfio-pci"]


def test_a_device_that_leaves_while_it_is_on_vfio(machine: Machine) -> None:
    """What was owed to it went with it: the one that comes back is at home, and can be switched."""
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    machine.device_del(DEVICE_IDS[SINGLE_GPU])
    wait_state(machine, SINGLE_GPU, "absent")
    machine.device_add(DEVICE_IDS[SINGLE_GPU])
    wait_state(machine, SINGLE_GPU, "host")
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    ctl(machine, f"to-host {SINGLE_GPU}")
    assert drivers(machine, SINGLE_GPU) == [DISPLAY_DRIVER]


def test_a_vm_that_has_the_group_keeps_it(machine: Machine) -> None:
    """Whoever has /dev/vfio/GROUP open would lose the device under its feet: refused, and nothing changed."""
    ctl(machine, f"to-vfio {GPU}")
    group = prop(machine, GPU, "IommuGroups")[0]
    program = hold_open(machine, f"/dev/vfio/{group}")
    refused = ctl(machine, f"to-host {GPU}", check=False)
    assert refused.status == 3
    assert f"/dev/vfio/{group}" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == ["vfio-pci", "vfio-pci"]
    kill(machine, program)
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
