"""What the configuration calls `host_driver`, and nothing on this host brings. Told, and not refused: it may come."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator

from gpuswitch.config.settings import Config
from gpuswitch.model.drivers import MODULES, around, from_name
from gpuswitch.model.facts import HostFacts


def missing_host_drivers(config: Config, facts: HostFacts, installed: Callable[[str], bool]) -> Iterator[str]:
    """A sentence for each table that names one. `installed` tells of a module whether it is, for the running kernel.

    A look for the file is less than modprobe knows, which also follows what an administrator has written for it; so
    nothing but a warning follows from it.
    """
    registered = facts.pci_drivers
    for gpu in config.gpus:
        name = gpu.host_driver
        if not name or name in registered:
            continue
        has = f'the [[gpu]] table of {gpu.called} has host_driver = "{name}"'
        if driver := around(name, registered):
            yield f"{has}, which is a module around the driver {driver} and no driver of the PCI bus: write {driver}"
            continue
        module = from_name(name, registered).module
        if facts.modules_on_disk and module and not installed(module):
            known = {*registered, *(each for each in MODULES if not around(each, registered))}
            close = difflib.get_close_matches(name, sorted(known), n=1)
            meant = f"did you mean {close[0]}? Correct it" if close else "correct it"
            yield (
                f"{has}, and nothing brings that: no such driver is registered, and no module {module} is installed "
                f"for this kernel; {meant}, or install the driver"
            )
