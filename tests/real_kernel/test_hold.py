"""gpuswitch-vfio@.service with a QEMU of a unit's own, which really holds the group."""

from __future__ import annotations

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.guest import configure, drivers, prop
from tests.harness.setups.libvirt import AWAY, MANAGED, await_home
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

pytestmark = pytest.mark.beside

UNIT = f"gpuswitch-vfio@{GPU}.service"
QEMU = f"/usr/bin/qemu-system-x86_64 -machine q35 -nodefaults -display none -S -device vfio-pci,host={GPU}"


def test_a_unit_has_it_for_another_one_that_ends_with_it(machine: Machine) -> None:
    configure(machine, MANAGED)
    machine.push(
        f"[Unit]\nBindsTo={UNIT}\nAfter={UNIT}\n[Service]\nExecStart={QEMU}\n", "/run/systemd/system/vm.service"
    )
    machine.sh("systemctl daemon-reload; systemctl start vm")
    node = f"/dev/vfio/{prop(machine, GPU, 'IommuGroups')[0]}"
    machine.do(words.await_open, units.main_pid(machine, "vm"), node)
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    machine.sh(f"systemctl stop {UNIT}")
    assert machine.sh(f"systemctl is-active vm {UNIT}", check=False).stdout.split() == ["inactive"] * 2
    await_home(machine)


def test_a_unit_that_is_stopped_waits_for_whoever_has_the_group_open(machine: Machine) -> None:
    """A QEMU that is bound to nothing."""
    configure(machine, MANAGED)
    units.start(machine, UNIT)
    machine.sh(f"systemd-run --unit=vm --collect {QEMU}")
    machine.do(words.await_open, units.main_pid(machine, "vm"), f"/dev/vfio/{prop(machine, GPU, 'IommuGroups')[0]}")
    machine.sh(f"systemctl stop --no-block {UNIT}")
    units.await_shown_so(machine, UNIT, "StatusText", lambda text: "is not home yet: " in text and "qemu" in text)
    assert units.active(machine, "vm", UNIT) == ["active", "deactivating"]
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    units.kill(machine, "vm", 9)
    units.await_active(machine, UNIT, "inactive")
    await_home(machine)
