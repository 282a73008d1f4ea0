"""What the doctor reads of Incus, from its real daemon: that of Debian 14, which is the first release to have 7.0.

pytestmark = pytest.mark.beside

No virtual machine of it can be made here: it wants KVM. A container's definition is made one in its database.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.doctor.looks.incus import SOCKETS, UNIT, devices
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.seen import IncusDevice
from tests.harness.containers.container import Container
from tests.harness.containers.words import until
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.debian.roots import find_root
from tests.real_system.conftest import Boot

PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "procps", "incus-base", "incus-client")


@pytest.fixture
def machine(boot: Boot, request: pytest.FixtureRequest) -> Container:
    cache = Cache(default_folder(), progress(request.config))
    with cache.lock():
        root = find_root(cache, "incus", find_release("forky"), PACKAGES)
    return boot([root])


def root_of(machine: Container) -> str:
    """As others on this machine see its files."""
    [init] = Path(f"/proc/{machine.keeper.pid}/task/{machine.keeper.pid}/children").read_text().split()
    return f"/proc/{init}/root"


def test_what_its_daemon_says_is_read(machine: Container) -> None:
    machine.sh("systemctl start incus; incus storage create pool dir")
    for name in ("win11", "c1"):
        machine.sh(f"incus create {name} --empty --storage pool")
    machine.sh("incus config device add c1 all gpu; incus config device add win11 card gpu pci=01:00.0")
    machine.sh("incus profile create gpus; incus profile device add gpus any gpu vendorid=10de productid=2484")
    machine.sh("incus profile create sounds; incus profile device add sounds sound pci address=01:00.1")
    # What docs/incus.md has a unit wait by.
    machine.sh("timeout 60 incus wait win11 status=stopped")
    machine.sh("incus admin sql global 'UPDATE instances SET type = 1 WHERE name = \"win11\"'")
    found = devices(Files(Machine(root_of(machine))), SOCKETS[0])
    assert sorted(found, key=lambda each: each.name) == [
        IncusDevice("c1", "container", "all", "gpu"),
        IncusDevice("gpus", "profile", "any", "gpu", ids=("10de", "2484")),
        IncusDevice("win11", "virtual-machine", "card", "gpu", function="0000:01:00.0"),
        IncusDevice("sounds", "profile", "sound", "pci", function="0000:01:00.1"),
    ]


def test_its_socket_is_there_when_it_does_not_run(machine: Container) -> None:
    """So whoever connects would start it: the doctor asks systemd first."""
    machine.sh(f"systemctl stop {UNIT}")
    assert machine.sh(f"test -S {SOCKETS[0]}; systemctl is-active {UNIT} incus.socket", check=False).stdout.split() == [
        "inactive",
        "active",
    ]
    machine.sh("incus list")
    until(machine, f"systemctl -q is-active {UNIT}")
