"""What is said of virtual machines and processes that are to have GPUs, checked before anybody acts on it."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID, uuid4

from gpuswitch.api.bus import Bus
from gpuswitch.api.callers import Callers, user_of
from gpuswitch.api.metrics import Refusals
from gpuswitch.errors import InvalidArgument, NotAuthorized
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Process
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options

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

    def named(self, selectors: Sequence[str]) -> list[Actor]:
        """The GPUs of these names or addresses, each once; the only one where none is named.

        Raises:
            NoSuchGpu: there is none; none is named, and there are several.
            InvalidArgument: more are named than any machine has.
        """
        if len(selectors) > _MOST_FUNCTIONS:
            raise InvalidArgument(f"there are no {len(selectors)} GPUs")
        return list(dict.fromkeys(self._fleet.find(selector) for selector in selectors or [""]))

    async def acquire_for_process(
        self, process: Process, name: str, selectors: Sequence[str], options: Options, *, access: bool
    ) -> list[str]:
        """The functions of these GPUs, in order, once they are on vfio and belong to that process of the caller's.

        `access`: the caller, as the bus knows him, may open their nodes of vfio as long as it runs; root may anyway.
        Cancelled, nothing was asked for.

        Raises:
            InvalidArgument: there is no such process.
            NotAuthorized: it is somebody else's.
        """
        if not 0 < len(name) <= _LONGEST_NAME:
            raise InvalidArgument(f"{name[:80]!r} is not the name of a process")
        requester = await self._callers.requester()
        user = await user_of(process)
        if user is None:
            raise InvalidArgument(f"there is no process {process.pid} that was started at {process.started}")
        if requester.uid not in {0, user}:
            raise NotAuthorized(f"process {process.pid} is not yours: it runs as uid {user}")
        actors = self.named(selectors)
        owner = Owner(f"{printable(name)} (pid {process.pid})", str(uuid4()), process)
        with self._refusals(actor.gpu.address for actor in actors):
            user = (requester.uid or None) if access else None
            await self._fleet.owners.acquire_for_process(owner, actors, requester, options, user)
        return [str(f.address) for actor in actors for f in actor.gpu.present(actor.record.facts)]

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
        return Owner(printable(name), str(UUID(uuid)))
    except ValueError:
        raise InvalidArgument(f"{uuid[:80]!r} is not the UUID of a virtual machine") from None


def printable(name: str) -> str:
    """It goes into logs and onto terminals, where a new line or an escape would be ours."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _functions(addresses: Sequence[str]) -> frozenset[PciAddress]:
    if len(addresses) > _MOST_FUNCTIONS:
        raise InvalidArgument(f"no virtual machine has {len(addresses)} PCI functions")
    return frozenset(PciAddress.parse(address) for address in addresses)
