"""Virtual machines come and go, and the GPU with them: libvirt's own words for it, and ours."""

from __future__ import annotations

import re

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.guest import ctl, drivers, prop, state, switch_field, wait_state
from tests.harness.setups.libvirt import (
    AT_HOME,
    AWAY,
    DISK_FILE,
    MANAGED,
    await_home,
    await_obedient,
    await_owner,
    call_hook,
    check_given,
    define,
    define_obedient,
    domain,
    domains,
    hostdev,
    owner,
    qemu_pid,
    seen,
    set_up,
    virsh,
)
from tests.harness.setups.programs import card, start_game
from tests.harness.setups.tracer import inject
from tests.harness.setups.units import main_pid
from tests.harness.virtual_machines.hardware import DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.harness.virtual_machines.machine import Machine

BOTH = f'{MANAGED}[[gpu]]\naddress = "{SINGLE_GPU}"\n'


@pytest.mark.parametrize(
    ("managed", "padding"),
    [
        pytest.param("yes", 0, id="managed", marks=pytest.mark.smoke),
        pytest.param("no", 900_000, id="by itself, 900 KB"),
    ],
)
def test_a_vm_starts_and_is_destroyed(machine: Machine, managed: str, padding: int) -> None:
    """Before libvirt looks, the GPU is on vfio-pci; so libvirt moves nothing, neither then nor at the end."""
    set_up(machine)
    define(machine, "win11", GPU, GPU_AUDIO, managed=managed, padding=padding)
    virsh(machine, "start win11")
    check_given(machine, "win11")
    for pid in (main_pid(machine, "libvirtd"), qemu_pid(machine, "win11")):
        assert "(enforce)" in machine.read(f"/proc/{pid}/attr/current")
    virsh(machine, "destroy win11")
    await_home(machine)
    home, away = " ".join(AT_HOME), " ".join(AWAY)
    calls = [f"win11 {operation}: {away}" for operation in ("prepare", "start", "started", "stopped", "release")]
    assert seen(machine, "10-before") == [calls[0].replace(away, home), *calls[1:]]
    assert seen(machine)[:4] == calls[:4]


def test_a_guest_reboots_is_not_saved_and_shuts_down(machine: Machine) -> None:
    """A reboot calls no hook. Nor does a snapshot: of the disk alone, as QEMU cannot save what such a device holds."""
    set_up(machine)
    define_obedient(machine, "win11", GPU, GPU_AUDIO)
    virsh(machine, "start win11")
    calls = seen(machine)
    moved = switch_field(machine, GPU, "id")
    await_obedient(machine)
    virsh(machine, "reset win11")
    overlay = f"--diskspec sda,file={DISK_FILE}.overlay"
    for word in ("managedsave win11", f"snapshot-create-as win11 one --memspec file={DISK_FILE}.memory {overlay}"):
        assert re.search("cannot migrate domain: .*VFIO", virsh(machine, word, check=False).stderr)
    virsh(machine, f"snapshot-create-as win11 one --disk-only {overlay}")
    check_given(machine, "win11")
    assert (seen(machine), switch_field(machine, GPU, "id")) == (calls, moved)
    await_obedient(machine, boots=2)
    virsh(machine, "shutdown win11")
    await_home(machine)


@pytest.mark.campaign
def test_a_vm_that_was_saved_without_its_gpu_is_restored(machine: Machine) -> None:
    """Who wants to save such a VM unplugs the GPU first; the XML that the hooks get from then on does not name it."""
    set_up(machine, f"{MANAGED}release_grace = 2\n")
    define(machine, "win11", GPU, GPU_AUDIO)
    virsh(machine, "start win11")
    for function in (GPU, GPU_AUDIO):
        machine.push(hostdev(function), f"/run/{function}.xml")
        virsh(machine, f"detach-device win11 /run/{function}.xml --live")
    # there is no system in the guest that would let go of them
    virsh(machine, "reset win11")
    machine.sh("while virsh dumpxml win11 | grep -q hostdev; do :; done")
    virsh(machine, "managedsave win11")
    await_home(machine)
    moved = switch_field(machine, GPU, "id")
    virsh(machine, "start win11")
    assert "win11 restore" in " ".join(seen(machine))
    assert domains(machine) == {"win11": "running"}
    await_home(machine)
    assert switch_field(machine, GPU, "id") == moved


def test_a_vm_restarts_while_its_gpu_is_on_the_way_home(machine: Machine) -> None:
    """The way home is not waited for, and virsh answers meanwhile. The next start waits for it, or takes it back."""
    set_up(machine, f"{MANAGED}[deadlines]\nunbind = 200\n")
    define(machine, "win11", GPU, GPU_AUDIO)
    virsh(machine, "start win11")
    first = qemu_pid(machine, "win11")
    inject(machine, GPU, "/sys/bus/pci/drivers/vfio-pci/unbind", "signal=STOP:when=1")
    virsh(machine, "destroy win11")
    machine.do(words.await_gone, f"/sys/bus/pci/devices/{GPU}/driver")
    assert domains(machine) == {"win11": "shut off"}
    assert state(machine) == "reattaching"
    again = machine.start("virsh start win11")
    machine.do(words.await_program, "dbus-send")
    machine.sh("pkill -CONT -f '[w]orker_main'")
    again.wait()
    assert qemu_pid(machine, "win11") != first
    check_given(machine, "win11")
    define(machine, "other", GPU, GPU_AUDIO)
    machine.sh("virsh destroy win11 && virsh start other")
    check_given(machine, "other")


def test_two_vms_race_for_one_gpu(machine: Machine) -> None:
    """A release that nobody has a reason for, of the loser or while QEMU has the GPU, moves nothing."""
    set_up(machine)
    for name in ("left", "right"):
        define(machine, name, GPU, GPU_AUDIO)
    jobs = {name: machine.start(f"virsh start {name}") for name in ("left", "right")}
    results = {name: job.wait(check=False) for name, job in jobs.items()}
    (winner,) = (name for name, result in results.items() if result.status == 0)
    (loser,) = jobs.keys() - {winner}
    assert "gpuswitch: " in results[loser].stderr
    assert winner in results[loser].stderr
    check_given(machine, winner)
    assert domains(machine) == {winner: "running", loser: "shut off"}
    assert {f"{loser} prepare", f"{loser} release"} <= {call.split(":")[0] for call in seen(machine)}
    again = virsh(machine, f"start {loser}", check=False)
    assert winner in again.stderr
    check_given(machine, winner)
    pid = qemu_pid(machine, winner)
    call_hook(machine, f"{winner} release end -", domain(winner, GPU, GPU_AUDIO))
    check_given(machine, winner)
    machine.sh(f"kill -KILL {pid}")
    await_home(machine)


def test_one_vm_takes_two_gpus_or_none(machine: Machine) -> None:
    """It names one function of the first only: that is worth a warning, no more."""
    set_up(machine, BOTH)
    define(machine, "win11", GPU, SINGLE_GPU)
    start_game(machine, card(SINGLE_GPU))
    refused = virsh(machine, "start win11", check=False)
    assert "game.service" in refused.stderr
    for gpu in (GPU, SINGLE_GPU):
        await_owner(machine, "", gpu)
        assert (state(machine, gpu), prop(machine, gpu, "Switch")) == ("host", {})
    units.stop(machine, "game")
    virsh(machine, "start win11")
    check_given(machine, "win11")
    assert (drivers(machine, SINGLE_GPU), owner(machine, SINGLE_GPU)) == (["vfio-pci"], "win11")
    assert f"without {GPU_AUDIO}" in machine.sh("journalctl -u gpuswitchd -o cat").stdout
    virsh(machine, "destroy win11")
    await_home(machine)
    wait_state(machine, SINGLE_GPU, "host")
    await_owner(machine, "", SINGLE_GPU)
    assert drivers(machine, SINGLE_GPU) == [DISPLAY_DRIVER]


def test_where_the_gpu_goes_depends_on_why_the_vm_ended(machine: Machine) -> None:
    """The hook is called as libvirt would since 10.5, which tells the reason."""
    set_up(machine, f'{MANAGED}on_saved = "stay"\n')
    xml = domain("win11", GPU, GPU_AUDIO)
    for reason, goes_home in (("saved", False), ("migrated", True), ("-", True)):
        call_hook(machine, "win11 prepare begin -", xml)
        assert (state(machine), owner(machine)) == ("vfio", "win11")
        moved = switch_field(machine, GPU, "id")
        call_hook(machine, f"win11 release end {reason}", xml)
        await_owner(machine, "")
        if goes_home:
            wait_state(machine, GPU, "host")
        assert (switch_field(machine, GPU, "id") != moved) == goes_home
    await_home(machine)


def test_the_machine_shuts_down_with_a_vm_running(machine: Machine) -> None:
    """The guest is asked to end, by libvirt-guests; what it let go stays on vfio-pci: nobody is left to use it."""
    set_up(machine)
    define_obedient(machine, "win11", GPU, GPU_AUDIO)
    machine.push(
        f"""[Unit]
Before=gpuswitchd.service libvirtd.service libvirt-guests.service
[Service]
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'readlink /sys/bus/pci/devices/{GPU}/driver /sys/bus/pci/devices/{GPU_AUDIO}/driver >/dev/ttyS0'
""",
        "/run/systemd/system/last.service",
    )
    units.start(machine, "last")
    virsh(machine, "start win11")
    await_obedient(machine)
    machine.sh("systemctl poweroff", check=False)
    machine.wait_off()
    assert machine.console_tail().count("drivers/vfio-pci") == 2


def test_a_gpu_that_is_detached_by_hand(machine: Machine) -> None:
    """Somebody else made that move: it is seen and written down, and nothing stands in its way."""
    set_up(machine)
    nodes = ["pci_" + function.replace(":", "_").replace(".", "_") for function in (GPU, GPU_AUDIO)]
    virsh(machine, f"nodedev-detach {nodes[0]}")
    wait_state(machine, GPU, "unknown")
    virsh(machine, f"nodedev-detach {nodes[1]}")
    wait_state(machine, GPU, "vfio")
    assert owner(machine) == ""
    assert "somebody else" in ctl(machine, "history").stdout
    define(machine, "win11", GPU, GPU_AUDIO)
    virsh(machine, "start win11")
    check_given(machine, "win11")
    virsh(machine, "destroy win11")
    await_home(machine)
    for node in nodes:
        virsh(machine, f"nodedev-detach {node}")
    wait_state(machine, GPU, "vfio")
    for node in nodes:
        virsh(machine, f"nodedev-reattach {node}")
    await_home(machine)
