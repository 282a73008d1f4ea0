"""The doctor on a real kernel, with real devices, systemd and libvirt: what it says is what the switch does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness.json_schemas import check
from tests.harness.setups import units
from tests.harness.setups.guest import configure, ctl, drivers
from tests.harness.setups.programs import card, start_game
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, CROWDED_NIC, DISPLAY_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.hardware import CROWDED_GPU as CROWDED
from tests.harness.virtual_machines.machine import Machine

pytestmark = pytest.mark.beside

Found = dict[str, tuple[str, str]]


def doctor(machine: Machine, arguments: str = "") -> tuple[int, Found]:
    """Run in the machine itself: its exit status, and of what is not ok severity and reason by kind."""
    ended = machine.sh(f"gpuswitchctl doctor --json {arguments}", check=False)
    told: dict[str, Any] = json.loads(ended.stdout)
    check("doctor", told)
    assert told["unseen"] == []
    findings = [each for each in told["findings"] if each["severity"] != "ok"]
    return ended.status, {each["kind"]: (each["severity"], each["reason"]) for each in findings}


@pytest.mark.smoke
def test_a_good_machine_is_well_and_what_is_not_is_named(machine: Machine) -> None:
    configure(machine, f'[[gpu]]\naddress = "{GPU}"\n')
    assert doctor(machine) == (0, {})

    # Nobody is left to ask who has it open: root looks by itself.
    start_game(machine, card(GPU))
    units.stop(machine, "gpuswitchd")
    status, found = doctor(machine)
    assert (status, set(found)) == (1, {"service", "holders"})
    assert "game.service" in found["holders"][1]
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    units.start(machine, "gpuswitchd")

    # What is said of a group is what refuses the switch.
    status, found = doctor(machine, CROWDED)
    assert (status, found["groups"][0]) == (2, "problem")
    refused = ctl(machine, f"to-vfio {CROWDED}", check=False)
    assert CROWDED_NIC in found["groups"][1]
    # A table to be written is a block there.
    assert found["groups"][1].partition(" `[[gpu]]`")[0] in refused.stderr
