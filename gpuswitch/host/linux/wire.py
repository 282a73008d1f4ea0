"""How the arguments of a kernel operation go to the worker, and how what it returns comes back: as text.

On the way there: first the arguments of one value each, then those of the one that has many; of a mapping, each key and
its value. None is "", a bool 1 or 0. `worker_main` hands them to the method of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import NoneType
from typing import Any

from gpuswitch.host.operation import Operation
from gpuswitch.host.port import ATTRIBUTES, MAY_LACK, OPERATIONS, Captured
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import Candidate
from gpuswitch.model.facts import Consoles, Driver


def on_wire(arguments: Mapping[str, Any]) -> list[str]:
    single: list[str] = []
    many: list[str] = []
    for value in arguments.values():
        if isinstance(value, Mapping):
            many += map(_text, chain.from_iterable(value.items()))
        elif isinstance(value, Sequence) and not isinstance(value, str | PciAddress):
            many += map(_text, value)
        else:
            single.append(_text(value))
    return [*single, *many]


def from_wire(operation: Operation, values: list[str]) -> Any:
    """What an operation returns.

    Raises:
        ValueError: no worker of ours says this.
    """
    return _RESULTS[operation.result](values)


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _captured(values: list[str]) -> dict[PciAddress, Captured]:
    """For each function: its address, driver and module, and each of the attributes; "" for none."""
    captured = {}
    for address, driver, module, *rest in _rows(values, 3 + len(ATTRIBUTES)):
        attributes: dict[str, Any] = {name: text or None for name, text in zip(ATTRIBUTES, rest, strict=True)}
        captured[PciAddress.parse(address)] = Captured(Driver(driver, module or None) if driver else None, **attributes)
    return captured


def _candidates(values: list[str]) -> tuple[Candidate, ...]:
    return tuple(Candidate(module, frozenset(needs)) for module, *needs in map(str.split, values))


def _consoles(values: list[str]) -> Consoles:
    seen = _rows(values, 3)
    return Consoles(
        frame_buffers={int(n): PciAddress.parse(at) if at else None for kind, n, at in seen if kind == "fb"},
        mapped={int(terminal): int(n) for kind, terminal, n in seen if kind == "vt"},
        bound={name: bound == "1" for kind, name, bound in seen if kind == "vtcon"},
    )


def _rows(values: list[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(values[place::length] for place in range(length)), strict=True))


_RESULTS: Mapping[Any, Callable[[list[str]], Any]] = {
    NoneType: lambda _: None,
    bool | None: lambda values: values == ["1"] if values else None,
    str | None: lambda values: values[0] if values else None,
    tuple[str, ...]: tuple,
    tuple[PciAddress, ...]: lambda values: tuple(map(PciAddress.parse, values)),
    tuple[Candidate, ...]: _candidates,
    Consoles: _consoles,
    Mapping[PciAddress, Captured]: _captured,
}
CAPTURED = ",".join(attribute.path + "?" * (name in MAY_LACK) for name, attribute in ATTRIBUTES.items())
"""The attributes that a capture reads, as the worker is asked for them."""

for _each in OPERATIONS.values():
    if _each.result not in _RESULTS:
        raise TypeError(
            f"the operation {_each.name} returns {_each.result}: say how it comes from the worker, in {__name__}"
        )
