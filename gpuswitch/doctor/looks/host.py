"""The host as a switch would see it, and who has its GPUs open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from gpuswitch.config.settings import Config
from gpuswitch.doctor.machine import Machine
from gpuswitch.errors import KernelError
from gpuswitch.fleet.host_drivers import missing_host_drivers
from gpuswitch.fleet.matching import found
from gpuswitch.host.linux.processes import holder_of, request_of
from gpuswitch.host.linux.reading import contents
from gpuswitch.host.linux.scan_main import scanned
from gpuswitch.host.linux.sysfs import Roots, Sysfs
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.holders import Holder, HolderQuery

_MOST_LINES = 1 << 16
_IORESOURCE_MEM = 0x00000200


@dataclass(frozen=True, slots=True)
class Host:
    """`memory`: the largest range of each display function, in bytes. `missing_drivers`: a sentence each."""

    facts: HostFacts
    memory: Mapping[PciAddress, int]
    missing_drivers: tuple[str, ...]


def look(machine: Machine, config: Config) -> Host:
    """Reads what a look of the service reads, and nothing else.

    Raises:
        KernelError: the host could not be looked at.
    """
    sysfs = Sysfs(machine.roots)
    facts = sysfs.look()
    memory = {a: _largest(machine.roots, a) for a, function in facts.functions.items() if function.makes_gpu}
    return Host(facts, memory, tuple(missing_host_drivers(found(config, facts)[0], facts, sysfs.installed)))


def holders(machine: Machine, queries: Mapping[PciAddress, HolderQuery]) -> dict[PciAddress, tuple[Holder, ...]]:
    """Who has what of each GPU open. Only root is shown what others have open.

    Raises:
        KernelError: processes could not be looked at.
    """
    roots = machine.roots
    opened = {}
    for gpu, query in queries.items():
        try:
            said = scanned(roots.sysfs, roots.dev, roots.proc, json.loads(request_of(query)))
        except OSError as error:
            raise KernelError("look for", "holders", error.errno or 0, error.strerror or "") from error
        every = said["holders"]
        assert isinstance(every, list)  # noqa: S101 -- as the scanner says
        opened[gpu] = tuple(sorted(map(holder_of, every), key=lambda holder: (holder.pid, holder.nodes)))
    return opened


def _largest(roots: Roots, function: PciAddress) -> int:
    """Bytes of the largest memory range: `resource` prints fields of a structure (resource_show in pci-sysfs.c)."""
    sizes = [0]
    for line in contents(f"{roots.sysfs}/bus/pci/devices/{function}/resource", _MOST_LINES).decode().splitlines():
        first, last, flags = (int(number, 16) for number in line.split())
        if flags & _IORESOURCE_MEM and last > first:
            sizes.append(last - first + 1)
    return max(sizes)
