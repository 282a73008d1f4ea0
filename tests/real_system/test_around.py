"""What a switch needs of the machine around a GPU: real units and locks, while the GPU itself is a simulated one."""

from __future__ import annotations

import json

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    GPU,
    NAME,
    ROOT,
    call,
    ctl,
    hybrid,
    prop,
    show,
    start_switch,
    until,
    until_all_is_given_back,
    until_state,
)
from tests.harness.domains import DOMAIN, UUID
from tests.real_system.conftest import Boot

IDLE = "[Service]\nExecStart=/bin/sleep infinity\n"
INHIBITORS = "busctl --json=short call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager"


KEPT_AWAKE = (
    'for lock in /run/systemd/inhibit/*; do [ ! -f $lock ] || ! grep -q "^WHO=gpuswitch" $lock || cat $lock; done'
)
"""What logind has on disk of the locks that are ours. Without its bus it may not answer for a while (systemd 262)."""


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    return boot(system.installed, {**hybrid("unbind@0000:01:00.1=3s"), **units()})


def units() -> dict[str, str]:
    """Units that an administrator may have."""
    texts = {
        "idle": IDLE,
        "busy": IDLE,
        "desktop": IDLE,
        "fixed": f"[Unit]\nRefuseManualStop=yes\n{IDLE}",
        # systemd would wait for the service before it starts this, and the service for this: nobody does
        "display-manager": f"[Unit]\nAfter=gpuswitchd.service\n{IDLE}",
    }
    return {f"/run/systemd/system/{name}.service": text for name, text in texts.items()}


def configure(machine: Container, toml: str) -> None:
    machine.push(toml, "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")


def active(machine: Container, *names: str) -> list[str]:
    return machine.sh(f"systemctl is-active {' '.join(names)}", check=False).stdout.split()


def locks(machine: Container) -> list[int]:
    """The processes that keep the machine awake for us, as logind has them."""
    (rows,) = json.loads(machine.sh(f"{INHIBITORS} ListInhibitors").stdout)["data"]
    return [pid for what, who, _, mode, _, pid in rows if (who, mode) == ("gpuswitch", "block") and "sleep" in what]


def until_no_lock(machine: Container, *pids: int) -> None:
    """Logind hears of the end of a holder when it comes to it."""
    until(machine, f"! {INHIBITORS} ListInhibitors | grep -q gpuswitch")
    for pid in pids:
        until(machine, f"[ ! -e /proc/{pid} ]")


def test_units_that_were_off_stay_off(machine: Container) -> None:
    machine.sh("systemctl start busy")
    configure(machine, '[defaults]\nstop_units = ["idle.service", "busy.service"]\n')
    ctl(machine, f"to-vfio {GPU}")
    assert active(machine, "idle", "busy") == ["inactive", "inactive"]
    ctl(machine, f"to-host {GPU}")
    assert active(machine, "idle", "busy") == ["inactive", "active"]


def test_a_unit_that_does_not_exist_and_one_that_may_not_be_stopped(machine: Container) -> None:
    machine.sh("systemctl start fixed")
    for unit, status in (("nothing.service", 3), ("fixed.service", 1)):
        failed = ctl(machine, f"to-vfio {GPU} --stop-unit {unit}", check=False)
        assert (failed.status, failed.stderr.count(unit) > 0) == (status, True)
        assert prop(machine, "State") == "host"
    assert active(machine, "fixed") == ["active"]


def test_a_unit_of_ones_choice_is_started_when_it_is_back(machine: Container) -> None:
    configure(machine, '[defaults]\nafter_host = "desktop.service"\n')
    ctl(machine, f"to-vfio {GPU}")
    assert active(machine, "desktop") == ["inactive"]
    ctl(machine, f"to-host {GPU}")
    assert active(machine, "desktop") == ["active"]


def test_the_machine_is_kept_awake_during_a_switch(machine: Container) -> None:
    switch = start_switch(machine, "ToVfio")
    until_state(machine, "detaching")
    until(machine, f"{INHIBITORS} ListInhibitors | grep -q gpuswitch")
    [holder] = locks(machine)
    assert GPU in machine.sh("systemd-inhibit --list --no-pager").stdout
    assert show(machine, "MainPID") != str(holder)
    until_state(machine, "vfio")
    assert prop(machine, "Switch")["id"]["data"] == switch
    until_no_lock(machine, holder)


@pytest.mark.parametrize("end", ["systemctl kill --kill-whom=main -s KILL gpuswitchd", "systemctl restart gpuswitchd"])
def test_what_a_service_left_is_found_and_given_back_by_the_next(machine: Container, end: str) -> None:
    """The units that it had stopped and the lock that keeps the machine awake, which outlive it."""
    machine.sh("systemctl start display-manager busy")
    configure(machine, '[defaults]\nstop_units = ["display-manager.service", "busy.service"]\n')
    before = show(machine, "MainPID")
    start_switch(machine, "ToVfio")
    until(machine, f"{INHIBITORS} ListInhibitors | grep -q gpuswitch && ! systemctl -q is-active display-manager")
    [holder] = locks(machine)
    machine.sh(f"timeout 60 {end}")
    until(machine, f"[ $(systemctl show -P MainPID gpuswitchd) != {before} ]")
    until(machine, "systemctl -q is-active gpuswitchd")
    until(machine, "systemctl -q is-active display-manager busy")
    until_all_is_given_back(machine)
    assert prop(machine, "State") == "host"
    until_no_lock(machine, holder)


def test_what_a_virtual_machine_has_is_as_it_was_after_the_bus_was_gone(machine: Container) -> None:
    """Its GPU, the owner, and the lock that keeps the machine awake; which is the same one, without a gap."""
    configure(machine, f'[[gpu]]\naddress = "{GPU}"\n')
    machine.push(f"<domstatus>{DOMAIN}</domstatus>", "/run/libvirt/qemu/win 10.xml")
    machine.push("", "/run/harness/on-vfio")
    acquired = call(machine, ROOT, f"{NAME}.Manager.AcquireForVm", "ssas", "win 10", UUID, "1", GPU)
    assert acquired == [[GPU]]
    wanted = {"State": "vfio", "Driver": "vfio-pci", "Owner": ["win 10", UUID]}
    assert {name: prop(machine, name) for name in wanted} == wanted
    other = {name: prop(machine, name, "0000:00:02.0") for name in ("State", "Driver", "Owner")}
    [holder] = locks(machine)
    kept = machine.sh(KEPT_AWAKE).stdout
    assert f"PID={holder}\n" in kept
    before = show(machine, "MainPID")
    machine.sh("systemctl kill --kill-whom=main -s KILL dbus.service")
    until(machine, f"[ $(systemctl show -P MainPID gpuswitchd) != {before} ]")
    until(machine, "systemctl -q is-active gpuswitchd")
    assert {name: prop(machine, name) for name in wanted} == wanted
    assert {name: prop(machine, name, "0000:00:02.0") for name in other} == other
    assert machine.sh(KEPT_AWAKE).stdout == kept
    assert machine.sh(f"[ -e /proc/{holder} ]", check=False).status == 0


def test_a_lock_lives_on_while_no_service_runs(machine: Container) -> None:
    """As long as nobody knows where the GPU is, the machine is not to sleep."""
    machine.push("[Service]\nRestart=no\n", "/run/systemd/system/gpuswitchd.service.d/once.conf")
    machine.sh("systemctl daemon-reload")
    start_switch(machine, "ToVfio")
    until(machine, f"{INHIBITORS} ListInhibitors | grep -q gpuswitch")
    [holder] = locks(machine)
    machine.sh("systemctl kill --kill-whom=main -s KILL gpuswitchd")
    until(machine, "systemctl -q is-failed gpuswitchd")
    assert locks(machine) == [holder]
    # of a unit that has failed, systemd ends what is left when it starts it anew, but for KillMode=process
    machine.sh("systemctl start gpuswitchd")
    until_no_lock(machine, holder)
    assert prop(machine, "State") == "host"
