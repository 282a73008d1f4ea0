"""What is installed for the running kernel, and what vfio's drivers are for, by the indexes of depmod."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpuswitch.host.linux.scanning.files import is_gone
from gpuswitch.model.drivers import kernel_name

_FILES = ("modules.dep", "modules.builtin")
_VFIO_FILE = re.compile(rb"/vfio[-_]pci\.ko")
# do_pci_entry in scripts/mod/file2alias.c writes it of ids that only a driver_override makes match (5.15 and later).
_VFIO_ALIAS = re.compile(rb"^alias (vfio_pci:\S+) (\S+)$", re.MULTILINE)


class Installed:
    """The indexes in `modules`: folders, joined by colons, each of which may have one for each kernel.

    The first that has an index counts. It is read again when it was written anew.
    """

    def __init__(self, modules: str) -> None:
        self._folders = [f"{folder}/{os.uname().release}" for folder in modules.split(":")]
        self._known: dict[tuple[str, bytes], tuple[int, list[tuple[str, ...]]]] = {}

    def on_disk(self) -> bool:
        """Whether the index of its modules is there."""
        return self._written("modules.dep") is not None

    def vfio_pci(self) -> bool:
        """Whether vfio_pci is there, as a module or built in."""
        return any(self._found(index, _VFIO_FILE) for index in _FILES)

    def has(self, module: str) -> bool:
        """Whether a module that the kernel calls so is there: its file may be called otherwise (nvidia-current.ko)."""
        family = re.escape(module.partition("_")[0])
        pattern = re.compile(rf"(?:^|/)({family}[\w-]*)\.ko".encode(), re.MULTILINE)
        files = (found.replace("-", "_") for index in _FILES for (found,) in self._found(index, pattern))
        return any(module in {file, kernel_name(file)} for file in files)

    def vfio_aliases(self) -> tuple[tuple[str, str], ...]:
        """Those of modules: what is built in is not in that file, and libvirt does not see it either."""
        return tuple((alias, module) for alias, module in self._found("modules.alias", _VFIO_ALIAS))

    def _found(self, index: str, pattern: re.Pattern[bytes]) -> list[tuple[str, ...]]:
        if (there := self._written(index)) is None:
            return []
        path, written = there
        known = self._known.get((index, pattern.pattern))
        if known is None or known[0] != written:
            try:
                matches = pattern.finditer(Path(path).read_bytes())
            except OSError as error:
                if is_gone(error):
                    return []
                raise
            known = written, [tuple(group.decode(errors="replace") for group in match.groups()) for match in matches]
            self._known[index, pattern.pattern] = known
        return known[1]

    def _written(self, index: str) -> tuple[str, int] | None:
        """Where this index is, and when it was written; None where it is nowhere."""
        for folder in self._folders:
            path = f"{folder}/{index}"
            try:
                return path, os.stat(path).st_mtime_ns  # noqa: PTH116 - a Path takes several times as long
            except OSError as error:
                if not is_gone(error):
                    raise
        return None
