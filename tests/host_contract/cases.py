"""All cases of the contract."""

from tests.host_contract import clock, consoles, holders, hotplug, modules, moving, settings, units, vfio, waiting
from tests.host_contract.harness import CASES

__all__ = [
    "CASES",
    "clock",
    "consoles",
    "holders",
    "hotplug",
    "modules",
    "moving",
    "settings",
    "units",
    "vfio",
    "waiting",
]
