"""The disk: the base with the harness's guest files and, as a rule, the project, installed as a user would."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.harness.debian import project
from tests.harness.debian.cache import Cache, content_key, remove
from tests.harness.debian.project import find_wheels, install_project, requirements_of
from tests.harness.debian.releases import Release
from tests.harness.debian.tools import run, run_in
from tests.harness.machines.inside import agent, words
from tests.harness.virtual_machines.base import KERNEL_VERSION, find_base
from tests.harness.virtual_machines.modules import NVIDIA_VERSIONS, find_modules, modules_key

GUEST = Path(__file__).parent / "inside"
AGENT, WORDS = Path(agent.__file__), Path(words.__file__)
GUEST_FILES = {
    AGENT: "usr/local/lib/harness/agent.py",
    WORDS: "usr/local/lib/harness/words.py",
    GUEST / "harness-agent.service": "etc/systemd/system/harness-agent.service",
    GUEST / "bus_relay.py": "usr/local/lib/harness/bus_relay.py",
    GUEST / "harness-bus.service": "etc/systemd/system/harness-bus.service",
    GUEST / "harness.rules": "etc/udev/rules.d/70-harness.rules",
    GUEST / "modprobe.conf": "etc/modprobe.d/harness.conf",
    GUEST / "nvidia.conf": "etc/modprobe.d/nvidia.conf",
    GUEST / "nvidia.rules": "etc/udev/rules.d/70-nvidia.rules",
    GUEST / "nvidia-nodes": "usr/local/lib/harness/nvidia-nodes",
}
MODULES = "usr/local/lib/harness/modules"
"""The test drivers, a folder for each version."""

MASKED = (
    # timers that a clone's jump to the present would set off
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("logrotate.timer", "systemd-tmpfiles-clean.timer", "e2scrub_reap.service"),
    # consoles: one is the kernel's log, the other the developer's shell
    *("serial-getty@ttyS0.service", "serial-getty@hvc0.service"),
)

ADD_USERS = """\
useradd --create-home --shell /bin/bash tester
# sound is for the tests that ask for it
systemctl --global --quiet disable pipewire.service pipewire.socket wireplumber.service
"""

SIZE = "5G"


def disk_key(release: Release, sources: Path | None) -> str:
    ours = (Path(__file__), Path(project.__file__), AGENT, WORDS, GUEST)
    return content_key(modules_key(release), *ours, *([sources] if sources else []))


def find_disk(cache: Cache, release: Release, sources: Path | None) -> Path:
    """The folder with disk.img, vmlinux and initrd, without the project where sources is None.

    The caller holds the cache's lock.
    """
    base = find_base(cache, release)
    kernel = (base / KERNEL_VERSION).read_text()
    modules = find_modules(cache, release, kernel)
    wheels = find_wheels(cache, release, requirements_of(sources)) if sources else None

    def build(folder: Path) -> None:
        root = folder / "root"
        root.mkdir()
        cache.say("  unpacking the base")
        run(["tar", "-C", root, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xf", base / "rootfs.tar"])
        add_guest_files(root)
        add_modules(root, modules, kernel)
        run_in(root, ADD_USERS)
        if sources and wheels:
            cache.say("  make install")
            install_project(root, sources, wheels)
        # else the first boot, emulated, does anew what the packages did when they were installed: ldconfig, catalogs.
        # As systemd-update-done(8), which Debian has from 13 on, says that it is done.
        run_in(root, "touch /etc/.updated /var/.updated")
        cache.say("  making the file system")
        run(["mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, folder / "disk.img", SIZE])
        remove(root)
        for name in ("vmlinux", "initrd"):
            os.link(base / name, folder / name)

    return cache.make(f"disk-{release.name}", disk_key(release, sources), build)


def add_guest_files(root: Path) -> None:
    for source, place in GUEST_FILES.items():
        target = root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if "lib/harness" in place else 0o644)
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (root / "etc/hostname").write_text("gpuswitch-vm\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost gpuswitch-vm\n")
    (root / "etc/resolv.conf").write_text("")
    (root / "etc/locale.conf").write_text("LANG=C.UTF-8\n")


def add_modules(root: Path, modules: Path, kernel: str) -> None:
    """All versions for the tests to choose from, and the first where modprobe finds it."""
    shutil.copytree(modules, root / MODULES)
    shutil.copytree(root / MODULES / NVIDIA_VERSIONS[0], root / "lib/modules" / kernel / "updates")
    run_in(root, f"depmod {kernel}")
