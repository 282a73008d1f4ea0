"""The restore state: everything that a switch changed on the host, and that the way home of the GPU restores."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gpuswitch.host.port import Captured, Shared
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Unit

Baseline = Mapping[PciAddress, Captured]
"""What each function of a GPU had before we touched it."""
_KINDS = tuple(each.name for each in fields(Shared))
"""Of shared settings."""


@dataclass(frozen=True, slots=True)
class SharedSetting:
    """One setting that several GPUs may want changed: `kind` is a field of `Shared`, `thing` what has the setting.

    Raises:
        TypeError: there is no such kind, so nothing would be recorded of it.
    """

    kind: str
    thing: Hashable

    def __post_init__(self) -> None:
        """Refuse a kind that no restore state has."""
        if self.kind not in _KINDS:
            raise TypeError(f"{self.kind!r} is no kind of shared setting: declare it in gpuswitch.host.port.Shared")

    def __str__(self) -> str:
        return f"{self.thing} ({self.kind})"


@dataclass(frozen=True, slots=True)
class RestoreState(Shared):
    """False when it is nothing.

    What several GPUs share is told in `Shared`. `modules` of the host driver's chain were loaded, in the order to load
    them; `terminals` are the virtual terminals that the GPU showed, `vtconsoles` those that were unbound;
    `shown_by_others` are pairs: a terminal that another GPU showed, and could lose to the new frame buffer, and the
    function that showed it;
    `boot_framebuffers` are pairs of device and driver; `persistent` are the functions in nvidia's persistence mode;
    `announced` are pairs of subsystem and functions, whose cards udev was told would go. `restarted` are units that
    look for their GPUs when they start, and at no other time: those of `units` that may run by then are restarted.
    """

    functions: Baseline = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    terminals: tuple[int, ...] = ()
    vtconsoles: tuple[str, ...] = ()
    shown_by_others: tuple[tuple[int, PciAddress], ...] = ()
    boot_framebuffers: tuple[tuple[str, str], ...] = ()
    persistent: tuple[PciAddress, ...] = ()
    announced: tuple[tuple[str, tuple[PciAddress, ...]], ...] = ()
    restarted: tuple[Unit, ...] = ()

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
        both = {name: _both(value, getattr(self, name)) for name, value in earlier._values()}
        return RestoreState(
            **both
            | {
                "modules": earlier.modules or self.modules,
                "terminals": _both(earlier.terminals, own),
                "shown_by_others": tuple((shown_by_others | dict(earlier.shown_by_others)).items()),
            }
        )

    def without(self, restored: RestoreState) -> RestoreState:
        """What is left of it once that is restored."""
        return RestoreState(**{name: _left(getattr(self, name), gone) for name, gone in restored._values()})

    @property
    def shared(self) -> RestoreState:
        """What is not the GPU's own: the rest goes with it when it leaves, or is of no use without it."""
        restarted = tuple(unit for unit in self.restarted if unit in self.units)
        return RestoreState(**{kind: getattr(self, kind) for kind in _KINDS}, restarted=restarted)

    @property
    def settings(self) -> frozenset[SharedSetting]:
        """The shared settings in it."""
        return frozenset(SharedSetting(kind, thing) for kind in _KINDS for thing in getattr(self, kind))

    def _values(self) -> Iterator[tuple[str, Any]]:
        return ((each.name, getattr(self, each.name)) for each in fields(self))

    def and_unit(self, unit: Unit) -> RestoreState:
        """With one more unit to start."""
        return replace(self, units=_both(self.units, (unit,)))


NOTHING_TO_RESTORE = RestoreState()


def _both(first: Any, second: Any) -> Any:
    """Of two mappings or two tuples; where both mappings have a value, that of the first."""
    return {**second, **first} if isinstance(first, Mapping) else tuple(dict.fromkeys((*first, *second)))


def _left(values: Any, gone: Any) -> Any:
    """Of a mapping, or of a tuple."""
    left = [each for each in values if each not in gone]
    return {each: values[each] for each in left} if isinstance(values, Mapping) else tuple(left)
