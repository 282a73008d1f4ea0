"""What the kernel itself has of the devices: mounts and swap space."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gpuswitch.host.linux.scanning.files import lines, names, number_of, target

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody in the kernel who has a device. `command` says what, `doubt` says it to a person."""

    command: str
    doubt: str
    number: str = ""


def mounted(proc: str, numbers: Collection[str]) -> set[Client]:
    """The wanted block devices that are mounted, in whatever mount namespace, or are swapped to."""
    if not any(number.startswith("b") for number in numbers):
        return set()
    found = set()
    seen = set()
    for name in ["1", *(name for name in names(proc) if name.isdigit())]:
        namespace = target(f"{proc}/{name}/ns/mnt")
        if namespace and namespace not in seen:
            seen.add(namespace)
            found |= {Client("mount", f"mounted on {point}", n) for n, point in _mounts(proc, name) if n in numbers}
    for line in lines(f"{proc}/swaps")[1:]:
        number = number_of(_plain(line.split()[0]))
        if number in numbers:
            found.add(Client("swap", "used as swap space", number))
    return found


def _mounts(proc: str, name: str) -> Iterator[tuple[str, str]]:
    """Device number and place of each mount that a process sees (proc_pid_mountinfo(5)).

    A file system of several devices has a number of its own (btrfs); then one of them at least is named as its source.
    """
    for line in lines(f"{proc}/{name}/mountinfo"):
        fields = line.split(" ")
        source = _plain(fields[fields.index("-") + 2])
        number = number_of(source) if fields[2].startswith("0:") and source.startswith("/dev/") else f"b{fields[2]}"
        yield number, _plain(fields[4])


def _plain(field: str) -> str:
    r"""Spaces and the like are written in octal, `\040`."""
    return _ESCAPED.sub(lambda code: chr(int(code[1], 8)), field)
