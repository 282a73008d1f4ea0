"""What the configuration says, once it is read (`loading.py`): frozen, and of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from gpuswitch.config.schema import Deadlines, Defaults, GpuTable, History, Metrics
from gpuswitch.config.shown import called
from gpuswitch.model.address import PciAddress
from gpuswitch.model.match import Match
from gpuswitch.model.policy import AtBoot

DIRECTORY = Path("/etc/gpuswitch")


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
        return gpu_config(self.table, self.rules, address)


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

    `files` are those that were read, in `directory`; `warnings` has a sentence for each that never is, though it lies
    where one is.
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
    directory: Path = field(default=DIRECTORY, compare=False)

    def gpu(self, address: PciAddress) -> GpuConfig:
        """The configuration of one GPU; the defaults where it is not managed."""
        managed = next((gpu for gpu in self.gpus if gpu.address == address), None)
        return managed or GpuConfig(address, managed=False, rules=self.defaults)

    @property
    def members(self) -> Mapping[PciAddress, tuple[PciAddress, ...]]:
        """The configured members of every managed GPU, by its address."""
        return MappingProxyType({gpu.address: gpu.members for gpu in self.gpus})


def gpu_config(gpu: GpuTable, rules: Defaults, address: PciAddress) -> GpuConfig:
    """What the GPU with this table has, which is at this address."""
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
