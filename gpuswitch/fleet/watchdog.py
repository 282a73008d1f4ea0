"""Tells systemd's watchdog that all is well: for as long as no actor stands still in the program itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

from gpuswitch.fleet.fleet import Fleet
from gpuswitch.log.events import STALLED
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress

_log = logging.getLogger(__name__)


class Watchdog:
    """Of one fleet; `well` tells systemd. That the event loop turns is proven by who calls `look`."""

    def __init__(self, fleet: Fleet, well: Callable[[], None]) -> None:
        self._fleet = fleet
        self._well = well
        self._told: set[PciAddress] = set()

    def look(self) -> None:
        """Say that all is well; or nothing, and once in the log who stands still, and where."""
        found = {actor.gpu.address: actor.stalled for actor in self._fleet.stalled()}
        for gpu, where in found.items():
            if gpu not in self._told:
                text = "%s stands still: a fault of gpuswitch itself; systemd starts the service anew: %s"
                _log.critical(text, gpu, where, extra=told(STALLED, GPU=gpu))
        self._told = set(found)
        if not found:
            self._well()
