"""The template: a machine that was booted once and lies saved, and the clones of it."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.project import project_sources
from tests.harness.debian.releases import Release, find_release
from tests.harness.debian.tools import PROJECT, require_root, run
from tests.harness.machines import agent
from tests.harness.machines import machine as any_machine
from tests.harness.machines.inside import words
from tests.harness.virtual_machines import machine, qemu
from tests.harness.virtual_machines.disk import disk_key, find_disk
from tests.harness.virtual_machines.hardware import Hardware
from tests.harness.virtual_machines.machine import Machine

VERSIONS = "versions"

SAY_VERSIONS = """\
bus=$(systemctl show -p Id --value dbus.service)
# dbus-broker.service has that name as its second; dbus-daemon is in dbus.service
bus=${bus%.service}; if [ "$bus" = dbus ]; then bus=dbus-daemon; fi
printf 'linux %s' "$(uname -v | cut -d ' ' -f 5)"
dpkg-query -W -f ', ${Package} ${Version}' systemd "$bus" libvirt-daemon qemu-system-x86 python3 pipewire wireplumber
"""


@dataclass(frozen=True)
class Template:
    hardware: Hardware
    folder: Path

    @property
    def versions(self) -> str:
        """One line: the kernel and the Debian packages in it that the project has to do with."""
        return (self.folder / VERSIONS).read_text()

    def clone(self) -> Machine:
        """A pristine machine, running; the caller kills it."""
        return Machine(self.hardware, self.folder)


def find_template(
    cache: Cache, release: str, *, hardware: Hardware | None = None, project: Path | None = PROJECT
) -> Template:
    """The template for a Debian release, built first where need be: that takes minutes.

    `project` is the tree that is installed in it. None leaves a bare Debian: for work on the harness itself.

    Raises:
        HarnessError: it cannot be built; the text says why.
    """
    found = find_release(release)
    with project_sources(project) if project else nullcontext() as sources:
        return _find(cache, found, hardware or Hardware(), sources)


def _find(cache: Cache, release: Release, hardware: Hardware, sources: Path | None) -> Template:
    version = run(["qemu-system-x86_64", "--version"]).decode()
    ours = (agent.__file__, any_machine.__file__, qemu.__file__, machine.__file__, __file__)
    # a saved state belongs to the QEMU that saved it
    key = content_key(disk_key(release, sources), json.dumps(asdict(hardware)), version, *map(Path, ours))
    kind = f"template-{release.name}"
    if entry := cache.find(kind, key):
        return Template(hardware, entry)

    require_root()
    with cache.lock():
        disk = find_disk(cache, release, sources)

        def build(folder: Path) -> None:
            # links: a template stays whole when the disk's own entry is pruned
            for name in ("disk.img", qemu.KERNEL, qemu.INITRD):
                os.link(disk / name, folder / name)
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.img", "-F", "raw", qemu.DISK], folder=folder)
            cache.say("  booting, about a minute")
            with Machine(hardware, folder, clone=False) as booted:
                booted.wait_until_up()
                (folder / VERSIONS).write_text(booted.sh(SAY_VERSIONS).stdout)
                # clones have it in memory then
                booted.do(words.look, [])
                cache.say("  saving")
                booted.sh("sync")
                booted.save()

        return Template(hardware, cache.make(kind, key, build))
