"""The rig keeps its promises: pristine machines, independent of each other, with the GPUs that hardware.py names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jeepney import MatchRule

from tests.debian.cache import KEPT, Cache
from tests.debian.errors import RigError
from tests.machines.bus import Bus, BusError, Face
from tests.machines.errors import CommandFailedError, CommandTimeoutError, MachineGoneError
from tests.machines.inside import words
from tests.vm import units
from tests.vm.rig.hardware import (
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
from tests.vm.rig.machine import Machine

FLOOR = Path(__file__).parent / "rig" / "floor.sh"

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


def test_a_machine_is_not_up_while_a_service_crashes_over_and_over(machine: Machine) -> None:
    unit = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=oneshot\nExecStart=/bin/false\nRestart=on-failure\n"
    machine.push(unit, "/run/systemd/system/crashing.service")
    machine.sh("systemctl start crashing", check=False)
    with pytest.raises(RigError, match=r"units have failed while the machine came up: crashing\.service"):
        machine.wait_until_up()


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
    machine.push(FLOOR.read_bytes(), "/run/floor.sh", mode=0o755)
    number = machine.sh(f"basename $(readlink /sys/bus/pci/devices/{GPU}/iommu_group)").stdout.strip()

    machine.sh(f"/run/floor.sh to-vfio {GPU} {GPU_AUDIO}")
    assert drivers(machine) == {**DRIVERS, GPU: "vfio-pci", GPU_AUDIO: "vfio-pci"}
    machine.sh(f"udevadm settle; test -c /dev/vfio/{number}")

    machine.sh(f"/run/floor.sh to-host {GPU} {GPU_AUDIO}")
    assert drivers(machine) == DRIVERS
    machine.sh(f"udevadm settle; test ! -e /dev/vfio/{number}")


def test_two_clones_are_independent(clone: Callable[[], Machine]) -> None:
    one, other = clone(), clone()
    one.push("only here", "/var/lib/rig/note")
    one.push(FLOOR.read_bytes(), "/run/floor.sh", mode=0o755)
    one.sh(f"/run/floor.sh to-vfio {SINGLE_GPU}; sync")
    assert drivers(one) == {**DRIVERS, SINGLE_GPU: "vfio-pci"}
    assert drivers(other) == DRIVERS
    assert one.sh("cat /var/lib/rig/note").stdout == "only here"
    assert other.sh("ls /var/lib/rig", check=False).status != 0
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


def test_commands_give_status_and_both_outputs(machine: Machine) -> None:
    result = machine.sh("cat; echo careful >&2; exit 3", stdin="as given\n", check=False)
    assert (result.status, result.stdout, result.stderr) == (3, "as given\n", "careful\n")
    assert machine.sh("kill -TERM $$", check=False).status == 128 + 15


def test_a_failing_command_is_an_error_that_tells_all(machine: Machine) -> None:
    machine.sh("echo '<0>the kernel says so' >/dev/kmsg")
    with pytest.raises(CommandFailedError, match="ended with status 1: echo out") as caught:
        machine.sh("echo out; echo err >&2; false")
    assert (caught.value.result.stdout, caught.value.result.stderr) == ("out\n", "err\n")
    assert "the kernel says so" in caught.value.console


def test_a_command_that_runs_out_of_time_is_killed_with_all_it_started(machine: Machine) -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        machine.sh("echo begun; sleep 1000 & sleep 1001", timeout=2)
    assert caught.value.result.stdout == "begun\n"
    assert machine.sh("pgrep -x sleep", check=False).stdout == ""


def test_what_a_command_leaves_in_the_background_runs_on(machine: Machine) -> None:
    machine.sh("setsid sleep 1000 & echo $! >/run/left.pid")
    assert machine.sh("cat /proc/$(cat /run/left.pid)/comm").stdout == "sleep\n"


def test_commands_run_side_by_side(machine: Machine) -> None:
    first = machine.start("mkfifo /run/gate; cat /run/gate")
    assert not first.ended()
    # both ends of a fifo open together: neither command could end alone
    machine.sh("until test -p /run/gate; do :; done; echo through >/run/gate")
    assert first.wait().stdout == "through\n"


def test_words_are_done_without_a_command(machine: Machine) -> None:
    machine.push(b"\xff\0one\n", "/run/folder/file", mode=0o750)
    machine.do(words.link, "file", "/run/folder/link")
    assert machine.sh("stat -c %a /run/folder/file; od -An -tx1 /run/folder/file").stdout == "750\n ff 00 6f 6e 65 0a\n"
    paths = [f"/run/folder{name}" for name in ("", "/file", "/link", "/nothing")]
    assert machine.do(words.look, paths) == ["file\nlink", "\ufffd\0one\n", "file", None]
    assert machine.do(words.find, ["/run/folder/f*"]) == {"/run/folder/file": "\ufffd\0one\n"}
    with pytest.raises(CommandFailedError, match=r"read\('/run/nothing',\)[^0]*FileNotFoundError"):
        machine.read("/run/nothing")


def test_words_wait_for_what_happens_meanwhile(machine: Machine) -> None:
    pid = int(machine.sh("sleep 1000 >/dev/null 2>&1 & echo $!").stdout)
    machine.do(words.await_program, "sleep")
    machine.do(words.await_process_state, pid, "S")
    stopped = machine.start(f"kill -STOP {pid}")
    machine.do(words.await_process_state, pid, "T")
    ended = machine.start(f"kill -KILL {pid}")
    machine.do(words.await_end, pid)
    assert machine.sh(f"test -e /proc/{pid}", check=False).status == 1
    written = machine.start("mkfifo /run/gate; echo one >>/run/text; echo two >>/run/text; rm /run/gate")
    assert machine.do(words.await_text, "/run/text", "^two$") == "one\ntwo\n"
    machine.do(words.await_gone, "/run/gate")
    for job in (stopped, ended, written):
        job.wait()


def test_programs_out_here_are_on_the_machines_bus(machine: Machine) -> None:
    """As root, several at once; one that leaves disturbs nobody."""
    face = Face("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
    assert machine.bus.get(units.MANAGER, "Virtualization") == "qemu"
    other = Bus(machine.bus_address)
    [names] = machine.bus.call(face, "ListNames")
    [uid] = other.call(face, "GetConnectionUnixUser", "s", other.name)
    assert ({machine.bus.name, other.name} <= set(names), uid) == (True, 0)
    rule = MatchRule(type="signal", interface=face.interface, member="NameOwnerChanged")
    with machine.bus.signals(rule) as signals:
        other.close()
        assert machine.bus.next_signal(signals) == (other.name, other.name, "")
    with pytest.raises(BusError, match=r"ServiceUnknown: "):
        machine.bus.call(Face("org.nobody", "/", "org.nobody"), "Nothing")


def test_a_reset_machine_boots_anew_with_the_disk_it_had(machine: Machine) -> None:
    before = boot_id(machine)
    assert units.active(machine, "multi-user.target") == ["active"]
    machine.push("still here", "/var/lib/rig/note")
    machine.sh("sync")
    lost = machine.start("sleep 1000")
    machine.reset()
    machine.wait_until_up()
    assert boot_id(machine) != before
    assert machine.sh("cat /var/lib/rig/note").stdout == "still here"
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


def test_the_cache_keeps_what_is_whole_and_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path, lambda _line: None)
    (tmp_path / "kind" / "unfinished").mkdir(parents=True)

    def build(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("whole")

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise RigError("cannot go on")

    with cache.lock():
        first = cache.make("kind", "1", build)
        assert (first / "file").read_text() == "whole"
        with pytest.raises(RigError):
            cache.make("kind", "2", fail)
        assert cache.find("kind", "2") is None
        for key in ("3", "4"):
            cache.make("kind", key, build)
            assert cache.find("kind", "1")
        assert sorted(entry.name for entry in (tmp_path / "kind").iterdir()) == ["1", "4"]
        assert KEPT == 2
