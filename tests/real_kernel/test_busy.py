"""A GPU that somebody has open: named, waited for, ended, or left alone, on the real kernel with real systemd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.desk import await_nodes, login, start_audio
from tests.harness.setups.guest import (
    Ctl,
    configure,
    ctl,
    drivers,
    node_of_sound,
    snapshot,
    state,
    wait_prop,
    wait_state,
)
from tests.harness.setups.logind import await_may_sleep, kept_awake
from tests.harness.setups.programs import card, start_game, start_holder, start_mapper
from tests.harness.setups.units import main_pid
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

AT_HOME = [DISPLAY_DRIVER, AUDIO_DRIVER]
AWAY = ["vfio-pci", "vfio-pci"]


def start_deaf(machine: Machine, node: str) -> str:
    """A program that does not listen to SIGTERM; returns its pid.

    In a scope, as a session's: systemd does not start its programs, so it is they themselves who are asked to end.
    """
    # From a file: what stands on its command line, newer ones of systemd-run expand in a scope, too.
    machine.sh(
        f"""mkfifo /run/fifo
        echo 'trap "" TERM; exec 3<>{node}; echo $$ >/run/ready; read -r line' >/run/deaf
        systemd-run --scope --unit=deaf sh /run/deaf <>/run/fifo >/dev/null 2>&1 &"""
    )
    return machine.do(words.await_text, "/run/ready", "\n").strip()


@pytest.mark.parametrize(
    ("start", "unit"),
    [pytest.param(start_game, "game.service", marks=pytest.mark.smoke), (start_mapper, "mapper.service")],
)
def test_refused_while_a_program_draws(machine: Machine, start: Callable[[Machine, str], str], unit: str) -> None:
    before = snapshot(machine)
    pid = start(machine, card(GPU))
    refused = ctl(machine, f"to-vfio {GPU}", check=False)
    assert refused.status == 3
    assert f"pid {pid}, {unit}" in refused.stderr
    assert "/dev/dri/card" in refused.stderr
    assert f"systemctl stop {unit}" in refused.stderr
    assert f"{pid} " in ctl(machine, f"holders {GPU}").stdout
    assert snapshot(machine) == before
    assert units.active(machine, unit) == ["active"]
    units.stop(machine, unit)
    ctl(machine, f"to-vfio {GPU}")


def test_a_program_in_a_mount_namespace_with_a_node_of_its_own_is_found(machine: Machine) -> None:
    """As in a container: neither path nor inode are the host's."""
    pid = machine.sh(
        f"""set -- $(stat -L -c '%t %T' {card(GPU)})
        unshare -m sh -c "mount -t tmpfs none /mnt; mknod /mnt/node c 0x$1 0x$2; exec 3<>/mnt/node; \
            echo ready >/run/ready; exec sleep infinity" </dev/null >/dev/null 2>&1 & echo $!"""
    ).stdout.strip()
    machine.do(words.await_text, "/run/ready", "ready")
    refused = ctl(machine, f"to-vfio {GPU}", check=False)
    assert refused.status == 3
    assert f"pid {pid}" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME


def is_waiting(switch: dict[str, Any]) -> bool:
    """Whether a switch, as it is on the bus, waits until nobody has the GPU open."""
    return switch.get("kind") == "release"


@pytest.mark.smoke
def test_wait_ends_when_the_program_does(machine: Machine) -> None:
    """Meanwhile the machine is kept from sleeping, and afterwards it is not."""
    game = start_game(machine, card(GPU))
    asking = Ctl(machine, f"to-vfio {GPU} --wait 100")
    wait_prop(machine, GPU, "Switch", is_waiting)
    assert state(machine) == "detaching"
    assert kept_awake(machine)
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    machine.sh(f"kill {game}")
    wait_state(machine, GPU, "vfio")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    asking.wait()
    await_may_sleep(machine)


def test_nobody_waits_longer_than_asked(machine: Machine) -> None:
    before = snapshot(machine)
    start_game(machine, card(GPU))
    given_up = ctl(machine, f"to-vfio {GPU} --wait 2", check=False)
    assert given_up.status == 3
    assert "game.service" in given_up.stderr
    assert state(machine) == "host"
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)


@pytest.mark.smoke
def test_terminate_ends_a_unit_through_systemd_and_brings_it_back(machine: Machine) -> None:
    game = start_game(machine, card(GPU))
    ctl(machine, f"to-vfio {GPU} --busy=terminate")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    assert units.active(machine, "game") == ["inactive"]
    ctl(machine, f"to-host {GPU}")
    assert units.active(machine, "game") == ["active"]
    assert main_pid(machine, "game") != game


def test_terminate_leaves_who_does_not_listen(machine: Machine) -> None:
    """He is named, and everything is as before: units that were stopped run, the GPU is at home."""
    configure(machine, "[defaults]\ngrace_seconds = 2\n")
    deaf = start_deaf(machine, card(GPU))
    start_holder(machine, "game.service", node_of_sound(machine))
    refused = ctl(machine, f"to-vfio {GPU} --busy=terminate", check=False)
    assert refused.status == 3
    assert f"pid {deaf}" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert units.active(machine, "game") == ["active"]


def test_a_program_of_no_unit_gets_sigterm_and_the_kill_policy_is_heard(machine: Machine) -> None:
    configure(machine, "[defaults]\ngrace_seconds = 2\n")
    deaf = start_deaf(machine, card(GPU))
    assert ctl(machine, f"to-vfio {GPU} --busy=terminate", check=False).status == 3
    machine.sh(f"kill -0 {deaf}")
    ctl(machine, f"to-vfio {GPU} --busy=kill")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY


def test_pipewire_lets_go_of_the_sound_card_and_takes_it_up_again(machine: Machine) -> None:
    login(machine)
    wireplumber = start_audio(machine)
    ctl(machine, f"to-vfio {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    ctl(machine, f"to-host {GPU}")
    await_nodes(machine, wireplumber, "all", node_of_sound(machine))


def test_pipewire_takes_the_sound_card_up_again_after_a_switch_that_failed(machine: Machine) -> None:
    """Not all of what has the GPU goes; by then the card is announced as gone."""
    configure(machine, "[defaults]\ngrace_seconds = 2\n")
    login(machine)
    wireplumber = start_audio(machine)
    start_deaf(machine, card(GPU))
    assert ctl(machine, f"to-vfio {GPU} --busy=terminate", check=False).status == 3
    await_nodes(machine, wireplumber, "all", node_of_sound(machine))
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
