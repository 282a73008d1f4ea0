"""What other tools were told about GPUs: driverctl, modprobe, old hook scripts, Proxmox."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator

from gpuswitch.doctor.looks.libvirt import HOOKS, OWN, wanted_by
from gpuswitch.doctor.looks.proxmox import machines
from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import Line, OtherTools

_MODPROBE = (
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/local/lib/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
)
"""In the order in which modprobe.d(5) has them: of two files of one name, the first counts."""
_MOVES = re.compile(
    r"nodedev-(?:detach|reattach)|driver_override|/(?:un)?bind\b|new_id|vfio[-_]pci|modprobe\s+-r\s+\w*(?:nvidia|amdgpu)"
    r"|rmmod\s+\w*(?:nvidia|amdgpu)"
)
_DEEPEST = 5
"""Folders below qemu.d, of PassthroughPOST's hook helper: MACHINE/OPERATION/STATE/FILE."""


def look(files: Files) -> OtherTools:
    return OtherTools(
        driverctl=tuple(_overrides(files)),
        modprobe=tuple(_modprobe(files)),
        moving=tuple(place for place in _scripts(files) if _MOVES.search(_code(files.text(place)))),
        proxmox=tuple(machines(files)),
    )


def _overrides(files: Files) -> Iterator[str]:
    """The files are named after the bus and the device, `pci-0000:01:00.0` (sddev in the script of driverctl 0.111)."""
    for name in files.names("/etc/driverctl.d"):
        if name.startswith("pci-"):
            yield name.removeprefix("pci-")


def _modprobe(files: Files) -> Iterator[Line]:
    named = set()
    for place in files.below(_MODPROBE, ".conf"):
        name = place.rpartition("/")[2]
        if name in named:
            continue
        named.add(name)
        for line in re.split(r"(?<!\\)\n", files.text(place)):
            words = line.replace("\\\n", " ").partition("#")[0].split()
            if words and words[0] in {"options", "blacklist", "softdep", "install"}:
                yield Line(place, tuple(words), goes_on="\n" in line)


def _scripts(files: Files) -> Iterator[str]:
    """Programs alone: what may not be executed is passed over, by libvirt and by those helpers."""
    waiting = [(f"{HOOKS}/qemu", 0), (f"{HOOKS}/qemu.d", 0)]
    while waiting:
        place, depth = waiting.pop(0)
        status = files.status(place)
        if status is None or (place == OWN and wanted_by(files.text(OWN))):
            continue
        if stat.S_ISDIR(status.st_mode) and depth < _DEEPEST:
            waiting += [(f"{place}/{name}", depth + 1) for name in files.names(place)]
        elif stat.S_ISREG(status.st_mode) and status.st_mode & 0o111:
            yield place


def _code(text: str) -> str:
    """A script without the lines that are comments."""
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))
