"""The Debian package on a real kernel: from nothing to a machine that has the GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuswitch import __version__
from tests.harness.debian.cache import Cache
from tests.harness.debian.downloads import find_downloads
from tests.harness.debian.package import find_package
from tests.harness.debian.releases import find_release
from tests.harness.debian.tools import PROJECT
from tests.harness.json_schemas import check
from tests.harness.setups import desk
from tests.harness.setups.guest import state
from tests.harness.setups.libvirt import check_given, define, virsh
from tests.harness.virtual_machines.hardware import GPU
from tests.harness.virtual_machines.machine import Machine
from tests.real_kernel.conftest import RELEASE
from tests.real_kernel.test_doctor import doctor


@pytest.fixture
def packages(cache: Cache) -> list[Path]:
    """This version, with the libraries that it needs of the distribution, if any."""
    release = find_release(RELEASE)
    with cache.lock():
        made = find_package(cache, release)
        libraries = find_downloads(cache, "libraries", release, release.libraries) if release.libraries else None
    return [*made.glob("gpuswitch_*.deb"), *(sorted(libraries.glob("*.deb")) if libraries else [])]


def without_make_install(machine: Machine) -> None:
    """Take away what the machine was made with, as `make uninstall` does."""
    for name in ("install.sh", "maintain.sh"):
        machine.push((PROJECT / "contrib" / name).read_bytes(), f"/srv/contrib/{name}", mode=0o755)
    machine.sh("/srv/contrib/install.sh uninstall && rm -rf /etc/gpuswitch /var/lib/gpuswitch", timeout=300)
    assert machine.sh("command -v gpuswitchctl", check=False).stdout == ""


def version(machine: Machine) -> str:
    return machine.sh("gpuswitchctl --version").stdout.split()[1]


@pytest.mark.campaign
@pytest.mark.timeout(2400)
def test_a_package_comes_the_doctor_is_content_and_a_machine_has_the_gpu(
    machine: Machine, packages: list[Path]
) -> None:
    without_make_install(machine)
    for package in packages:
        machine.push(package.read_bytes(), f"/srv/packages/{package.name}")
    machine.sh("dpkg -i /srv/packages/*.deb 2>&1", timeout=900)
    assert (version(machine), state(machine)) == (__version__, "host")

    # What logind says of who sits there, and libvirt of its machine, which is to get the sound as well.
    desk.login(machine)
    define(machine, "win11", GPU)
    setup = f"gpuswitchctl setup --gpu {GPU} --name card --vm WIN11 --json --screens"
    told = json.loads(machine.sh(f"{setup} one --dry-run").stdout)
    assert (told["session"], told["vm"], told["changed"]) == ("tty", "win11", False)
    told = json.loads(machine.sh(f"{setup} two --yes").stdout)
    check("setup", told)
    assert (told["vm"], told["changed"]) == ("win11", True)
    [attach] = told["commands"]
    machine.sh(attach)
    assert json.loads(machine.sh(f"{setup} two --yes").stdout)["commands"] == []
    assert doctor(machine) == (0, {})
    virsh(machine, "start win11")
    check_given(machine, "win11")
