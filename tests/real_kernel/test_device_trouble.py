"""A GPU that comes back in no state to be used: the kernel's words, what helps, and what is left where nothing does."""

from __future__ import annotations

import re

from tests.harness.setups import units
from tests.harness.setups.guest import (
    configure,
    ctl,
    ctl_inside,
    drivers,
    prop,
    registers,
    start_switch,
    state,
    wait_prop,
    wait_state,
    wait_switch,
)
from tests.harness.setups.nvidia import load_nvidia
from tests.harness.virtual_machines.hardware import (
    AUDIO_DRIVER,
    BARE_GPU,
    BARE_GPU_AUDIO,
    DISPLAY_DRIVER,
    GPU,
    GPU_AUDIO,
    TWIN_GPU,
)
from tests.harness.virtual_machines.machine import Machine

AWAY = ["vfio-pci", "vfio-pci"]


def wipe(machine: Machine) -> None:
    """What a reset of the bus takes away, and libvirt does not give back.

    While it is awake: one that sleeps has its registers restored when it wakes (pci_pm_runtime_resume).
    """
    for function in (GPU, GPU_AUDIO):
        device = f"/sys/bus/pci/devices/{function}"
        machine.sh(
            f"echo on >{device}/power/control; "
            f"dd if=/dev/zero of={device}/config bs=4 seek=4 count=6 conv=notrunc status=none"
        )


def test_lost_registers_are_set_up_again_by_a_removal_and_a_rescan(machine: Machine) -> None:
    before = registers(machine)
    ctl(machine, f"to-vfio {GPU}")
    wipe(machine)
    said = ctl(machine, f"to-host {GPU}").stdout
    assert "check the registers of both functions: failed" in said
    assert f"find {GPU} and {GPU_AUDIO} on the PCI bus again: done" in said
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    assert registers(machine) == before
    assert (state(machine), prop(machine, GPU, "Reason"), prop(machine, GPU, "StaysOut")) == ("host", "", False)
    ctl(machine, f"to-vfio {GPU}")
    ctl(machine, f"to-host {GPU}")


def test_where_that_is_forbidden_it_stays_on_vfio_until_the_service_starts(machine: Machine) -> None:
    forbidden = "[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n"
    configure(machine, forbidden)
    ctl(machine, f"to-vfio {GPU}")
    wipe(machine)
    ended = wait_switch(machine, GPU, start_switch(machine, GPU, "ToHost"))
    assert ended["result"] == "reverted"
    assert ended["reason"].endswith("lost what the kernel had set up: no driver could work with that")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    assert prop(machine, GPU, "StaysOut") is True
    machine.push("", "/etc/gpuswitch/config.toml")
    units.restart(machine, "gpuswitchd")
    wait_state(machine, GPU, "host")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]


def test_what_the_kernel_says_is_told_and_another_start_brings_it_home(machine: Machine) -> None:
    """No reset and no rescan helps; then somebody mends it."""
    load_nvidia(machine)
    ctl(machine, f"to-vfio {BARE_GPU}")
    machine.sh("echo Y >/sys/module/nvidia/parameters/refuse")
    ended = wait_switch(machine, BARE_GPU, start_switch(machine, BARE_GPU, "ToHost"))
    assert ended["result"] == "reverted"
    assert f"the kernel says: nvidia {BARE_GPU}: RmInitAdapter failed!" in ended["reason"]
    machine.sh(f"echo 'nvidia {BARE_GPU}: seen by 52:54:00:ab:cd:ef' >/dev/kmsg; journalctl --sync")
    shown = ctl_inside(machine, "show").stdout.partition("what the kernel said meanwhile:\n")[2]
    assert f"nvidia {BARE_GPU}: RmInitAdapter failed!" in shown
    report = ctl_inside(machine, "report --output -").stdout
    report = report.partition("## What the kernel said of the GPUs since then")[2]
    assert f"nvidia {BARE_GPU}: RmInitAdapter failed!" in report
    assert re.search(rf"nvidia {BARE_GPU}: seen by <mac-\d+>", report)
    assert "cannot get it on the host after a removal and a rescan" in ended["reason"]
    assert ended["reason"].endswith("it is on vfio-pci now")
    assert drivers(machine, BARE_GPU, BARE_GPU_AUDIO, TWIN_GPU) == [*AWAY, "nvidia"]
    assert prop(machine, BARE_GPU, "StaysOut") is True
    machine.sh("echo N >/sys/module/nvidia/parameters/refuse")
    units.restart(machine, "gpuswitchd")
    wait_state(machine, BARE_GPU, "host")
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["nvidia", "nvidia"]
    wait_prop(machine, BARE_GPU, "StaysOut", lambda out: not out)
