"""The restore state: everything that a switch changed on the host, and that the way home of the GPU restores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from gpuswitch.host.port import Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit

Baseline = Mapping[PciAddress, Captured]
"""What each function of a GPU had before we touched it."""


@dataclass(frozen=True, slots=True)
class RestoreState:
    """False when it is nothing.

    `units` were active and were stopped; `modules` of the host driver's chain were loaded, in the order to load them;
    `terminals` are the virtual terminals that the GPU showed, `vtconsoles` those that were unbound;
    `shown_by_others` are pairs: a terminal that another GPU showed, and could lose to the new frame buffer, and the
    function that showed it;
    `boot_framebuffers` are pairs of device and driver; `persistent` are the functions in nvidia's persistence mode;
    `announced` are pairs of subsystem and functions, whose cards udev was told would go.
    """

    functions: Baseline = field(default_factory=dict)
    units: tuple[Unit, ...] = ()
    modules: tuple[str, ...] = ()
    terminals: tuple[int, ...] = ()
    vtconsoles: tuple[str, ...] = ()
    shown_by_others: tuple[tuple[int, PciAddress], ...] = ()
    boot_framebuffers: tuple[tuple[str, str], ...] = ()
    persistent: tuple[PciAddress, ...] = ()
    announced: tuple[tuple[str, tuple[PciAddress, ...]], ...] = ()

    def __bool__(self) -> bool:
        return self != NOTHING_TO_RESTORE

    def and_before(self, earlier: RestoreState) -> RestoreState:
        """Together with what an earlier switch, which never came home, left to restore. Where both have a value, the
        earlier one counts: it is the original.
        """
        # A terminal was shown on one of them only.
        own = tuple(terminal for terminal in self.terminals if terminal not in dict(earlier.shown_by_others))
        shown_by_others = {
            terminal: whose for terminal, whose in self.shown_by_others if terminal not in earlier.terminals
        }
        return RestoreState(
            functions={**self.functions, **earlier.functions},
            units=_both(earlier.units, self.units),
            modules=earlier.modules or self.modules,
            terminals=_both(earlier.terminals, own),
            vtconsoles=_both(earlier.vtconsoles, self.vtconsoles),
            shown_by_others=tuple((shown_by_others | dict(earlier.shown_by_others)).items()),
            boot_framebuffers=_both(earlier.boot_framebuffers, self.boot_framebuffers),
            persistent=_both(earlier.persistent, self.persistent),
            announced=_both(earlier.announced, self.announced),
        )

    def and_unit(self, unit: Unit) -> RestoreState:
        """With one more unit to start."""
        return replace(self, units=_both(self.units, (unit,)))


NOTHING_TO_RESTORE = RestoreState()
_T = TypeVar("_T")


def _both(first: tuple[_T, ...], second: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys((*first, *second)))
