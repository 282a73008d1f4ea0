"""All cases of the contract."""

from tests.contract import moving, settings, vfio, waiting
from tests.contract.bench import CASES

__all__ = ["CASES", "moving", "settings", "vfio", "waiting"]
