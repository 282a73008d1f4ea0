"""Which of vfio's drivers are installed for the running kernel, and what they are for, by the indexes of depmod."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpuswitch.host.linux.scanning.files import is_gone

_VFIO_FILE = re.compile(rb"/vfio[-_]pci\.ko")
# do_pci_entry in scripts/mod/file2alias.c writes it of ids that only a driver_override makes match (5.15 and later).
_VFIO_ALIAS = re.compile(rb"^alias (vfio_pci:\S+) (\S+)$", re.MULTILINE)


class Installed:
    """The indexes in `modules`, which has a folder for each kernel. Each is read again when it was written anew."""

    def __init__(self, modules: str) -> None:
        self._folder = f"{modules}/{os.uname().release}"
        self._known: dict[str, tuple[int, list[tuple[str, ...]]]] = {}

    def on_disk(self) -> bool:
        """Whether the index of its modules is there."""
        try:
            os.stat(f"{self._folder}/modules.dep")  # noqa: PTH116 - a Path takes several times as long, at each look
        except OSError as error:
            if is_gone(error):
                return False
            raise
        return True

    def vfio_pci(self) -> bool:
        """Whether vfio_pci is there, as a module or built in."""
        return any(self._found(index, _VFIO_FILE) for index in ("modules.dep", "modules.builtin"))

    def vfio_aliases(self) -> tuple[tuple[str, str], ...]:
        """Those of modules: what is built in is not in that file, and libvirt does not see it either."""
        return tuple((alias, module) for alias, module in self._found("modules.alias", _VFIO_ALIAS))

    def _found(self, index: str, pattern: re.Pattern[bytes]) -> list[tuple[str, ...]]:
        path = f"{self._folder}/{index}"
        try:
            written = os.stat(path).st_mtime_ns  # noqa: PTH116 - a Path takes several times as long, at each look
            known = self._known.get(index)
            if known is None or known[0] != written:
                matches = pattern.finditer(Path(path).read_bytes())
                known = (
                    written,
                    [tuple(group.decode(errors="replace") for group in match.groups()) for match in matches],
                )
                self._known[index] = known
        except OSError as error:
            if is_gone(error):
                return []
            raise
        return known[1]
