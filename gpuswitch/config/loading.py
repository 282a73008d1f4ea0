"""Reads the configuration: config.toml, then conf.d/*.toml by name, then `GPUSWITCH_...` variables → frozen settings.

Each layer overrides single keys of those before it. Every fault is found in one go and named with file, line and key.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import Field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from gpuswitch.config.kinds import Text, checked
from gpuswitch.config.merge import TOO_DEEP, Layers
from gpuswitch.config.places import ConfigFaultsError, Fault, Location
from gpuswitch.config.reference import as_toml
from gpuswitch.config.schema import ENVIRONMENT, TABLES, Defaults, GpuTable, Tables, keys_of, names_of
from gpuswitch.config.settings import DIRECTORY, Config, Setting, Sought, gpu_config
from gpuswitch.errors import ConfigError
from gpuswitch.sentence import Sentence

BUS_VARIABLE = "GPUSWITCH_BUS"
"""Names the bus to `gpuswitchctl`; often set where the service starts too, and no setting of it."""


_NOT_JSON = Sentence(
    "its value is not JSON: write a list like {list}, a table like {table}", list='["a", "b"]', table='{"key": 1}'
)


def load(
    path: Path = DIRECTORY,
    environ: Mapping[str, str] = os.environ,
    *,
    instead: Mapping[Path, Path] = MappingProxyType({}),
    as_root: bool = False,
) -> Config:
    """Read everything below `path`, then `environ`. A directory or file that is not there sets nothing.

    Where `path` is a file, it is the only one. `instead` has the files that are read from somewhere else: a copy that
    somebody is at work on. Root takes no orders from files that others may write; `as_root` is the same for whoever
    only wants to know.

    Raises:
        ConfigFaultsError: with one line for each.
        ConfigError: it cannot be reached.

    """
    layers = Layers(instead, trusting=os.geteuid() != 0 and not as_root)
    try:
        alone = path.exists() and not path.is_dir()
    except OSError as error:  # no permission for a directory above it
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if alone:
        layers.add_file(path)
    else:
        layers.add_directory(path)
    for variable in sorted(environ):
        if variable.upper().startswith(ENVIRONMENT) and variable != BUS_VARIABLE:
            _add_variable(layers, variable, environ[variable])
    tables = _checked(layers)
    ruled = [(gpu, _rules(gpu, keys, tables.defaults)) for gpu, keys in _written(layers, tables)]
    return Config(
        gpus=tuple(
            gpu_config(gpu, rules, gpu.address) for gpu, rules in ruled if not gpu.match and gpu.address is not None
        ),
        sought=tuple(Sought(gpu.match, gpu.address, gpu, rules) for gpu, rules in ruled if gpu.match),
        defaults=tables.defaults,
        deadlines=tables.deadlines,
        metrics=tables.metrics,
        history=tables.history,
        settings=tuple(_in_force(layers, tables)),
        warnings=tuple(layers.warnings),
        files=tuple(layers.files),
        directory=(path.parent if alone else path).absolute(),
    )


def _add_variable(layers: Layers, variable: str, value: str) -> None:
    """Each variable is a layer of its own, so that a fault in it names it."""
    from gpuswitch.config.variables import read  # noqa: PLC0415 -- by need, as it says

    try:
        values = read(variable, value)
    except ValueError:
        layers.faults.append(_variable_fault(variable, _NOT_JSON))
        return
    except RecursionError:
        layers.faults.append(_variable_fault(variable, TOO_DEEP))
        return
    if isinstance(values.get("gpu"), dict):
        layers.faults.append(
            _variable_fault(variable, Sentence("write a list of tables, [{what}]", what='{"address": "01:00.0"}'))
        )
        return
    if not values:
        from gpuswitch.config.faults import no_such_variable  # noqa: PLC0415 -- as below

        layers.faults.append(_variable_fault(variable, no_such_variable(variable)))
    layers.add(f"the variable {variable}", {name: _marked(variable, table) for name, table in values.items()})


def _variable_fault(variable: str, what: str) -> Fault:
    return Fault.of(f"the variable {variable}", what)


def _marked(variable: str, table: Any) -> Any:
    """The table, with what stands in the variable as it is, and not as JSON, marked as text of the environment."""
    if not isinstance(table, dict) or "__" not in variable:
        return table
    return {key: Text(value) if isinstance(value, str) else value for key, value in table.items()}


def _checked(layers: Layers) -> Tables:
    """The settings of all layers.

    Raises:
        ConfigFaultsError: with every fault.

    """
    faults = layers.faults
    if not faults:  # a layer that could not be read would make others look wrong
        try:
            tables = checked(layers.values)
        except ValidationError as error:
            from gpuswitch.config.faults import reason  # noqa: PLC0415 -- by need: most files have none

            found = error.errors(include_url=False)
            faults = [layers.fault(details["loc"], reason(details)) for details in found]
        else:
            faults = [layers.fault(location, why) for location, why in _contradictions(tables.gpu)]
            if not faults:
                return tables
    raise ConfigFaultsError(sorted(faults, key=layers.in_order))


def _contradictions(gpus: Sequence[GpuTable]) -> Iterator[tuple[Location, str]]:
    """What is wrong between tables that are well-formed each."""
    names: dict[str, str] = {}
    claims = {gpu.address: gpu.label for gpu in gpus if gpu.address is not None}
    tables = frozenset(claims)
    for index, gpu in enumerate(gpus):
        name = gpu.name.casefold()
        if name and name in names:
            yield (
                ("gpu", index, "name"),
                Sentence("{name} is the name of {gpu} already", name=repr(gpu.name), gpu=names[name]),
            )
        names.setdefault(name, gpu.label)
        for place, member in enumerate(gpu.members):
            claimant = claims.setdefault(member, gpu.label)
            if member in tables:
                yield (
                    ("gpu", index, "members", place),
                    Sentence("{member} has a [[gpu]] table, so it cannot be a member", member=member),
                )
            elif claimant != gpu.label:
                yield (
                    ("gpu", index, "members", place),
                    Sentence("{member} is a member of {gpu} already", member=member, gpu=claimant),
                )


def _written(layers: Layers, tables: Tables) -> Iterator[tuple[GpuTable, Collection[str]]]:
    """The table of each GPU, with the keys that stand in it."""
    yield from zip(tables.gpu, layers.values.get("gpu", ()), strict=True)


def _rules(gpu: GpuTable, keys: Collection[str], defaults: Defaults) -> Defaults:
    """What of [defaults] holds for a GPU, in whose table these keys stand."""
    return replace(defaults, **{key: getattr(gpu, key) for key in names_of(Defaults) if key in keys})


def _in_force(layers: Layers, tables: Tables) -> Iterator[Setting]:
    """Every key with its value and the layer that set it."""
    inherited = names_of(Defaults)
    for index, (gpu, keys) in enumerate(_written(layers, tables)):
        for each in keys_of(GpuTable):
            inherits = each.name in inherited and each.name not in keys
            origin = layers.origin(("defaults", each.name) if inherits else ("gpu", index, each.name))
            in_force = getattr(tables.defaults if inherits else gpu, each.name)
            yield _setting(layers.key(("gpu", index, each.name)), each, in_force, origin)
    for name, table in TABLES.items():
        if table is not GpuTable:
            for each in keys_of(table):
                in_force = getattr(getattr(tables, name), each.name)
                yield _setting(f"{name}.{each.name}", each, in_force, layers.origin((name, each.name)))


def _setting(key: str, field: Field[Any], in_force: object, origin: str | None) -> Setting:
    return Setting(key, as_toml(in_force), origin or "default", as_toml(field.default))
