"""A system that lacks something: the service starts, says what is missing, and does the rest."""

from __future__ import annotations

import json

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, ctl, prop, show, simulated
from tests.real_system.conftest import Boot

NO_HARDWARE = """set -e
mount -t tmpfs none /sys/bus/pci
mkdir /sys/bus/pci/devices /sys/bus/pci/drivers
mount -t tmpfs none /sys/kernel/iommu_groups
"""
CONFIG = {"/etc/gpuswitch/config.toml": f'[[gpu]]\naddress = "{GPU}"\nname = "spare"\n'}


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    return boot(system.installed, {**simulated(scenario="plain"), **CONFIG})


def log(machine: Container) -> str:
    return machine.sh("journalctl --sync; journalctl -b -u gpuswitchd -o cat").stdout


def fill(machine: Container, folder: str) -> None:
    """A disk of its own for this folder, and on it no room for anything."""
    machine.sh(f"mkdir -p {folder}; mount -t tmpfs -o size=1m,mode=755 none {folder}")
    machine.sh(f"dd if=/dev/zero of={folder}/full bs=4k 2>/dev/null", check=False)


def switch(machine: Container) -> None:
    for target, state in (("to-vfio", "vfio"), ("to-host", "host")):
        ctl(machine, f"{target} spare")
        assert prop(machine, "State") == state


def test_without_a_gpu_an_iommu_libvirt_polkit_and_prometheus(boot: Boot, system: System) -> None:
    machine = boot(system.installed)
    machine.sh("systemctl stop gpuswitchd; systemctl mask --now --quiet polkit")
    machine.sh(NO_HARDWARE)
    machine.sh("systemctl start gpuswitchd")
    assert (show(machine, "ActiveState"), show(machine, "NRestarts")) == ("active", "0")
    assert "metrics on 127.0.0.1 port 9752" in log(machine)
    assert ctl(machine, "list").stdout == "there is no GPU on this host\n"
    refused = ctl(machine, "to-vfio", check=False)
    assert (refused.status, refused.stderr) == (
        2,
        "gpuswitchctl: cannot move the GPU to vfio: this host has no GPU\n",
    )
    refused = ctl(machine, "setup --yes", check=False)
    assert refused.status != 0
    assert "there is no GPU on this host" in refused.stderr

    examined = ctl(machine, "doctor --json", check=False)
    told = json.loads(examined.stdout)
    assert (examined.status, told["severity"]) == (2, "problem")
    found = {each["kind"]: (each["severity"], each["reason"]) for each in told["findings"]}
    assert found["iommu"] == ("problem", "the IOMMU is off")
    assert found["polkit"][0] == "warning"
    assert found["libvirt"] == ("ok", "libvirt is not installed")
    assert found["service"][0] == "ok"


def test_with_an_etc_that_cannot_be_written(machine: Container) -> None:
    """Nothing that the service does needs that. Who wants to write there is told so: test_setup.py."""
    machine.sh("mount --bind /etc /etc && mount -o remount,bind,ro /etc")
    machine.sh("systemctl restart gpuswitchd")
    switch(machine)
    machine.sh("systemctl reload gpuswitchd")


def test_with_a_full_disk_below_etc(machine: Container) -> None:
    fill(machine, "/etc/gpuswitch/conf.d")
    machine.sh("systemctl restart gpuswitchd")
    switch(machine)
    machine.sh("systemctl reload gpuswitchd")


def test_with_a_full_disk_below_var(machine: Container) -> None:
    """GPUs go to and fro; the history is what is missing, and comes back."""
    machine.sh("systemctl stop gpuswitchd; rm -rf /var/lib/gpuswitch/*")
    fill(machine, "/var/lib/gpuswitch")
    machine.sh("systemctl start gpuswitchd")
    switch(machine)
    why = "cannot use /var/lib/gpuswitch/history.db: database or disk is full"
    assert f"the history is not kept for now: {why}" in log(machine)
    refused = ctl(machine, "history", check=False)
    assert refused.status != 0
    assert f"the history cannot be read: {why}" in refused.stderr


def test_with_a_full_disk_below_run(machine: Container) -> None:
    """What is on its way is written down before it begins: without room for that, nothing does."""
    machine.sh("systemctl stop gpuswitchd")
    fill(machine, "/run/gpuswitch")
    machine.sh("systemctl start gpuswitchd")
    refused = ctl(machine, "to-vfio spare", check=False)
    assert refused.status == 1
    assert refused.stderr.endswith("(No space left on device), so nothing was changed\n")
    assert prop(machine, "State") == "host"
    machine.sh("rm /run/gpuswitch/full")
    switch(machine)
