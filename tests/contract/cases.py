"""All cases of the contract."""

from tests.contract import consoles, holders, hotplug, modules, moving, settings, units, vfio, waiting
from tests.contract.harness import CASES

__all__ = ["CASES", "consoles", "holders", "hotplug", "modules", "moving", "settings", "units", "vfio", "waiting"]
