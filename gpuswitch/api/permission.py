"""What a switch of GPUs asks for, and what whoever allows it should know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpuswitch.api.authority import Action
from gpuswitch.api.encoders import model_of
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.policy import Options

_MOST_NAMED = 10


def ends_more(record: GpuRecord, options: Options) -> bool:
    """Whether these options end more than the configuration does: `FORCE` goes for the method's own action."""
    rules = record.rules
    return options.ends_more(rules.busy, rules.stop_units)


def actions_of(records: Iterable[GpuRecord], options: Options) -> Sequence[str]:
    """What a caller has to be allowed to do, who asks for a switch of all of these."""
    return [Action.FORCE if any(ends_more(record, options) for record in records) else Action.SWITCH]


def about(records: Sequence[GpuRecord], options: Options | None) -> Mapping[str, str]:
    """The GPUs, and what configuration and request say may be stopped for a switch of them; None: there is none."""
    names = _few(list(map(_name, records)))
    if options is None:
        return {"gpu": names, "stops": "-"}
    stops = list(dict.fromkeys(what for record in records for what in _stops(record, options)))
    return {"gpu": names, "stops": _few(stops)}


def _few(named: Sequence[str]) -> str:
    """A caller chooses how many it names, and a dialog has room for some."""
    more = [f"and {len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
    return ", ".join([*named[:_MOST_NAMED], *more]) or "-"


def _name(record: GpuRecord) -> str:
    name, address = record.own_config.name, record.gpu.address
    return f"{name} ({address})" if name else f"{address} ({model_of(record)})"


def _stops(record: GpuRecord, options: Options) -> list[str]:
    rules = record.rules
    policy = options.policy(rules.busy)
    # What ends most stands first: units are as many as a caller likes.
    return [
        *([f"programs ({policy})"] if policy.ends_programs else []),
        *(["sessions"] if rules.end_sessions else []),
        *map(str, rules.stop_units),
        *options.stop_units,
    ]
