"""`at_boot`: of two equal cards, the one behind a port is on vfio when the machine has started, and comes home."""

from __future__ import annotations

import json

import pytest

from tests.harness.setups import units
from tests.harness.setups.guest import ctl, drivers, prop, state
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.harness.virtual_machines.machine import Machine

pytestmark = pytest.mark.beside

PORT = "0000:00:05.0"
CONFIG = f"""\
[[gpu]]
match = {{ vendor = "1234", device = "1111", port = "{PORT}" }}
name = "card"
at_boot = "vfio"
# a machine that boots is busy, and an emulated one slow
[deadlines]
capture = 60
holders = 60
override = 60
power = 60
probe = 60
unbind = 60
"""
DESKTOP = f"""\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/readlink /sys/bus/pci/devices/{GPU}/driver /sys/bus/pci/devices/{SINGLE_GPU}/driver
StandardOutput=file:/run/seen

[Install]
WantedBy=multi-user.target
"""


def test_one_of_twins_is_on_vfio_before_the_desktop_and_comes_home(machine: Machine) -> None:
    machine.push(CONFIG, "/etc/gpuswitch/config.toml")
    machine.push(DESKTOP, "/etc/systemd/system/display-manager.service")
    machine.sh("systemctl enable display-manager.service && sync")
    machine.reset()
    machine.wait_until_up()

    seen = [line.rpartition("/")[2] for line in machine.read("/run/seen").split()]
    assert seen == ["vfio-pci", DISPLAY_DRIVER]
    assert (state(machine), prop(machine, GPU, "Reason")) == ("vfio", "")
    assert drivers(machine, GPU, GPU_AUDIO, SINGLE_GPU) == ["vfio-pci", "vfio-pci", DISPLAY_DRIVER]
    [entry] = json.loads(ctl(machine, "history --json").stdout)["switches"]
    assert (entry["requester"].get("at_boot"), entry["result"], entry["reason"]) == (True, "done", "")

    ctl(machine, "to-host card")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    units.restart(machine, "gpuswitchd")
    assert (state(machine), prop(machine, GPU, "Reason")) == ("host", "")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
