"""What a switch of GPUs asks for, and what whoever allows it should know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpuswitch.api.authority import Action
from gpuswitch.api.encoders import model_of
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.drivers import profile_of
from gpuswitch.model.policy import Options

_MOST_NAMED = 10


def ends_more(record: GpuRecord, options: Options) -> bool:
    """Whether these options end more than the configuration does: `FORCE` goes for the method's own action."""
    rules = record.rules
    return options.ends_more(rules.busy, rules.stop_units)


def actions_of(records: Iterable[GpuRecord], options: Options) -> Sequence[str]:
    """What a caller has to be allowed to do, who asks for a switch of all of these."""
    return [Action.FORCE if any(ends_more(record, options) for record in records) else Action.SWITCH]


def about(records: Sequence[GpuRecord], options: Options | None, target: str = "") -> Mapping[str, str]:
    """The GPUs, where they go, and what may be stopped for a switch of them; options None: there is none.

    `what` is for the question, in any language: `rtx3070 (0000:01:00.0) -> vfio`. `gpu` and `target` are for rules.
    """
    names = _few(list(map(_name, records)))
    what = f"{names} -> {target}" if target else names
    told = {"gpu": names, "target": target or "-", "what": what}
    if options is None:
        return told | {"stops": "-"}
    stops = list(dict.fromkeys(what for record in records for what in _stops(record, options)))
    return told | {"stops": _few(stops)}


def _few(named: Sequence[str]) -> str:
    """A caller chooses how many it names, and a dialog has room for some."""
    more = [f"and {len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
    return ", ".join([*named[:_MOST_NAMED], *more]) or "-"


def _name(record: GpuRecord) -> str:
    name, address = record.own_config.name, record.gpu.address
    return f"{name} ({address})" if name else f"{address} ({model_of(record)})"


def _stops(record: GpuRecord, options: Options) -> list[str]:
    """What configuration and request say, and units that the drivers bring along: nobody is looked for."""
    rules = record.rules
    policy = options.policy(rules.busy)
    # What ends most stands first: units are as many as a caller likes.
    return [
        *([f"programs ({policy})"] if policy.ends_programs else []),
        *(["sessions"] if rules.end_sessions else []),
        *map(str, rules.stop_units),
        *_units_of_drivers(record),
        *options.stop_units,
    ]


def _units_of_drivers(record: GpuRecord) -> list[str]:
    """Those that a switch stops by itself where they run."""
    drivers = (function.driver for function in record.gpu.present(record.facts_now))
    return [str(unit) for driver in drivers if driver for unit in profile_of(driver).units]
