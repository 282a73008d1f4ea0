"""What IOMMU groups say of themselves.

Memory that the firmware claims for a device, which the IOMMU has to map as it is (RMRR of Intel, IVMD of AMD); and
whether there is an IOMMU at all: vfio makes a group of a device without one (vfio_noiommu_group_alloc in
drivers/vfio/group.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gpuswitch.host.linux.reading import contents, first_line
from gpuswitch.model.facts import PciFunction

_MOST = 1 << 16
_DIRECT = "direct"
"""`direct-relaxable` is what the kernel lets pass: USB's and graphics' (device_rmrr_is_relaxable in intel/iommu.c)."""
_NO_IOMMU = "vfio-noiommu"


class Groups:
    """Remembers what each IOMMU group has for as long as the same devices are in it: nothing else changes it."""

    def __init__(self, sysfs: str) -> None:
        self._groups = f"{sysfs}/kernel/iommu_groups"
        self._known: dict[int, tuple[tuple[int, ...], tuple[str, ...], bool]] = {}

    def among(
        self, functions: Iterable[PciFunction], tokens: Mapping[str, int]
    ) -> tuple[dict[int, tuple[str, ...]], frozenset[int]]:
        """The directly mapped regions of the groups of these functions, where there are any; and those without IOMMU.

        `tokens`: by address, what changes when a device leaves the bus and another comes.

        Raises:
            OSError: a group could not be read.
        """
        members: dict[int, list[int]] = {}
        for function in functions:
            if function.iommu_group is not None:
                members.setdefault(function.iommu_group, []).append(tokens[str(function.address)])
        known = {}
        for group, there in members.items():
            before = self._known.get(group)
            same = before is not None and before[0] == tuple(there)
            known[group] = before if before and same else (tuple(there), tuple(self._read(group)), self._bare(group))
        self._known = known
        regions = {group: regions for group, (_, regions, _) in known.items() if regions}
        return regions, frozenset(group for group, (*_, bare) in known.items() if bare)

    def _bare(self, group: int) -> bool:
        return first_line(f"{self._groups}/{group}/name") == _NO_IOMMU

    def _read(self, group: int) -> Iterator[str]:
        """Lines of first address, last address, kind (iommu_group_show_resv_regions in drivers/iommu/iommu.c)."""
        for line in contents(f"{self._groups}/{group}/reserved_regions", _MOST).decode().splitlines():
            first, last, kind = line.split()
            if kind == _DIRECT:
                yield f"{int(first, 16):#x}-{int(last, 16):#x}"
