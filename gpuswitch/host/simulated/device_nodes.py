"""The nodes of vfio on a simulated machine, and the users who may open them by an entry of their own."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from gpuswitch.host.port import DeviceNodes, NodesOfVfio
from gpuswitch.host.simulated.faults import Call
from gpuswitch.model.access import UserAccess
from gpuswitch.model.address import PciAddress

if TYPE_CHECKING:
    from gpuswitch.host.simulated.kernel import Machine

IOMMU = "/dev/iommu"


class NodeAccess:
    """Who may open which node, `r`, `rw` or ``. With the node goes what was said of it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.entries: dict[UserAccess, str] = {}
        self.supported = True
        """The kernel has CONFIG_TMPFS_POSIX_ACL."""
        self.pending = False
        """udev is not done with them."""

    def nodes(self, functions: Collection[PciAddress]) -> Iterator[str]:
        """Those of the functions that are on vfio."""
        own, groups = False, self._machine.look().vfio_nodes
        for function in functions:
            device = self._machine.devices.get(function)
            if device is None or device.binding is None or not device.on_vfio:
                continue
            if str(device.shape.iommu_group) in groups:
                yield f"/dev/vfio/{device.shape.iommu_group}"
            for card in device.binding.cards:
                if card.kind == "vfio":
                    own = True
                    yield from card.nodes
        if own:
            yield IOMMU

    def lost(self) -> None:
        """Something has changed: what is said of nodes that are there no more goes with them."""
        if self.entries:
            there = {IOMMU, *self.nodes(self._machine.devices)}
            self.entries = {access: bits for access, bits in self.entries.items() if access.node in there}


class SimulatedDeviceNodes(DeviceNodes):
    """The port, on such a machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def of(self, functions: Collection[PciAddress]) -> NodesOfVfio:
        access = self._machine.access
        return NodesOfVfio(tuple(sorted(set(access.nodes(functions)))), access.pending)

    def permissions(self, access: UserAccess) -> str | None:
        self._strike(access, "read the access control list of")
        return self._machine.access.entries.get(access)

    def give(self, access: UserAccess) -> None:
        call = self._strike(access, "change the access control list of")
        if not self._machine.access.supported:
            raise call.error(errno.EOPNOTSUPP)
        self._machine.access.entries[access] = "rw"

    def take(self, access: UserAccess) -> None:
        if self._is_there(access.node):
            self._strike(access, "change the access control list of")
            self._machine.access.entries.pop(access, None)

    def _strike(self, access: UserAccess, verb: str) -> Call:
        call = Call(verb, access.node)
        if number := self._machine.faults.strike("access", access.node).errno:
            raise call.error(number)
        if not self._is_there(access.node):
            raise call.error(errno.ENOENT)
        return call

    def _is_there(self, node: str) -> bool:
        return node in {IOMMU, *self._machine.access.nodes(self._machine.devices)}
