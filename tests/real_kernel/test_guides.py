"""What the guides have people type on Debian, with a virtual machine that has the GPU: in the order of the pages."""

from __future__ import annotations

import pytest

from tests.harness.pages import typed_where
from tests.harness.setups.libvirt import await_home, check_given, define, set_up
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

pytestmark = pytest.mark.beside


def test_what_the_guides_have_people_type(machine: Machine) -> None:
    set_up(machine)
    define(machine, "win10", GPU, GPU_AUDIO)
    # Pages that have people type the same have it typed once.
    blocks = {block.text: block for block in typed_where("debian")}
    commands = [command for block in blocks.values() for command, _ in block.commands]
    assert commands.count("virsh start win10") == 1
    for command in commands:
        machine.sh(command)
        if command == "virsh start win10":
            check_given(machine, "win10")
        if command.startswith("gpuswitchctl wait"):
            await_home(machine)
    assert machine.sh("gpuswitchctl history").stdout.count(" done ") == 2
