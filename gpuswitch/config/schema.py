"""The tables of the configuration, as they are written: every key, what it may hold, and its default."""

from __future__ import annotations

import ipaddress
import re
import reprlib
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gpuswitch.errors import InvalidArgument
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, named_for_vfio
from gpuswitch.model.policy import Busy, ModulePolicy, Release

ENVIRONMENT = "GPUSWITCH_"

LONGEST_DEADLINE = 600
LONGEST_WAIT = 86400
"""Seconds, both."""
NEVER_STOPPED = frozenset(
    {
        *("dbus.service", "dbus.socket", "dbus-broker.service", "systemd-logind.service", "systemd-udevd.service"),
        *("libvirtd.service", "virtqemud.service", "gpuswitchd.service", "init.scope"),
    }
)
"""Units that the system, or the switch itself, lives by."""


def _address(value: object) -> PciAddress:
    try:
        return PciAddress.parse(str(value))
    except InvalidArgument as error:
        raise ValueError(str(error)) from None


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,32}", value):
        raise ValueError(f"{reprlib.repr(value)} is not a name; use at most 32 of: letters, digits, '.', '_', '-'")
    try:
        PciAddress.parse(value)
    except InvalidArgument:
        return value
    raise ValueError(f"{value!r} looks like a PCI address; choose another name")


def _driver(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", value):
        raise ValueError(f"{reprlib.repr(value)} is not the name of a driver")
    return value


def _host_driver(value: str) -> str:
    if named_for_vfio(_driver(value)):
        raise ValueError(f"{value} is no host driver; name the one that drives the GPU on this host")
    return value


def _vfio_driver(value: str) -> str:
    if _driver(value) and not named_for_vfio(value):
        raise ValueError(f"{value} is no vfio driver: name one, such as {VFIO_DRIVER} or nvgrace-gpu-vfio-pci")
    return value


def _ip_address_or_none(value: str) -> str:
    return str(ipaddress.ip_address(value)) if value else ""


def _path_or_none(value: str) -> str:
    if value and (not value.startswith("/") or "\0" in value):
        raise ValueError(f"{reprlib.repr(value)} is not an absolute path")
    return value


def _not_bool(value: object) -> object:
    # pydantic takes true for 1, so `unbind = true` would become a deadline of one second
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")  # pydantic collects ValueErrors only
    return value


def _attempt(value: object) -> object:
    if isinstance(value, bool):
        return value
    # A variable of the environment is text.
    words: dict[object, object] = {"auto": "auto", "true": True, "false": False}
    if not isinstance(value, str) or value not in words:
        raise ValueError(f'must be true, false or "auto", not {reprlib.repr(value)}')
    return words[value]


_Address = Annotated[PciAddress, PlainValidator(_address)]


def unit(value: str) -> str:
    """The full name of a systemd unit that may be stopped and started (systemd.unit(5)).

    Raises:
        ValueError: it is none, or one that must stay.
    """
    if not re.fullmatch(r"[A-Za-z0-9:_.\\@-]{1,240}\.(service|socket|target|timer|path|scope)", value):
        raise ValueError(f"{reprlib.repr(value)} is not the full name of a unit, such as display-manager.service")
    if value in NEVER_STOPPED:
        raise ValueError(f"{value} must stay: the system, or the switch itself, lives by it")
    return value


def _unit_or_none(value: str) -> str:
    return unit(value) if value else ""


def _vtconsole(value: str) -> str:
    if not re.fullmatch(r"vtcon[0-9]{1,2}", value):
        raise ValueError(f"{reprlib.repr(value)} is not a console: they are named vtcon0, vtcon1, ...")
    return value


_Seconds = Annotated[float, Field(gt=0, le=LONGEST_DEADLINE, allow_inf_nan=False), BeforeValidator(_not_bool)]
_Patience = Annotated[float, Field(gt=0, le=LONGEST_WAIT, allow_inf_nan=False), BeforeValidator(_not_bool)]
_Unit = Annotated[str, AfterValidator(unit)]
_Path = Annotated[str, AfterValidator(_path_or_none)]
Attempt = Annotated[Literal["auto"] | bool, PlainValidator(_attempt)]
_AsOnRelease = Annotated[Release | None, BeforeValidator(lambda value: None if value == "" else value)]
"""TOML has no null: "" stands for it."""


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Defaults(Table):
    """What holds for a GPU whose own table does not say otherwise, or that has none.

    `busy`, with `wait_seconds` and `grace_seconds` (between a polite word and the next step), is about processes that
    have the GPU open; `stop_units` are stopped before anything is touched, and `after_host` is started when the GPU is
    back. `end_sessions`: logind sessions that have it open may be ended. `announce_sound`, `announce_display`: tell who
    follows udev that the card goes. `leave_consoles` are vtconsoles that stay unbound once they were. `vfio_driver` is
    for its display functions; "" is whatever fits best.

    `reset_on_failure`, then `rescan_on_failure`: what may be tried when the host driver cannot take the GPU, or when
    neither the way on nor the way back worked. "auto": while no host driver has any of its functions.

    A virtual machine that was given the GPU has `start_grace` seconds to open it; one that ended without a word has
    lost it `release_grace` seconds later, unless libvirt still has it in its books: a libvirt that is not there has
    `libvirt_patience` seconds to start. One that asks for it waits `acquire_seconds` at most. `on_release` is where
    the GPU goes then, `on_saved` and `on_migrated` where it goes after these two (None: as `on_release`).
    """

    allow_boot_display: bool = False
    busy: Busy = Busy.REFUSE
    wait_seconds: _Patience = 60.0
    grace_seconds: _Seconds = 10.0
    stop_units: tuple[_Unit, ...] = ()
    after_host: Annotated[str, AfterValidator(_unit_or_none)] = ""
    end_sessions: bool = False
    module_policy: ModulePolicy = ModulePolicy.AUTO
    vfio_driver: Annotated[str, AfterValidator(_vfio_driver)] = ""
    announce_sound: bool = True
    announce_display: bool = False
    leave_consoles: tuple[Annotated[str, AfterValidator(_vtconsole)], ...] = ()
    restore_boot_framebuffer: bool = False
    reset_on_failure: Attempt = "auto"
    rescan_on_failure: Attempt = "auto"
    start_grace: _Patience = 120.0
    release_grace: _Seconds = 10.0
    libvirt_patience: _Patience = 60.0
    acquire_seconds: _Seconds = 120.0
    on_release: Release = Release.HOST
    on_saved: _AsOnRelease = None
    on_migrated: _AsOnRelease = None


class GpuTable(Defaults):
    """One managed GPU. Keys that are not set are as in `Defaults`."""

    address: _Address
    name: Annotated[str, AfterValidator(_name)] = ""
    members: tuple[_Address, ...] = ()
    host_driver: Annotated[str, AfterValidator(_host_driver)] = ""


class Deadlines(Table):
    """How long a step may take before it counts as failed, in seconds, by kind of step."""

    module: _Seconds = 30.0
    power: _Seconds = 10.0
    override: _Seconds = 5.0
    unbind: _Seconds = 20.0
    probe: _Seconds = 30.0
    group: _Seconds = 5.0
    nodes: _Seconds = 15.0
    capture: _Seconds = 5.0
    holders: _Seconds = 10.0
    release: _Seconds = 5.0
    announce: _Seconds = 5.0
    libvirt: _Seconds = 60.0
    units: _Seconds = 100.0
    sessions: _Seconds = 20.0
    console: _Seconds = 10.0
    inhibit: _Seconds = 10.0
    reset: _Seconds = 30.0
    rescan: _Seconds = 60.0


def check_kind(kind: str, whose: str) -> None:
    """See that there is a deadline of this kind.

    Raises:
        TypeError: there is none; `whose` it is to be, in a word or two.
    """
    if kind not in Deadlines.model_fields:
        known = ", ".join(Deadlines.model_fields)
        raise TypeError(
            f"{whose} is of kind {kind!r}, for which there is no deadline in gpuswitch/config/schema.py: {known}"
        )


class Metrics(Table):
    """Where Prometheus finds the metrics. `port` 0: any free one; `address` "": none, they are in the file alone.

    `certificate` and `key`: they are served over HTTPS; `client_ca`: and to those alone whose certificate it signed.
    `textfile_directory`: where node_exporter looks for files. Each is an absolute path, or "": no such thing.
    """

    enabled: bool = True
    address: Annotated[str, AfterValidator(_ip_address_or_none)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535), BeforeValidator(_not_bool)] = 9752
    certificate: _Path = ""
    key: _Path = ""
    client_ca: _Path = ""
    textfile_directory: _Path = ""

    @model_validator(mode="after")
    def _whole(self) -> Metrics:
        if bool(self.certificate) != bool(self.key):
            there, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise ValueError(f"{there} is of no use without {missing}: set both, or none for plain HTTP")
        if self.client_ca and not self.certificate:
            raise ValueError("client_ca is of no use without certificate and key: set them as well")
        return self


class History(Table):
    """Which finished switches are remembered: the last `keep`, none for longer than `keep_days`."""

    enabled: bool = True
    keep_days: Annotated[float, Field(gt=0, le=36500, allow_inf_nan=False), BeforeValidator(_not_bool)] = 90.0
    keep: Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_not_bool)] = 1000


class Tables(Table):
    """The layers together, as they are written."""

    gpu: tuple[GpuTable, ...] = ()
    defaults: Defaults = Defaults()
    deadlines: Deadlines = Deadlines()
    metrics: Metrics = Metrics()
    history: History = History()


class Variables(Tables, BaseSettings):
    """The same, by the names that pydantic-settings gives them in the environment."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, env_nested_delimiter="__")
