"""`setup boot`: with an initrd that the machine makes itself, one of twins is on vfio-pci before any driver; and back.

Debian's kernel packages make an initrd; this machine was made without, so what they would know of it is put in first.
"""

from __future__ import annotations

import json

import pytest

from tests.harness.debian.cache import Cache
from tests.harness.debian.downloads import find_downloads
from tests.harness.debian.releases import find_release
from tests.harness.setups.guest import ctl, drivers, prop, state
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.harness.virtual_machines.machine import Machine
from tests.real_kernel.conftest import RELEASE

DEFAULT = {"bookworm": "initramfs-tools", "trixie": "initramfs-tools", "forky": "dracut"}[RELEASE]
"""What the release's kernel brings along."""
INITRD = "/boot/initrd.img-$(uname -r)"
HAS_ONE = f"touch {INITRD}; mkdir -p /var/lib/initramfs-tools; touch /var/lib/initramfs-tools/$(uname -r)"
SMALL = {
    # Of what takes minutes under emulation: modules of other machines, and the last byte that packing saves.
    "/etc/initramfs-tools/conf.d/small": "MODULES=dep\nCOMPRESSLEVEL=1\n",
    # This machine has busybox for the harness's own initrd. In dracut's, its modprobe loads no packed module.
    "/etc/dracut.conf.d/small.conf": 'hostonly="yes"\ncompress="cat"\nomit_dracutmodules+=" busybox "\n',
}
MAKING_SECONDS = 1500
"""An emulated machine has one processor of two to itself, and all that makes an initrd is thousands of processes."""


def kernel_log(machine: Machine, *words: str) -> list[str]:
    """Its lines with one of these words, without their times, in order."""
    lines = machine.sh("dmesg --notime").stdout.splitlines()
    return [line for line in lines if any(word in line for word in words)]


def made(machine: Machine, command: str) -> None:
    """Make an initrd, and start the machine with it."""
    machine.sh(command, timeout=MAKING_SECONDS)
    machine.boot_with(INITRD, timeout=MAKING_SECONDS)
    # Not wait_until_up: where systemd runs in the initrd, journald counts as started anew when the root changes.
    machine.sh("systemctl is-system-running --wait >/dev/null; udevadm settle", timeout=MAKING_SECONDS)


@pytest.fixture(params=["initramfs-tools", "dracut"])
def tool(request: pytest.FixtureRequest, cache: Cache, machine: Machine) -> str:
    """What makes the initrd of this machine."""
    name: str = request.param
    if name != DEFAULT:
        with cache.lock():
            packages = find_downloads(cache, name, find_release(RELEASE), [name])
        for package in packages.glob("*.deb"):
            machine.push(package.read_bytes(), f"/srv/packages/{package.name}")
        # Only one of them may be there, and the kernel's package needs one.
        replace = f"dpkg --remove --force-depends {DEFAULT} && dpkg --install --skip-same-version /srv/packages/*.deb"
        machine.sh(f"({replace}) 2>&1", timeout=MAKING_SECONDS)
    return name


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_one_of_twins_is_on_vfio_before_any_driver_and_comes_home_and_is_the_hosts_again(
    machine: Machine, tool: str
) -> None:
    for place, text in SMALL.items():
        machine.push(text, place)
    machine.sh(HAS_ONE)
    told = json.loads(machine.sh(f"gpuswitchctl setup boot --gpu {GPU} --dry-run --json").stdout)
    assert told["tool"] == tool

    made(machine, f"gpuswitchctl setup boot --gpu {GPU} --yes >/dev/null")
    assert kernel_log(machine, "gpuswitch:") == [
        f"gpuswitch: {GPU} is on vfio-pci",
        f"gpuswitch: {GPU_AUDIO} is on vfio-pci",
    ]
    # The twin got its driver, and later; the card has met none.
    said = kernel_log(machine, "gpuswitch:", "bochs-drm", "snd_hda_intel")
    assert [line for line in said if GPU in line or GPU_AUDIO in line] == said[:2]
    assert drivers(machine, GPU, GPU_AUDIO, SINGLE_GPU) == ["vfio-pci", "vfio-pci", DISPLAY_DRIVER]
    assert (state(machine), prop(machine, GPU, "Reason")) == ("vfio", "")
    found = json.loads(machine.sh(f"gpuswitchctl doctor {GPU} --json", check=False).stdout)["findings"]
    assert [each["severity"] for each in found if each["kind"] == "early"] == ["ok"]

    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    assert machine.read(f"/sys/bus/pci/devices/{GPU}/driver_override") == "(null)\n"
    ctl(machine, f"to-vfio {GPU}")

    made(machine, "gpuswitchctl setup boot undo >/dev/null")
    assert kernel_log(machine, "gpuswitch:") == []
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    assert (state(machine), prop(machine, GPU, "Reason")) == ("host", "")
