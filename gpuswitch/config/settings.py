"""The configuration: config.toml, then conf.d/*.toml by name, then `GPUSWITCH_...` variables → frozen settings.

Each layer overrides single keys of those before it. Every fault is found in one go and named with file, line and key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from gpuswitch.config.faults import no_such_variable, reason
from gpuswitch.config.merge import TOO_DEEP, Layers
from gpuswitch.config.places import ConfigFaultsError, Fault, Location
from gpuswitch.config.reference import as_toml, key_of
from gpuswitch.config.schema import (
    ENVIRONMENT,
    Deadlines,
    Defaults,
    GpuTable,
    History,
    Metrics,
    Table,
    Tables,
    Text,
)
from gpuswitch.config.shown import called
from gpuswitch.errors import ConfigError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.match import Match
from gpuswitch.model.policy import AtBoot
from gpuswitch.sentence import Sentence

DIRECTORY = Path("/etc/gpuswitch")
BUS_VARIABLE = "GPUSWITCH_BUS"
"""Names the bus to `gpuswitchctl`; often set where the service starts too, and no setting of it."""


_NOT_JSON = Sentence(
    "its value is not JSON: write a list like {list}, a table like {table}", list='["a", "b"]', table='{"key": 1}'
)


@dataclass(frozen=True, slots=True)
class GpuConfig:
    """What the configuration says of one GPU. `managed`: it has a table of its own, `written` is what that is known by
    there (`GpuTable.label`; "": its address).

    `name` and `host_driver` are empty where none is configured. `members` are further functions that move along.
    `rules` are the keys of [defaults], each as the GPU's own table has it, where it has it.
    """

    address: PciAddress
    managed: bool
    name: str = ""
    members: tuple[PciAddress, ...] = ()
    host_driver: str = ""
    at_boot: AtBoot = AtBoot.KEEP
    rules: Defaults = field(default_factory=Defaults)
    written: str = ""

    @property
    def label(self) -> str:
        """What its table is known by."""
        return self.written or str(self.address)

    @property
    def called(self) -> str:
        """The same to a person."""
        return called(self.name, self.label)


@dataclass(frozen=True, slots=True)
class Sought:
    """A table that says what its GPU is told by: `match`. Of several that fit, it means the one at `address`, if that
    is one of them (None: it means none).
    """

    match: Match
    address: PciAddress | None
    table: GpuTable
    rules: Defaults

    def at(self, address: PciAddress) -> GpuConfig:
        """What it says, once its GPU is found there."""
        return _gpu_config(self.table, self.rules, address)


@dataclass(frozen=True, slots=True)
class Setting:
    """One key in force: `deadlines.unbind`, its value as TOML writes it, and the file or variable that set it.

    `origin` is `default` where nothing did. `default` is the value that it would have then, "" for a key that has to be
    set.
    """

    key: str
    value: str
    origin: str
    default: str


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration. `gpus` are the managed ones whose address it says, `sought` the others; `settings` is
    every key in force, for people to read.

    `files` are those that were read; `warnings` has a sentence for each that never is, though it lies where one is.
    """

    gpus: tuple[GpuConfig, ...] = ()
    sought: tuple[Sought, ...] = ()
    defaults: Defaults = field(default_factory=Defaults)
    deadlines: Deadlines = field(default_factory=Deadlines)
    metrics: Metrics = field(default_factory=Metrics)
    history: History = field(default_factory=History)
    settings: tuple[Setting, ...] = ()
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = field(default=(), compare=False)

    def gpu(self, address: PciAddress) -> GpuConfig:
        """The configuration of one GPU; the defaults where it is not managed."""
        managed = next((gpu for gpu in self.gpus if gpu.address == address), None)
        return managed or GpuConfig(address, managed=False, rules=self.defaults)

    @property
    def members(self) -> Mapping[PciAddress, tuple[PciAddress, ...]]:
        """The configured members of every managed GPU, by its address."""
        return MappingProxyType({gpu.address: gpu.members for gpu in self.gpus})


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
    return Config(
        gpus=tuple(
            _gpu_config(gpu, _rules(gpu, tables.defaults), gpu.address)
            for gpu in tables.gpu
            if not gpu.match and gpu.address is not None
        ),
        sought=tuple(
            Sought(gpu.match, gpu.address, gpu, _rules(gpu, tables.defaults)) for gpu in tables.gpu if gpu.match
        ),
        defaults=tables.defaults,
        deadlines=tables.deadlines,
        metrics=tables.metrics,
        history=tables.history,
        settings=tuple(_in_force(layers, tables)),
        warnings=tuple(layers.warnings),
        files=tuple(layers.files),
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
            tables = Tables.model_validate(layers.values)
        except ValidationError as error:
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


def _gpu_config(gpu: GpuTable, rules: Defaults, address: PciAddress) -> GpuConfig:
    return GpuConfig(
        address=address,
        managed=True,
        name=gpu.name,
        members=gpu.members,
        host_driver=gpu.host_driver,
        at_boot=gpu.at_boot,
        rules=rules,
        written=gpu.label,
    )


def _rules(gpu: GpuTable, defaults: Defaults) -> Defaults:
    return defaults.model_copy(update={key: getattr(gpu, key) for key in _own_rules(gpu)})


def _own_rules(gpu: GpuTable) -> set[str]:
    """The keys of [defaults] that this table sets for itself."""
    return gpu.model_fields_set & Defaults.model_fields.keys()


def _in_force(layers: Layers, tables: Tables) -> Iterator[Setting]:
    """Every key with its value and the layer that set it."""
    for index, gpu in enumerate(tables.gpu):
        for key, value in gpu:
            inherits = key in Defaults.model_fields and key not in gpu.model_fields_set
            origin = layers.origin(("defaults", key) if inherits else ("gpu", index, key))
            in_force = getattr(tables.defaults, key) if inherits else value
            default = key_of(GpuTable, key).default
            yield Setting(layers.key(("gpu", index, key)), as_toml(in_force), origin or "default", default)
    for name, table in tables:
        if isinstance(table, Table):
            for key, value in table:
                default = key_of(type(table), key).default
                yield Setting(f"{name}.{key}", as_toml(value), layers.origin((name, key)) or "default", default)
