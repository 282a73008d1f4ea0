"""A machine that was prepared for many tests and lies saved: a template made of a clone of another one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.tools import run
from tests.harness.virtual_machines import qemu
from tests.harness.virtual_machines.machine import Machine
from tests.harness.virtual_machines.template import VERSIONS, Template

FIRST_DISK = "first.qcow2"
"""What the other template has written to its disk; below what this one has."""


def find_prepared(
    cache: Cache, template: Template, name: str, parts: list[Path | str], prepare: Callable[[Machine], None]
) -> Template:
    """The template of a machine for which `prepare` was done, built first where need be.

    `parts` are the texts and the files, or folders, that decide what `prepare` does.
    """
    key = content_key(template.folder.name, Path(__file__), *parts)
    if entry := cache.find(name, key):
        return Template(template.hardware, entry)

    def build(folder: Path) -> None:
        for link in ("disk.img", qemu.KERNEL, qemu.INITRD, VERSIONS):
            os.link(template.folder / link, folder / link)
        os.link(template.folder / qemu.DISK, folder / FIRST_DISK)
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", FIRST_DISK, "-F", "qcow2", qemu.DISK], folder=folder)
        run(["cp", "--sparse=always", template.folder / qemu.RAM, folder / qemu.RAM])
        shutil.copyfile(template.folder / qemu.STATE, folder / qemu.STATE)
        with Machine(template.hardware, folder, clone=False) as machine:
            prepare(machine)
            machine.save()

    with cache.lock():
        return Template(template.hardware, cache.make(name, key, build))
