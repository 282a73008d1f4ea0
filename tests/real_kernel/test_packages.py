"""The Debian package on a real kernel: from nothing to a machine that has the GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuswitch import __version__
from tests.harness.debian.cache import Cache
from tests.harness.debian.downloads import find_downloads
from tests.harness.debian.package import NEWER_VERSION, find_package
from tests.harness.debian.releases import find_release
from tests.harness.debian.tools import PROJECT
from tests.harness.json_schemas import check
from tests.harness.setups import desk
from tests.harness.setups.guest import ctl, drivers, state
from tests.harness.setups.libvirt import AT_HOME, HOOK, await_home, check_given, define, virsh
from tests.harness.virtual_machines.hardware import GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine
from tests.real_kernel.conftest import RELEASE
from tests.real_kernel.test_doctor import doctor

PACKAGES = "/srv/packages"
NEXT = f"{PACKAGES}/next/gpuswitch.deb"
DPKG_SECONDS = 900
"""An emulated machine compiles Python's files for minutes."""


@pytest.fixture
def packages(cache: Cache) -> dict[str, Path]:
    """This version, with the libraries that it needs of the distribution, if any, and the next; by place."""
    release = find_release(RELEASE)
    with cache.lock():
        made = find_package(cache, release)
        libraries = find_downloads(cache, "libraries", release, release.libraries) if release.libraries else None
    here = [*made.glob("gpuswitch_*.deb"), *(libraries.glob("*.deb") if libraries else [])]
    [newer] = made.glob("newer-version/*.deb")
    return {f"{PACKAGES}/{path.name}": path for path in here} | {NEXT: newer}


def without_make_install(machine: Machine) -> None:
    """Take away what the machine was made with, as `make uninstall` does."""
    for name in ("install.sh", "maintain.sh"):
        machine.push((PROJECT / "contrib" / name).read_bytes(), f"/srv/contrib/{name}", mode=0o755)
    machine.sh("/srv/contrib/install.sh uninstall && rm -rf /etc/gpuswitch /var/lib/gpuswitch", timeout=300)
    assert machine.sh("command -v gpuswitchctl", check=False).stdout == ""


def version(machine: Machine) -> str:
    return machine.sh("gpuswitchctl --version").stdout.split()[1]


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_package_comes_gives_a_machine_the_gpu_is_upgraded_under_it_and_goes(
    machine: Machine, packages: dict[str, Path]
) -> None:
    without_make_install(machine)
    for place, package in packages.items():
        machine.push(package.read_bytes(), place)
    machine.sh(f"dpkg -i {PACKAGES}/*.deb 2>&1", timeout=DPKG_SECONDS)
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

    # The machine notices nothing of an upgrade, and no removal takes its way home.
    machine.sh(f"dpkg -i {NEXT} 2>&1", timeout=DPKG_SECONDS)
    assert version(machine) == NEWER_VERSION
    check_given(machine, "win11")
    refused = machine.sh("dpkg -r gpuswitch 2>&1", check=False, timeout=DPKG_SECONDS)
    assert refused.status != 0
    assert "cannot remove gpuswitch: a GPU cannot come home" in refused.stdout
    check_given(machine, "win11")

    # Nor does the next service know less of the way home than the one before. A removal goes it by itself.
    virsh(machine, "destroy win11")
    await_home(machine)
    ctl(machine, f"to-vfio {GPU}")
    removed = machine.sh("dpkg -r gpuswitch 2>&1", timeout=DPKG_SECONDS).stdout
    assert f"card ({GPU}) is on the host now" in removed
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
    machine.sh("dpkg -P gpuswitch 2>&1", timeout=DPKG_SECONDS)
    left = f"ls -d {HOOK} /etc/gpuswitch /var/lib/gpuswitch /run/gpuswitch /usr/bin/gpuswitchctl"
    assert machine.sh(left, check=False).stdout == ""
    virsh(machine, "start win11")
    virsh(machine, "destroy win11")
