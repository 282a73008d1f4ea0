"""A GPU that somebody has open: named, waited for, ended, or left alone, on the real kernel with real systemd."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vm.guest import configure, ctl, drivers, node_of_sound, snapshot, state, wait_state
from tests.vm.rig.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.vm.rig.machine import Machine
from tests.vm.stage.desk import await_nodes, login, start_audio
from tests.vm.stage.programs import await_end, card, main_pid, start_game, start_holder, start_mapper

AT_HOME = [DISPLAY_DRIVER, AUDIO_DRIVER]
AWAY = ["vfio-pci", "vfio-pci"]


def start_deaf(machine: Machine, node: str) -> str:
    """A program that does not listen to SIGTERM; returns its pid.

    In a scope, as a session's: systemd does not start its programs, so it is they themselves who are asked to end.
    """
    machine.sh(
        f"""mkfifo /run/fifo
        systemd-run --scope --unit=deaf sh -c 'trap "" TERM; exec 3<>{node}; echo $$ >/run/ready; read -r line' \
            <>/run/fifo >/dev/null 2>&1 &
        until [ -s /run/ready ]; do :; done"""
    )
    return machine.sh("cat /run/ready").stdout.strip()


@pytest.mark.parametrize(("start", "unit"), [(start_game, "game.service"), (start_mapper, "mapper.service")])
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
    assert machine.sh(f"systemctl is-active {unit}").stdout == "active\n"
    machine.sh(f"systemctl stop {unit}")
    ctl(machine, f"to-vfio {GPU}")


def test_a_program_in_a_mount_namespace_with_a_node_of_its_own_is_found(machine: Machine) -> None:
    """As in a container: neither path nor inode are the host's."""
    pid = machine.sh(
        f"""set -- $(stat -L -c '%t %T' {card(GPU)})
        unshare -m sh -c "mount -t tmpfs none /mnt; mknod /mnt/node c 0x$1 0x$2; exec 3<>/mnt/node; \
            echo ready >/run/ready; exec sleep infinity" </dev/null >/dev/null 2>&1 & pid=$!
        until [ -e /run/ready ]; do :; done; echo $pid"""
    ).stdout.strip()
    refused = ctl(machine, f"to-vfio {GPU}", check=False)
    assert refused.status == 3
    assert f"pid {pid}" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME


def test_wait_ends_when_the_program_does(machine: Machine) -> None:
    """Meanwhile the machine is kept from sleeping, and afterwards it is not."""
    game = start_game(machine, card(GPU))
    machine.sh(f"gpuswitchctl to-vfio {GPU} --wait 100 >/run/said 2>&1 & echo $! >/run/pid")
    wait_state(machine, GPU, "detaching")
    machine.sh(f"until gpuswitchctl status {GPU} | grep -q 'wait until nobody'; do :; done")
    assert "gpuswitch" in machine.sh("systemd-inhibit --list").stdout
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    machine.sh(f"kill {game}")
    wait_state(machine, GPU, "vfio")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    await_end(machine, machine.sh("cat /run/pid").stdout.strip())
    assert "gpuswitch" not in machine.sh("systemd-inhibit --list").stdout


def test_nobody_waits_longer_than_asked(machine: Machine) -> None:
    before = snapshot(machine)
    start_game(machine, card(GPU))
    given_up = ctl(machine, f"to-vfio {GPU} --wait 2", check=False)
    assert given_up.status == 1
    assert "game.service" in given_up.stderr
    assert state(machine) == "host"
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)


def test_terminate_ends_a_unit_through_systemd_and_brings_it_back(machine: Machine) -> None:
    game = start_game(machine, card(GPU))
    ctl(machine, f"to-vfio {GPU} --busy=terminate")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    assert machine.sh("systemctl is-active game", check=False).stdout == "inactive\n"
    ctl(machine, f"to-host {GPU}")
    assert machine.sh("systemctl is-active game").stdout == "active\n"
    assert main_pid(machine, "game") != game


def test_terminate_leaves_who_does_not_listen(machine: Machine) -> None:
    """He is named, and everything is as before: units that were stopped run, the GPU is at home."""
    configure(machine, "[defaults]\ngrace_seconds = 2\n")
    deaf = start_deaf(machine, card(GPU))
    start_holder(machine, "game.service", node_of_sound(machine))
    refused = ctl(machine, f"to-vfio {GPU} --busy=terminate", check=False)
    assert refused.status == 1
    assert f"pid {deaf}" in refused.stderr
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    assert machine.sh("systemctl is-active game").stdout == "active\n"


def test_a_program_of_no_unit_gets_sigterm_and_the_kill_policy_is_heard(machine: Machine) -> None:
    configure(machine, "[defaults]\ngrace_seconds = 2\n")
    deaf = start_deaf(machine, card(GPU))
    assert ctl(machine, f"to-vfio {GPU} --busy=terminate", check=False).status == 1
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
    assert ctl(machine, f"to-vfio {GPU} --busy=terminate", check=False).status == 1
    await_nodes(machine, wireplumber, "all", node_of_sound(machine))
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME


def test_a_unit_that_does_not_exist_and_one_that_may_not_be_stopped(machine: Machine) -> None:
    machine.push(
        "[Unit]\nRefuseManualStop=yes\n[Service]\nExecStart=/bin/sleep infinity\n", "/etc/systemd/system/fixed.service"
    )
    machine.sh("systemctl daemon-reload && systemctl start fixed")
    for unit, word in (("nothing.service", "nothing.service"), ("fixed.service", "fixed.service")):
        failed = ctl(machine, f"to-vfio {SINGLE_GPU} --stop-unit {unit}", check=False)
        assert failed.status == 1
        assert word in failed.stderr
        assert state(machine, SINGLE_GPU) == "host"
    assert machine.sh("systemctl is-active fixed").stdout == "active\n"


def test_units_that_were_off_stay_off(machine: Machine) -> None:
    machine.push("[Service]\nExecStart=/bin/sleep infinity\n", "/etc/systemd/system/idle.service")
    machine.push("[Service]\nExecStart=/bin/sleep infinity\n", "/etc/systemd/system/busy.service")
    machine.sh("systemctl daemon-reload && systemctl start busy")
    configure(machine, '[defaults]\nstop_units = ["idle.service", "busy.service"]\n')
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    assert machine.sh("systemctl is-active idle busy", check=False).stdout == "inactive\ninactive\n"
    ctl(machine, f"to-host {SINGLE_GPU}")
    assert machine.sh("systemctl is-active idle busy", check=False).stdout == "inactive\nactive\n"
