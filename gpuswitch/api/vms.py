"""What libvirt's hook says of its virtual machines, checked before anybody acts on it."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from gpuswitch.api.bus import Bus
from gpuswitch.api.callers import Callers
from gpuswitch.api.metrics import Refusals
from gpuswitch.errors import InvalidArgument
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.model.address import PciAddress
from gpuswitch.model.owner import Owner

_LONGEST_NAME = 255
_MOST_FUNCTIONS = 1024


class VirtualMachines:
    """Hands GPUs over to virtual machines, for the callers on this bus."""

    def __init__(self, fleet: Fleet, bus: Bus, refusals: Refusals) -> None:
        self._fleet = fleet
        self._refusals = refusals
        self._callers = Callers(bus)

    async def acquire(self, name: str, uuid: str, addresses: Sequence[str]) -> list[str]:
        """See `Fleet.refuse_misfits` and `Owners.acquire`.

        Cancelled, nothing was asked for.
        """
        owner, functions = _owner(name, uuid), _functions(addresses)
        self._fleet.refuse_misfits(functions)
        requester = await self._callers.requester()
        named = [actor.gpu for actor in self._fleet.actors.values() if not functions.isdisjoint(actor.gpu.functions)]
        with self._refusals(gpu.address for gpu in named if self._fleet.config.gpu(gpu.address).managed):
            acquired = await self._fleet.owners.acquire(owner, functions, requester)
            return [str(actor.gpu.address) for actor in acquired]

    def adopt(self, name: str, uuid: str, addresses: Sequence[str]) -> None:
        """See `Owners.adopt`."""
        self._fleet.owners.adopt(_owner(name, uuid), _functions(addresses))

    def release(self, name: str, uuid: str, reason: str) -> None:
        """See `Owners.release`."""
        self._fleet.owners.release(_owner(name, uuid), reason)


def _owner(name: str, uuid: str) -> Owner:
    if not 0 < len(name) <= _LONGEST_NAME:
        raise InvalidArgument(f"{name[:80]!r} is not the name of a virtual machine")
    try:
        return Owner(name, str(UUID(uuid)))
    except ValueError:
        raise InvalidArgument(f"{uuid[:80]!r} is not the UUID of a virtual machine") from None


def _functions(addresses: Sequence[str]) -> frozenset[PciAddress]:
    if len(addresses) > _MOST_FUNCTIONS:
        raise InvalidArgument(f"no virtual machine has {len(addresses)} PCI functions")
    return frozenset(PciAddress.parse(address) for address in addresses)
