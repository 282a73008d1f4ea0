"""The setups are what they say, on the real kernel: what holds a GPU here holds it as its like does elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.machines.errors import CommandFailedError
from tests.harness.setups import units
from tests.harness.setups.desk import (
    await_nodes,
    frame_buffer,
    login,
    session_fields,
    show_terminal_on,
    start_audio,
    start_compositor,
    start_display_manager,
    terminal_in_front,
    terminal_mode,
)
from tests.harness.setups.guest import drivers, node_of_sound
from tests.harness.setups.nvidia import CHAIN, load_nvidia, loaded, nvidia_node, start_persistenced, start_unbind
from tests.harness.setups.programs import (
    await_end,
    await_free,
    await_process_state,
    card,
    hide_descriptor,
    holders,
    start_game,
    start_holder,
    start_mapper,
    start_stubborn,
)
from tests.harness.setups.units import main_pid
from tests.harness.virtual_machines.hardware import BARE_GPU, BARE_GPU_AUDIO, GPU, GPU_AUDIO, SINGLE_GPU, TWIN_GPU
from tests.harness.virtual_machines.machine import Machine


def kept_out(machine: Machine, module: str) -> str:
    """What rmmod says when it refuses."""
    refused = machine.sh(f"rmmod {module}", check=False)
    assert refused.status == 1
    assert loaded(machine) == list(CHAIN)
    return refused.stderr


def masters(machine: Machine, gpu: str) -> set[str]:
    """The pids that are DRM master of a GPU."""
    clients = machine.sh(f"cat /sys/kernel/debug/dri/$(basename $(realpath {card(gpu)}) | tr -d a-z)/clients").stdout
    return {line.split()[1] for line in clients.splitlines()[1:] if line.split()[3] == "y"}


def test_the_modules_need_each_other_and_two_gpus(machine: Machine) -> None:
    assert loaded(machine) == []
    load_nvidia(machine)
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["nvidia", "nvidia"]
    assert machine.sh("cat /sys/module/nvidia/version").stdout == "580.142\n"
    assert [nvidia_node(machine, gpu) for gpu in (BARE_GPU, TWIN_GPU)] == ["/dev/nvidia0", "/dev/nvidia1"]
    assert "in use by: nvidia_uvm nvidia_modeset" in kept_out(machine, "nvidia")
    assert "in use by: nvidia_drm" in kept_out(machine, "nvidia_modeset")
    for module in CHAIN:
        machine.sh(f"rmmod {module}")
    assert loaded(machine) == []
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["", ""]


def test_without_a_gpu_to_drive_the_driver_does_not_load(machine: Machine) -> None:
    machine.sh(f"for f in {BARE_GPU} {TWIN_GPU}; do echo none >/sys/bus/pci/devices/$f/driver_override; done")
    refused = machine.sh("modprobe nvidia", check=False)
    assert "No such device" in refused.stderr
    assert loaded(machine) == []


@pytest.mark.parametrize("start", [start_game, start_mapper])
def test_an_open_gpu_keeps_the_driver(machine: Machine, start: Callable[[Machine, str], str]) -> None:
    load_nvidia(machine)
    machine.sh("rmmod nvidia_drm nvidia_modeset nvidia_uvm")
    pid = start(machine, nvidia_node(machine, TWIN_GPU))
    assert holders(machine, "/dev/nvidia1") == {pid}
    assert "is in use" in machine.sh("rmmod nvidia", check=False).stderr
    machine.sh(f"kill {pid}")
    await_end(machine, pid)
    machine.sh("rmmod nvidia")


def test_an_unbind_of_an_open_gpu_returns_when_it_is_closed(machine: Machine) -> None:
    """The other GPU of its kind is another matter."""
    load_nvidia(machine)
    game = start_game(machine, nvidia_node(machine, BARE_GPU))
    writer = start_unbind(machine, BARE_GPU)
    await_process_state(machine, writer, "D")
    machine.sh(f"echo {TWIN_GPU} >/sys/bus/pci/devices/{TWIN_GPU}/driver/unbind")
    await_process_state(machine, writer, "D")
    machine.sh(f"kill {game}")
    await_end(machine, writer)
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["", ""]
    assert "Continuing with GPU removal" in machine.sh("dmesg").stdout


def test_a_signal_makes_a_wait_as_nvidias_spin(machine: Machine) -> None:
    load_nvidia(machine, "nvidia interruptible=1")
    game = start_game(machine, nvidia_node(machine, BARE_GPU))
    writer = start_unbind(machine, BARE_GPU)
    await_process_state(machine, writer, "S")
    machine.sh(f"kill -KILL {writer}")
    await_process_state(machine, writer, "R")
    machine.sh(f"kill {game}")
    await_end(machine, writer)


def test_a_hidden_descriptor_is_seen_by_the_kernel_alone(machine: Machine) -> None:
    load_nvidia(machine)
    pid = hide_descriptor(machine, nvidia_node(machine, BARE_GPU))
    assert holders(machine, "/dev/nvidia0") == set()
    assert machine.sh("grep -l /dev/nvidia0 /proc/[0-9]*/maps 2>/dev/null", check=False).stdout == ""
    machine.sh("rmmod nvidia_drm nvidia_modeset nvidia_uvm")
    assert machine.sh("cat /sys/module/nvidia/refcnt").stdout == "1\n"
    assert "is in use" in machine.sh("rmmod nvidia", check=False).stderr
    machine.sh(f"kill {pid}")
    await_end(machine, pid)
    machine.sh("rmmod nvidia")


@pytest.mark.parametrize(("version", "lets_go"), [("580.142", True), ("550.54", False)])
def test_modeset_keeps_every_gpu_of_an_older_driver(machine: Machine, version: str, lets_go: bool) -> None:
    load_nvidia(machine, "nvidia_drm modeset=1", version=version)
    assert machine.sh("cat /sys/module/nvidia/version /sys/module/nvidia_drm/parameters/modeset").stdout == (
        f"{version}\nY\n"
    )
    if lets_go:
        machine.sh(f"echo {BARE_GPU} >/sys/bus/pci/devices/{BARE_GPU}/driver/unbind")
    else:
        writer = start_unbind(machine, BARE_GPU)
        await_process_state(machine, writer, "D")
        machine.sh("rmmod nvidia_drm")
        await_end(machine, writer)
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["", "nvidia"]


def test_a_terminal_on_its_frame_buffer_keeps_the_driver(machine: Machine) -> None:
    load_nvidia(machine, "nvidia_drm fb=1")
    show_terminal_on(machine, 5, frame_buffer(machine, BARE_GPU))
    assert "is in use" in kept_out(machine, "nvidia_drm")
    show_terminal_on(machine, 5, 0)
    machine.sh("rmmod nvidia_drm")


def test_persistenced_has_every_gpu(machine: Machine) -> None:
    load_nvidia(machine)
    pid = start_persistenced(machine)
    for node in ("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"):
        assert holders(machine, node) == {pid}
    units.stop(machine, "nvidia-persistenced")
    assert holders(machine, "/dev/nvidia0") == set()


def test_a_game_ends_when_asked_and_a_stubborn_one_does_not(machine: Machine) -> None:
    load_nvidia(machine)
    render = f"/dev/dri/by-path/pci-{BARE_GPU}-render"
    game = start_game(machine, card(GPU), render)
    mapper = start_mapper(machine, card(GPU))
    stubborn = start_stubborn(machine, card(GPU))
    assert holders(machine, card(GPU)) == {game, mapper, stubborn}
    assert holders(machine, render) == {game}
    assert machine.sh(f"ls -l /proc/{mapper}/fd | grep -c dri/", check=False).stdout == "0\n"
    units.stop(machine, "game")
    machine.sh(f"kill {stubborn}")
    assert units.active(machine, "game", "stubborn") == ["inactive", "active"]
    assert holders(machine, card(GPU)) == {mapper, stubborn}


def test_a_person_has_a_session_on_the_seat(machine: Machine) -> None:
    fields = session_fields(machine, login(machine))
    assert (fields["Name"], fields["Seat"], fields["TTY"]) == ("tester", "seat0", "tty1")
    assert (fields["Active"], fields["Class"], fields["Remote"]) == ("yes", "user", "no")


def test_wireplumber_holds_every_sound_card_and_lets_go_when_asked(machine: Machine) -> None:
    login(machine)
    pid = start_audio(machine)
    asked, others = node_of_sound(machine, GPU_AUDIO), node_of_sound(machine, BARE_GPU_AUDIO)
    assert pid in holders(machine, asked)
    uevent = f"/sys/bus/pci/devices/{GPU_AUDIO}/sound/card*/uevent"
    machine.sh(f"echo remove >$(echo {uevent})")
    await_nodes(machine, pid, "none", asked)
    assert pid in holders(machine, others)
    # add alone leaves the card without SOUND_INITIALIZED, which udev's 78-sound-card.rules gives on change
    machine.sh(f"echo add >$(echo {uevent}); echo change >$(echo {uevent})")
    await_nodes(machine, pid, "all", asked)


def test_a_display_manager_has_card_and_terminal(machine: Machine) -> None:
    pid = start_display_manager(machine, GPU)
    assert units.show(machine, "display-manager", "Id") == "fake-dm.service"
    assert holders(machine, card(GPU)) == {pid}
    assert masters(machine, GPU) == {pid}
    assert terminal_in_front(machine) == "tty7"
    assert terminal_mode(machine, 7) == "graphics"
    units.stop(machine, "display-manager")
    assert holders(machine, card(GPU)) == set()
    assert terminal_in_front(machine) == "tty1"
    assert terminal_mode(machine, 7) == "text"


def test_a_greeter_has_the_card_through_its_session(machine: Machine) -> None:
    """So has logind, for the session, and systemd, which keeps logind's descriptors for its next start."""
    pid = start_display_manager(machine, SINGLE_GPU, greeter=True)
    logind = main_pid(machine, "systemd-logind")
    assert holders(machine, card(SINGLE_GPU)) == {pid, logind, "1"}
    session = machine.sh("loginctl list-sessions --no-legend").stdout.split()[0]
    fields = session_fields(machine, session)
    assert (fields["Class"], fields["Type"], fields["TTY"], fields["Active"]) == ("greeter", "wayland", "tty7", "yes")
    assert fields["Scope"] in machine.sh(f"cat /proc/{pid}/cgroup").stdout
    assert terminal_mode(machine, 7) == "graphics"
    units.stop(machine, "fake-dm")
    await_free(machine, card(SINGLE_GPU))


def test_a_compositor_that_a_person_started_dies_with_the_session(machine: Machine) -> None:
    session = login(machine)
    pid = start_compositor(machine, GPU)
    assert session_fields(machine, session)["Scope"] in machine.sh(f"cat /proc/{pid}/cgroup").stdout
    assert pid in holders(machine, card(GPU))
    machine.sh(f"loginctl terminate-session {session}")
    await_end(machine, pid)
    await_free(machine, card(GPU))
    assert terminal_mode(machine, 1) == "text"


def test_a_holder_that_cannot_have_its_node_is_an_error(machine: Machine) -> None:
    with pytest.raises(CommandFailedError, match="systemctl start"):
        start_holder(machine, "game.service", "/dev/nothing")
