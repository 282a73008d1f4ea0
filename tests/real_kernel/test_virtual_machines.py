"""The harness keeps its promises: pristine machines, independent of each other, with the GPUs of hardware.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jeepney import MatchRule

from tests.harness.machines.bus import Bus, BusError, BusInterface
from tests.harness.machines.errors import CommandFailedError, MachineGoneError
from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.programs import install
from tests.harness.virtual_machines.hardware import (
    AUDIO_DRIVER,
    BARE_GPU,
    BARE_GPU_AUDIO,
    BOOT_GPU,
    CROWDED_GPU,
    CROWDED_NIC,
    DEVICE_IDS,
    DISPLAY_DRIVER,
    GPU,
    GPU_AUDIO,
    NIC_DRIVER,
    SINGLE_GPU,
    TWIN_GPU,
    TWIN_GPU_AUDIO,
)
from tests.harness.virtual_machines.machine import Machine

DRIVERS = {
    BOOT_GPU: DISPLAY_DRIVER,
    GPU: DISPLAY_DRIVER,
    GPU_AUDIO: AUDIO_DRIVER,
    SINGLE_GPU: DISPLAY_DRIVER,
    BARE_GPU: "",
    BARE_GPU_AUDIO: AUDIO_DRIVER,
    CROWDED_GPU: DISPLAY_DRIVER,
    CROWDED_NIC: NIC_DRIVER,
    TWIN_GPU: "",
    TWIN_GPU_AUDIO: AUDIO_DRIVER,
}
"""On a machine that nobody has touched."""


def drivers(machine: Machine) -> dict[str, str]:
    """The driver of each named function, empty where there is none; functions that are not there are left out."""
    [present] = machine.do(words.look, ["/sys/bus/pci/devices"])
    links = machine.do(words.find, ["/sys/bus/pci/devices/*/driver"])
    found = {Path(path).parent.name: Path(link or "").name for path, link in links.items()}
    return {address: found.get(address, "") for address in DRIVERS if address in (present or "").split()}


def group(machine: Machine, address: str) -> set[str]:
    [members] = machine.do(words.look, [f"/sys/bus/pci/devices/{address}/iommu_group/devices"])
    return set((members or "").split())


def boot_id(machine: Machine) -> str:
    return machine.read("/proc/sys/kernel/random/boot_id")


def test_a_clone_is_a_running_debian_with_nothing_failed(machine: Machine) -> None:
    assert machine.sh("systemctl is-system-running").stdout.strip() == "running"
    assert machine.sh("systemctl list-units --failed --plain --no-legend").stdout == ""


def test_the_service_is_installed_and_runs(machine: Machine) -> None:
    assert machine.sh("systemctl is-enabled gpuswitchd; systemctl is-active gpuswitchd").stdout == "enabled\nactive\n"
    assert machine.sh("busctl --list --no-pager | grep -c org.gpuswitch1").stdout.strip() == "1"


def test_a_clone_knows_what_time_it_is(machine: Machine) -> None:
    before = time.time()
    there = float(machine.sh("date +%s.%N").stdout)
    assert before - 60 < there < time.time() + 60


def test_functions_and_drivers_are_where_hardware_says(machine: Machine) -> None:
    assert drivers(machine) == DRIVERS
    assert machine.sh("grep -l 1 /sys/bus/pci/devices/*/boot_vga").stdout.split("/")[5] == BOOT_GPU


def test_groups_are_what_hardware_says(machine: Machine) -> None:
    assert group(machine, BOOT_GPU) == {BOOT_GPU}
    assert group(machine, GPU) == {GPU, GPU_AUDIO}
    assert group(machine, SINGLE_GPU) == {SINGLE_GPU}
    assert group(machine, BARE_GPU) == {BARE_GPU, BARE_GPU_AUDIO}
    assert group(machine, TWIN_GPU) == {TWIN_GPU, TWIN_GPU_AUDIO}
    assert group(machine, CROWDED_GPU) > {CROWDED_GPU, CROWDED_NIC}
    bridges = group(machine, CROWDED_GPU) - {CROWDED_GPU, CROWDED_NIC}
    assert {machine.read(f"/sys/bus/pci/devices/{bridge}/class").strip() for bridge in bridges} == {"0x060400"}
    assert len(machine.sh(f"ls /sys/bus/pci/devices/{CROWDED_NIC}/net").stdout.split()) == 1


def test_the_bare_writes_move_a_gpu_to_vfio_and_back(machine: Machine) -> None:
    bare_writes = install(machine, "bare_writes.sh")
    number = machine.sh(f"basename $(readlink /sys/bus/pci/devices/{GPU}/iommu_group)").stdout.strip()

    machine.sh(f"{bare_writes} to-vfio {GPU} {GPU_AUDIO}")
    assert drivers(machine) == {**DRIVERS, GPU: "vfio-pci", GPU_AUDIO: "vfio-pci"}
    machine.sh(f"udevadm settle; test -c /dev/vfio/{number}")

    machine.sh(f"{bare_writes} to-host {GPU} {GPU_AUDIO}")
    assert drivers(machine) == DRIVERS
    machine.sh(f"udevadm settle; test ! -e /dev/vfio/{number}")


def test_two_clones_are_independent(clone: Callable[[], Machine]) -> None:
    one, other = clone(), clone()
    one.push("only here", "/var/lib/harness/note")
    one.sh(f"{install(one, 'bare_writes.sh')} to-vfio {SINGLE_GPU}; sync")
    assert drivers(one) == {**DRIVERS, SINGLE_GPU: "vfio-pci"}
    assert drivers(other) == DRIVERS
    assert one.sh("cat /var/lib/harness/note").stdout == "only here"
    assert other.sh("ls /var/lib/harness", check=False).status != 0
    numbers = {each.sh("cat /proc/sys/kernel/random/uuid").stdout for each in (one, other, clone())}
    assert len(numbers) == 3


@pytest.mark.parametrize("address", [SINGLE_GPU, GPU])
def test_a_pulled_device_is_gone_and_comes_back(machine: Machine, address: str) -> None:
    slot = {function for function in DRIVERS if function[:-1] == address[:-1]}
    machine.device_del(DEVICE_IDS[address])
    assert drivers(machine) == {function: driver for function, driver in DRIVERS.items() if function not in slot}
    for function in sorted(slot, reverse=True):
        machine.device_add(DEVICE_IDS[function])
    for function in slot:
        machine.wait_for_device(function, DRIVERS[function])
    assert drivers(machine) == DRIVERS


def test_a_failing_command_is_an_error_that_tells_all(machine: Machine) -> None:
    machine.sh("echo '<0>the kernel says so' >/dev/kmsg")
    with pytest.raises(CommandFailedError, match="ended with status 1: echo out") as caught:
        machine.sh("echo out; echo err >&2; false")
    assert (caught.value.result.stdout, caught.value.result.stderr) == ("out\n", "err\n")
    assert "the kernel says so" in caught.value.console


def test_programs_out_here_are_on_the_machines_bus(machine: Machine) -> None:
    """As root, several at once; one that leaves disturbs nobody."""
    target = BusInterface("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
    assert machine.bus.get(units.MANAGER, "Virtualization") == "qemu"
    other = Bus(machine.bus_address)
    [names] = machine.bus.call(target, "ListNames")
    [uid] = other.call(target, "GetConnectionUnixUser", "s", other.name)
    assert ({machine.bus.name, other.name} <= set(names), uid) == (True, 0)
    rule = MatchRule(type="signal", interface=target.interface, member="NameOwnerChanged")
    with machine.bus.signals(rule) as signals:
        other.close()
        assert machine.bus.next_signal(signals) == (other.name, other.name, "")
    with pytest.raises(BusError, match=r"ServiceUnknown: "):
        machine.bus.call(BusInterface("org.nobody", "/", "org.nobody"), "Nothing")


def test_a_reset_machine_boots_anew_with_the_disk_it_had(machine: Machine) -> None:
    before = boot_id(machine)
    assert units.active(machine, "multi-user.target") == ["active"]
    machine.push("still here", "/var/lib/harness/note")
    machine.sh("sync")
    lost = machine.start("sleep 1000")
    machine.reset()
    machine.wait_until_up()
    assert boot_id(machine) != before
    assert machine.sh("cat /var/lib/harness/note").stdout == "still here"
    assert drivers(machine) == DRIVERS
    with pytest.raises(MachineGoneError, match="booted anew"):
        lost.wait()
    assert units.active(machine, "multi-user.target") == ["active"]


def test_a_machine_can_switch_itself_off(machine: Machine) -> None:
    machine.start("systemctl poweroff")
    machine.wait_off()
    with pytest.raises(MachineGoneError):
        machine.sh("true")


def test_the_terminal_of_the_shell_is_a_terminal(machine: Machine) -> None:
    job = machine.start("head -n 1 </dev/hvc0 >/run/typed; tty </dev/hvc0")
    machine.shell.send(b"lsx\x7f\n", time.monotonic() + 60)
    assert job.wait().stdout == "/dev/hvc0\n"
    # the line discipline has taken the x back
    assert machine.sh("cat /run/typed").stdout == "ls\n"
