"""The main job on a real kernel: a GPU goes to vfio-pci and comes back, and sysfs agrees with every claim."""

from __future__ import annotations

import json

import pytest

from tests.harness.setups.guest import ctl, ctl_inside, drivers, prop, snapshot, start_switch, state, wait_switch
from tests.harness.virtual_machines.hardware import (
    AUDIO_DRIVER,
    BOOT_GPU,
    CROWDED_GPU,
    CROWDED_NIC,
    DISPLAY_DRIVER,
    GPU,
    GPU_AUDIO,
    SINGLE_GPU,
)
from tests.harness.virtual_machines.machine import Machine


def test_ten_times_there_and_back(machine: Machine) -> None:
    """Nothing wears out: after ten rounds the drivers, overrides, power settings and nodes are what they were."""
    group = prop(machine, GPU, "IommuGroups")[0]
    before = snapshot(machine)

    for _ in range(10):
        assert wait_switch(machine, GPU, start_switch(machine, GPU, "ToVfio"))["result"] == "done"
        assert drivers(machine, GPU, GPU_AUDIO) == ["vfio-pci", "vfio-pci"]
        assert machine.sh(f"test -c /dev/vfio/{group}").status == 0
        assert state(machine) == "vfio"
        assert wait_switch(machine, GPU, start_switch(machine, GPU, "ToHost"))["result"] == "done"
        assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
        assert state(machine) == "host"

    # vfio.ko itself stays, and with it its common node; the group's own node is gone.
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)


@pytest.mark.smoke
def test_the_command_line_tells_each_step(machine: Machine) -> None:
    """One line a step where nobody watches on a terminal, and the end of it in the exit status."""
    there = ctl_inside(machine, f"to-vfio {GPU}").stdout
    assert f"unbind {GPU_AUDIO} from {AUDIO_DRIVER}" in there
    assert there.index(f"unbind {GPU_AUDIO}") < there.index(f"unbind {GPU}")
    again = ctl_inside(machine, f"to-vfio {GPU}")
    assert again.status == 0
    status = json.loads(ctl_inside(machine, f"status {GPU} --json").stdout)
    assert json.dumps(status).count("vfio-pci") >= 2
    back = ctl_inside(machine, "to-host 01:00.0").stdout
    assert f"bind {GPU} to {DISPLAY_DRIVER}" in back


def test_a_gpu_of_one_function(machine: Machine) -> None:
    before = snapshot(machine, [SINGLE_GPU])
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    assert drivers(machine, SINGLE_GPU) == ["vfio-pci"]
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    ctl(machine, f"to-host {SINGLE_GPU}")
    assert snapshot(machine, [SINGLE_GPU]).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)


def test_a_group_with_a_stranger_is_refused_by_name(machine: Machine) -> None:
    """A VM could not have this GPU. The network card that is in the way is named, and nothing was touched."""
    before = snapshot(machine, [CROWDED_GPU, CROWDED_NIC])
    refused = ctl(machine, f"to-vfio {CROWDED_GPU}", check=False)
    assert refused.status == 3
    assert CROWDED_NIC in refused.stderr
    assert snapshot(machine, [CROWDED_GPU, CROWDED_NIC]) == before
    assert state(machine, CROWDED_GPU) == "host"


def test_the_display_that_the_machine_booted_on_is_refused(machine: Machine) -> None:
    refused = ctl(machine, f"to-vfio {BOOT_GPU}", check=False)
    assert refused.status == 3
    assert "allow_boot_display" in refused.stderr
    assert drivers(machine, BOOT_GPU) == [DISPLAY_DRIVER]


def test_two_gpus_at_once(machine: Machine) -> None:
    """Each has its own actor and worker; neither waits for the other."""
    switches = [(gpu, start_switch(machine, gpu, "ToVfio")) for gpu in (GPU, SINGLE_GPU)]
    assert [wait_switch(machine, gpu, switch)["result"] for gpu, switch in switches] == ["done", "done"]
    assert drivers(machine, GPU, GPU_AUDIO, SINGLE_GPU) == ["vfio-pci"] * 3
    switches = [(gpu, start_switch(machine, gpu, "ToHost")) for gpu in (GPU, SINGLE_GPU)]
    assert [wait_switch(machine, gpu, switch)["result"] for gpu, switch in switches] == ["done", "done"]
    assert drivers(machine, GPU, GPU_AUDIO, SINGLE_GPU) == [DISPLAY_DRIVER, AUDIO_DRIVER, DISPLAY_DRIVER]


def test_a_plan_changes_nothing(machine: Machine) -> None:
    before = snapshot(machine)
    assert "unbind" in ctl(machine, f"plan {GPU} vfio").stdout
    assert "unbind" in ctl(machine, f"to-vfio {GPU} --dry-run").stdout
    assert snapshot(machine) == before


def test_groups_are_listed_with_their_members(machine: Machine) -> None:
    listed = ctl(machine, "groups").stdout
    for function in (GPU, GPU_AUDIO, CROWDED_GPU, CROWDED_NIC):
        assert function in listed
