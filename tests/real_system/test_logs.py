"""The log in a real journal: found by its fields, explained by the catalog; and a report, with nobody's names in it."""

from __future__ import annotations

import json

import pytest

from gpuswitch.log import events
from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import AS_NOBODY, GPU, NAME, ctl, simulated
from tests.real_system.conftest import Boot

MANAGER = f"busctl call {NAME} /org/gpuswitch1 {NAME}.Manager"
UUID = "5c9b1a7e-2f4d-4c1b-9a57-3e0f8d6b2c41"
HOME = "/home"
MAC, ADDRESS, SERIAL = "52:54:00:ab:cd:ef", "203.0.113.77", "SN0324A17X"
TOKEN = "glpat-ZmFrZXRva2Vu1234"  # noqa: S105 -- of nobody
PLANTED = (
    *("secretbox", "example.org", "kimberley", "Kim Example", "payroll-vm", UUID, MAC, ADDRESS, SERIAL, TOKEN),
    *("hiddengame", "jdoe", "payroll-old"),
)
CONFIG = f"""
[[gpu]]
address = "{GPU}"
name = "geforce"
"""


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    return boot(system.installed, {**simulated("probe@0000:01:00.0#1=EINVAL"), "/etc/gpuswitch/config.toml": CONFIG})


def lines(machine: Container, *matches: str) -> list[dict[str, str]]:
    said = machine.sh(f"journalctl --sync; journalctl -b -u gpuswitchd -o json {' '.join(matches)}").stdout
    return [json.loads(each) for each in said.splitlines()]


def test_a_switch_is_found_by_its_id_and_explained(machine: Container) -> None:
    assert ctl(machine, f"to-vfio {GPU}", check=False).status == 1
    switch = json.loads(ctl(machine, "history --json").stdout)["switches"][0]["id"]
    found = lines(machine, f"SWITCH_ID={switch}")
    assert {each["GPU"] for each in found} == {GPU}
    [end] = [each for each in found if each.get("MESSAGE_ID") == events.SWITCH_REVERTED.message_id]
    assert (end["RESULT"], end["TARGET"], end["SYSLOG_IDENTIFIER"]) == ("reverted", "vfio", "gpuswitchd")
    explained = machine.sh(f"journalctl -b -x -u gpuswitchd MESSAGE_ID={end['MESSAGE_ID']}").stdout
    assert f"Subject: The switch of GPU {GPU} to vfio did not work, and was taken back" in explained
    assert f"gpuswitchctl show {switch}" in explained


def test_each_state_has_one_line(machine: Container) -> None:
    ctl(machine, f"to-vfio {GPU}", check=False)
    states = [each["STATE"] for each in lines(machine, f"MESSAGE_ID={events.STATE.message_id}", f"GPU={GPU}")]
    assert states == ["host", "detaching", "recovering", "host"]


def test_nobodys_names_are_in_a_report(machine: Container) -> None:
    """Whatever of a person, of the network or of a machine stands where a report looks."""
    machine.sh(
        f"""set -e
        hostname secretbox
        echo secretbox >/etc/hostname
        echo '{ADDRESS} secretbox.example.org' >>/etc/hosts
        echo '0.0.0.0 target state' >>/etc/hosts
        echo 'search example.org' >/etc/resolv.conf
        useradd -m -u 1234 -c 'Kim Example,Room 7' kimberley
        usermod -aG gpuswitch kimberley"""
    )
    ctl(machine, f"to-vfio {GPU}", check=False)  # it fails once
    machine.sh(f"{MANAGER} AcquireForVm ssas payroll-vm {UUID} 2 {GPU} 0000:01:00.1")
    said = (
        f"{MAC} {ADDRESS} Serial Number: {SERIAL} token={TOKEN}",
        f"{HOME}/kimberley/.ssh secretbox.example.org of Kim Example ({UUID})",
        "NVRM: Xid (PCI:0000:01:00): 31, pid=4242, name=hiddengame.exe, Ch 00000008: hiddengame of jdoe",
        "x (pid 7, session 2 of jdoe) has it; GPU belongs to the virtual machine payroll-old: shut that down first",
    )
    group = "/sys/fs/cgroup/system.slice/gpuswitchd.service/cgroup.procs"
    for each in said:
        # Whose line it is, journald asks the kernel: the writer has to be there still.
        there = f"journalctl -b -u gpuswitchd -o cat | grep -qxF '{each}'"
        machine.sh(f"echo $$ >{group}; {{ echo '{each}'; until {there}; do :; done; }} | systemd-cat")
    text = ctl(machine, "report --output -").stdout
    assert "Serial Number: <serial-1> token=<token-1>" in text
    assert [each for each in PLANTED if each.casefold() in text.casefold()] == []
    assert '"name": "<machine-1>"' in text
    assert '"target": "vfio"' in text
    for title in ("Journal pages of the service", "Log of the service since the machine was started"):
        assert f"## {title}" in text


def test_a_report_without_the_service_says_what_is_wrong_in_etc(machine: Container) -> None:
    machine.sh("systemctl stop gpuswitchd; systemctl mask --runtime gpuswitchd")
    fine = ctl(machine, "report --output -").stdout
    assert f'gpu[{GPU}].name = "geforce"  (/etc/gpuswitch/config.toml)' in fine
    machine.sh("printf '[deadlines]\\nunbind = true\\n' >>/etc/gpuswitch/config.toml")
    wrong = ctl(machine, "report --output -").stdout
    assert "\nfault: cannot use /etc/gpuswitch/config.toml:" in wrong


def test_a_user_is_told_what_is_not_in_it(machine: Container) -> None:
    said = machine.sh(f"{AS_NOBODY} gpuswitchctl report --output /tmp/report.md").stdout
    assert "not in it: log of the service since the machine was started: only root and the groups" in said
    assert "root can see more: sudo gpuswitchctl report" in said
    assert machine.sh("stat -c '%a %U' /tmp/report.md").stdout == "600 nobody\n"
