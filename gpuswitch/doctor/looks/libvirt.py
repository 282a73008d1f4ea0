"""libvirt, and the hooks that it runs."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import replace

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import Hook, Libvirt

HOOKS = "/etc/libvirt/hooks"
OWN = f"{HOOKS}/qemu.d/50-gpuswitch"
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu")
_LIBRARY = re.compile(r"libvirt\.so\.0\.(\d+)\.\d+")
_WANTS = re.compile(r"^hook='(/[^']*/hook\.py)'$", re.MULTILINE)
"""A line that all versions of our hook have, and by which contrib/maintain.sh knows them, too."""


def look(files: Files) -> Libvirt:
    own = _hook(files, OWN)
    if own is not None and (wants := wanted_by(files.text(OWN))):
        own = replace(own, wants=wants, wanted_there=files.there(wants))
    places = [f"{HOOKS}/qemu", *files.below([f"{HOOKS}/qemu.d"])]
    others = [hook for place in places if place != OWN and (hook := _hook(files, place)) is not None]
    return Libvirt(_version(files), own, tuple(others))


def wanted_by(text: str) -> str:
    """What a hook of ours has to read, by its text; "" for one that is not ours."""
    found = _WANTS.search(text)
    return found[1] if found else ""


def _hook(files: Files, place: str) -> Hook | None:
    """A regular file, as libvirt has it (virFileIsExecutable); folders are passed over."""
    status = files.status(place)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    return Hook(place, bool(status.st_mode & 0o111), status.st_ctime)


def _version(files: Files) -> tuple[int, int, int] | None:
    """9.0.0 has libvirt.so.0.9000.0: libtool's version is made of the release (meson.build)."""
    for folder in _LIBRARIES:
        for name in files.names(folder) if os.path.isdir(files.machine.path(folder)) else ():  # noqa: PTH112 -- text
            if found := _LIBRARY.fullmatch(name):
                number = int(found[1])
                return number // 1000, number % 1000, 0
    return None
