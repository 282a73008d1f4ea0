"""What to write into the configuration so that what is refused can be done: whole, to be copied."""

from __future__ import annotations

import json
from collections.abc import Iterable

from gpuswitch.config.settings import Config
from gpuswitch.model.address import PciAddress
from gpuswitch.model.gpu import Gpu
from gpuswitch.sentence import Sentence


def to_set(config: Config, gpu: Gpu, key: str, value: str) -> Sentence:
    """How to give a key of a GPU's own table this value, as TOML writes it: the file, the table, the line."""
    line = f"{key} = {value}"
    if not config.gpu(gpu.address).managed:
        return Sentence(
            "add to {file}, by gpuswitchctl config edit: `{table}`, `{address}`, `{line}`",
            table="[[gpu]]",
            address=f"address = {json.dumps(str(gpu.address))}",
            line=line,
            file=_file(config),
        )
    return Sentence(
        "set `{line}` in the [[gpu]] table of {gpu} in {file}, then run: systemctl reload gpuswitchd",
        line=line,
        gpu=config.gpu(gpu.address).called,
        file=_where(config, gpu),
    )


def to_set_members(
    config: Config, gpu: Gpu, *, more: Iterable[PciAddress] = (), less: Iterable[PciAddress] = ()
) -> Sentence:
    """The same for its members: those that there are, with some `more`, or some `less`."""
    kept = [member for member in config.gpu(gpu.address).members if member not in set(less)]
    return to_set(config, gpu, "members", _list(map(str, dict.fromkeys([*kept, *more]))))


def to_set_units(config: Config, gpu: Gpu, *, less: str) -> Sentence:
    """The same for the units that it has stopped, those that there are without this one: where these stand."""
    own = config.gpu(gpu.address)
    units = _list(str(unit) for unit in own.rules.stop_units if str(unit) != less)
    if own.managed:
        return to_set(config, gpu, "stop_units", units)
    return Sentence(
        "set `{line}` in the {table} table in {file}, then run: systemctl reload gpuswitchd",
        line=f"stop_units = {units}",
        table="[defaults]",
        file=next((each.origin for each in config.settings if each.key == "defaults.stop_units"), _file(config)),
    )


def _where(config: Config, gpu: Gpu) -> str:
    """The last file that has its table: what that says holds."""
    origins = {setting.key: setting.origin for setting in config.settings}
    label = config.gpu(gpu.address).label
    # The one of the two that it is known by; by default, nothing is said of the other.
    known = (origins.get(f"gpu[{label}].{key}", "default") for key in ("address", "match"))
    return next((origin for origin in known if origin != "default"), _file(config))


def _file(config: Config) -> str:
    """Where people write what they add."""
    return str(config.directory / "config.toml")


def _list(items: Iterable[str]) -> str:
    return f"[{', '.join(map(json.dumps, items))}]"
