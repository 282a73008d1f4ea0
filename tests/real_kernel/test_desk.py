"""One GPU, one screen: the display manager goes, the GPU goes, both come back; and the machine may be shut down."""

from __future__ import annotations

import signal

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.desk import (
    await_nodes,
    frame_buffer,
    login,
    show_terminal_on,
    start_audio,
    start_compositor,
    start_display_manager,
    terminal_in_front,
    terminal_mode,
)
from tests.harness.setups.guest import configure, ctl, drivers, node_of_sound, prop, wait_state
from tests.harness.setups.logind import await_may_sleep
from tests.harness.setups.programs import card, holders, start_holder
from tests.harness.setups.units import main_pid
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, BOOT_GPU, DISPLAY_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

AT_HOME = [DISPLAY_DRIVER, AUDIO_DRIVER]
AWAY = ["vfio-pci", "vfio-pci"]
# An emulated desktop may take its time, and so may a look at who of so many has the GPU open.
DESKTOP = (
    '[deadlines]\nholders = 100\nnodes = 100\nrelease = 100\n[defaults]\nstop_units = ["display-manager.service"]\n'
)
MAP = """python3 -c "
import fcntl, struct
fb = open('/dev/fb0')
print([struct.unpack('2I', fcntl.ioctl(fb, 0x460F, struct.pack('2I', vt, 0)))[1] for vt in range(1, 7)])"
"""


def test_the_whole_way_of_a_single_gpu(machine: Machine) -> None:
    """Display manager, sound, console: what the scripts did with sleeps, and back again."""
    login(machine)
    wireplumber = start_audio(machine)
    show_terminal_on(machine, 2, frame_buffer(machine, GPU))
    before = machine.sh(MAP).stdout
    first = start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    ctl(machine, f"to-vfio {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    assert units.active(machine, "display-manager") == ["inactive"]
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    second = main_pid(machine, "display-manager")
    assert second not in {"0", first}
    assert holders(machine, card(GPU)) == {second}
    assert (terminal_in_front(machine), terminal_mode(machine, 7)) == ("tty7", "graphics")
    assert machine.sh(MAP).stdout == before
    # It has its cards while its session is in front.
    units.stop(machine, "display-manager")
    await_nodes(machine, wireplumber, "all", node_of_sound(machine))


def test_text_on_another_gpu_stays_on_it_when_frame_buffer_0_comes_back(machine: Machine) -> None:
    """The kernel draws all terminals on that, which is the one that the machine booted on."""
    configure(machine, "[defaults]\nallow_boot_display = true\n")
    show_terminal_on(machine, 2, frame_buffer(machine, GPU))
    before = machine.sh(MAP).stdout
    for target in ("vfio", "host"):
        ctl(machine, f"to-{target} {BOOT_GPU}")
    assert drivers(machine, BOOT_GPU) == [DISPLAY_DRIVER]
    assert machine.sh(MAP).stdout == before


def test_it_goes_on_when_who_asked_for_it_dies_with_the_display_manager(machine: Machine) -> None:
    start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    machine.sh(
        f"""sh -c 'echo $$ >/sys/fs/cgroup/system.slice/fake-dm.service/cgroup.procs
            exec gpuswitchctl to-vfio {GPU}' </dev/null >/run/said 2>&1 || true"""
    )
    assert "is on vfio-pci now" not in machine.sh("cat /run/said").stdout
    wait_state(machine, GPU, "vfio")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY


def test_a_greeter_lets_go_with_its_session(machine: Machine) -> None:
    """Logind has the card for it, and systemd keeps logind's descriptors: neither is in the way afterwards."""
    start_display_manager(machine, GPU, greeter=True)
    configure(machine, DESKTOP)
    ctl(machine, f"to-vfio {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY


def test_the_display_manager_comes_back_when_the_switch_fails(machine: Machine) -> None:
    """A game that is no part of the desktop has the card."""
    start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    game = start_holder(machine, "game.service", node_of_sound(machine))
    refused = ctl(machine, f"to-vfio {GPU} --wait 2", check=False)
    assert refused.status == 3
    assert f"pid {game}" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert holders(machine, card(GPU)) == {main_pid(machine, "display-manager")}


def test_a_session_is_ended_only_where_that_is_configured(machine: Machine) -> None:
    session = login(machine)
    compositor = start_compositor(machine, GPU)
    refused = ctl(machine, f"to-vfio {GPU}", check=False)
    assert refused.status == 3
    assert f"pid {compositor}, session {session} of tester" in refused.stderr
    configure(machine, "[defaults]\nend_sessions = true\n")
    ctl(machine, f"to-vfio {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    assert session not in machine.sh("loginctl list-sessions --no-legend").stdout.split()


def test_a_service_that_is_killed_half_way_starts_the_units_after_it_is_ready(machine: Machine) -> None:
    """Systemd would wait for it before it starts the display manager, and it for the display manager: nobody does."""
    start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    game = start_holder(machine, "game.service", node_of_sound(machine))
    ctl(machine, f"to-vfio {GPU} --no-wait --wait 100")
    units.await_active(machine, "display-manager", "inactive")
    units.kill(machine, "gpuswitchd", signal.SIGKILL)
    units.await_shown(machine, "gpuswitchd", "NRestarts", 1)
    units.await_active(machine, "gpuswitchd")
    units.await_active(machine, "display-manager")
    wait_state(machine, GPU, "host")
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    machine.sh(f"kill -0 {game}")
    await_may_sleep(machine)


def test_a_service_that_is_restarted_half_way_does_not_wait_for_what_waits_for_it(machine: Machine) -> None:
    """The display manager comes after the service: while that stops, systemd begins no job of it."""
    start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    start_holder(machine, "game.service", node_of_sound(machine))
    ctl(machine, f"to-vfio {GPU} --no-wait --wait 1000")
    units.await_active(machine, "display-manager", "inactive")
    units.restart(machine, "gpuswitchd")
    assert units.show(machine, "gpuswitchd", "Result") == "success"
    units.await_active(machine, "display-manager")
    wait_state(machine, GPU, "host")
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    await_may_sleep(machine)


def test_a_session_may_end_before_it_is_ended(machine: Machine) -> None:
    """Its display manager did so."""
    start_display_manager(machine, GPU, greeter=True)
    configure(machine, DESKTOP + "end_sessions = true\n")
    ctl(machine, f"to-vfio {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY


def test_the_machine_goes_down_in_the_middle_of_a_switch(machine: Machine) -> None:
    start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    start_holder(machine, "game.service", node_of_sound(machine))
    ctl(machine, f"to-vfio {GPU} --no-wait --wait 1000")
    units.await_active(machine, "display-manager", "inactive")
    machine.sh("systemctl poweroff", check=False)
    machine.wait_off()


def test_the_machine_goes_down_while_the_gpu_is_away(machine: Machine) -> None:
    start_display_manager(machine, GPU)
    configure(machine, DESKTOP)
    ctl(machine, f"to-vfio {GPU}")
    # As a virtual machine would: with the group, and the function behind it.
    vm = "/usr/bin/qemu-system-x86_64 -machine q35 -nodefaults -display none -S"
    devices = f"-device pcie-root-port,id=rp -device vfio-pci,host={GPU},bus=rp -device vfio-pci,host={GPU_AUDIO}"
    machine.sh(f"systemd-run --unit=vm {vm} {devices}")
    group = prop(machine, GPU, "IommuGroups")[0]
    machine.do(words.await_open, units.main_pid(machine, "vm"), f"/dev/vfio/{group}")
    machine.sh("systemctl poweroff", check=False)
    machine.wait_off()
