"""Which device numbers belong to a PCI function, to a driver's module, to a node; and what the nodes are called.

In sysfs only `dev` is opened, which prints a field of a structure (dev_show in drivers/base/core.c), and folders and
links are read, which kernfs alone answers: no device lock is taken, so a device whose unbind hangs can be asked about.
"""

import fnmatch
import os
import re
from collections.abc import Collection, Iterable, Iterator

from gpuswitch.host.linux.scanning.files import ADDRESS, entries, last, names, number_of, number_text, target, text

_NUMBERS = re.compile(r"\d+:\d+")
_MINOR = re.compile(r"^Device Minor:\s*(\d+)", re.MULTILINE)
_MAJOR = re.compile(r"^ *(\d+) (\S+)$", re.MULTILINE)
# In folders of these names no device lies, and there are many.
_BARREN = frozenset({"power", "msi_irqs", "statistics", "queues"})
# What nvidia calls its major number: up to 550, and since (nv-frontend.c and nv.c of open-gpu-kernel-modules).
_NVIDIA = frozenset({"nvidia-frontend", "nvidia"})


class Devices:
    """The devices of the host, as its folders show them now."""

    def __init__(self, sysfs: str, dev: str, proc: str) -> None:
        self._sysfs = sysfs
        self._dev = dev
        self._proc = proc

    def of_function(self, address: str) -> set[str]:
        """The numbers of all devices below a function: those on its buses too, and those of other functions not."""
        if not ADDRESS.fullmatch(address):
            return set()
        return {*self._below(f"{self._sysfs}/bus/pci/devices/{address}"), *self._nvidia(address)}

    def functions_of(self, modules: Collection[str]) -> list[str]:
        """The addresses of the functions that a driver of these modules has."""
        folder = f"{self._sysfs}/bus/pci/drivers"
        drivers = [f"{folder}/{name}" for name in names(folder)]
        mine = [driver for driver in drivers if last(target(f"{driver}/module")) in modules]
        return [name for driver in mine for name in names(driver) if ADDRESS.fullmatch(name)]

    def of_nodes(self, patterns: Iterable[str]) -> set[str]:
        """The numbers of the nodes below /dev that match one of these shell patterns."""
        found = [path for pattern in patterns for path in self._matching(pattern)]
        return {number for path in found if (number := number_of(path))}

    def _matching(self, pattern: str) -> list[str]:
        """Only the name may have wildcards; `glob` takes a folder that it cannot read for one that is empty."""
        folder, _, name = f"{self._dev}/{pattern}".rpartition("/")
        return [f"{folder}/{each}" for each in fnmatch.filter(names(folder), name)]

    def names(self, numbers: Collection[str]) -> dict[str, str]:
        """What the host calls these devices: `/dev/dri/card0`. One that has no node is left out.

        The kernel says the name in `uevent`, which takes the device lock; so the nodes are looked at. Other file
        systems below /dev, such as its shared memory, have none.
        """
        found: dict[str, str] = {}
        folders = [self._dev]
        while folders:
            folder = folders.pop(0)
            for entry in sorted(entries(folder), key=lambda entry: entry.name):
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                number = number_text(info.st_mode, os.major(info.st_rdev), os.minor(info.st_rdev))
                if number in numbers:
                    found.setdefault(number, "/dev" + entry.path.removeprefix(self._dev))
                elif entry.is_dir(follow_symlinks=False) and not os.path.ismount(entry.path):
                    folders.append(entry.path)
        return found

    def majors(self) -> dict[str, set[str]]:
        """The names that each major number of character devices goes by."""
        found: dict[str, set[str]] = {}
        for major, name in _MAJOR.findall(text(f"{self._proc}/devices").partition("Block devices:")[0]):
            found.setdefault(major, set()).add(name)
        return found

    def _below(self, folder: str) -> Iterator[str]:
        for entry in entries(folder):
            if entry.name == "dev":
                yield from self._device(folder)
            elif (
                entry.name not in _BARREN and not ADDRESS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ):
                yield from self._below(entry.path)

    def _device(self, folder: str) -> Iterator[str]:
        """The number of one device, and those of the devices that are made of it: encrypted ones, arrays."""
        numbers = text(f"{folder}/dev")
        if not _NUMBERS.fullmatch(numbers):
            return
        if last(target(f"{folder}/subsystem")) != "block":
            yield f"c{numbers}"
            return
        yield f"b{numbers}"
        for name in names(f"{folder}/holders"):
            yield from self._below(f"{folder}/holders/{name}")

    def _nvidia(self, address: str) -> Iterator[str]:
        """The number of /dev/nvidiaN, which sysfs does not show. It has one without its node, too."""
        minor = _MINOR.search(text(f"{self._proc}/driver/nvidia/gpus/{address}/information"))
        if minor is None:
            return
        if number := number_of(f"{self._dev}/nvidia{minor[1]}"):
            yield number
        yield from (f"c{major}:{minor[1]}" for major, called in self.majors().items() if called & _NVIDIA)
