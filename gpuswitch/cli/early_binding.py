"""What `setup boot` has the initrd do, as the files of whatever makes the initrd. The same text for the same GPUs.

The files lie in early/; bind.sh is what runs before udev, and has the GPUs in place of `@GPUS@`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gpuswitch.doctor.looks.early import SCRIPTS

_TEMPLATES = Path(__file__).with_name("early")
_BIND = "bind.sh"
_FILES: Mapping[str, Mapping[str, str]] = {
    "initramfs-tools": {
        SCRIPTS["initramfs-tools"]: _BIND,
        "/etc/initramfs-tools/hooks/gpuswitch": "initramfs-tools-hook.sh",
    },
    "dracut": {
        SCRIPTS["dracut"]: _BIND,
        "/usr/lib/dracut/modules.d/90gpuswitch/module-setup.sh": "module-setup.sh",
    },
    "mkinitcpio": {
        SCRIPTS["mkinitcpio"]: _BIND,
        "/etc/initcpio/install/gpuswitch": "mkinitcpio-install.sh",
        "/etc/initcpio/hooks/gpuswitch": "mkinitcpio-hook.sh",
        "/etc/mkinitcpio.conf.d/gpuswitch.conf": "mkinitcpio.conf",
    },
}
"""By what makes the initrd: each file, and what it is made of. initramfs-tools(7), dracut.modules(7), mkinitcpio(8)."""
_PROGRAMS = frozenset({_BIND, "initramfs-tools-hook.sh"})
"""Those that are run by themselves; all others are read by a shell that is there already."""
TOOLS = frozenset(_FILES)
LISTED_BY: Mapping[str, tuple[str, str]] = {
    "initramfs-tools": ("lsinitramfs", "scripts/init-top/gpuswitch"),
    "dracut": ("lsinitrd", "hooks/pre-udev/00-gpuswitch.sh"),
    "mkinitcpio": ("lsinitcpio", "usr/lib/gpuswitch/bind.sh"),
}
"""The program that says what is in an initrd, and what the script is called there."""


class Function(NamedTuple):
    """`place`: below /sys/devices; `vendor`, `device`: `0x10de`; `dark`: the machine must not have booted on it."""

    address: str
    place: str
    vendor: str
    device: str
    dark: bool


class Bound(NamedTuple):
    """A GPU with those of its functions that are on the bus."""

    address: str
    functions: Sequence[Function]


def files_of(tool: str, gpus: Iterable[Bound]) -> dict[str, str]:
    """The text of each file, by its place; all may be executed."""
    text = "\n".join("\n".join(_taken(gpu)) for gpu in gpus)
    return {place: _text(name).replace("@GPUS@", text) for place, name in _FILES[tool].items()}


def _text(name: str) -> str:
    """In the package they are no programs, and have no first line of one."""
    return ("#!/bin/sh\n" if name in _PROGRAMS else "") + (_TEMPLATES / name).read_text(encoding="utf-8")


def _taken(gpu: Bound) -> Iterator[str]:
    """All of a GPU, or none of it."""
    checks = [f"is {each.place} {each.vendor} {each.device}" for each in gpu.functions]
    checks += [f"is_dark {each.place}" for each in gpu.functions if each.dark]
    yield "        if"
    for number, check in enumerate(checks, 1):
        indent = " " * (12 if number == 1 else 16)
        yield f"{indent}{check}{' &&' if number < len(checks) else ''}"
    yield "        then"
    yield from (f"            take {each.place}" for each in gpu.functions)
    yield "        else"
    yield f"            leave {gpu.address}"
    yield "        fi"
