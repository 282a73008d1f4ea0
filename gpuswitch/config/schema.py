"""The tables of the configuration, as they are written: every key, what it may hold, its default, and what it is for.

`reference.py` tells the same to people; docs/configuration.md is made from that.
"""

from __future__ import annotations

import ipaddress
import re
import reprlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from gpuswitch.config.shown import called, shown
from gpuswitch.errors import InvalidArgument
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, named_for_vfio
from gpuswitch.model.match import Match
from gpuswitch.model.policy import AtBoot, Busy, ModulePolicy, Release
from gpuswitch.sentence import Sentence

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


def _address_or_none(value: object) -> PciAddress | None:
    return None if value is None or value == "" else _address(value)


def _address(value: object) -> PciAddress:
    try:
        return PciAddress.parse(str(value))
    except InvalidArgument as error:
        raise ValueError(str(error)) from None


_DIGITS = re.compile(r"(?:0x)?([0-9a-f]{4})", re.IGNORECASE | re.ASCII)
_SERIAL = re.compile(r"[0-9a-f]{2}(?:-[0-9a-f]{2}){7}", re.IGNORECASE | re.ASCII)
_SLOT = re.compile(r"[!#-\[\]-~]{1,64}", re.ASCII)


def _hex_digits(text: str) -> str:
    found = _DIGITS.fullmatch(text)
    return found[1].lower() if found else ""


def _hex_pair(text: str) -> str:
    vendor, colon, device = text.partition(":")
    first, second = _hex_digits(vendor), _hex_digits(device)
    return f"{first}:{second}" if colon and first and second else ""


def _port(text: str) -> str:
    try:
        return str(PciAddress.parse(text))
    except InvalidArgument:
        return ""


_MATCH_KEYS = {
    "vendor": (_hex_digits, 'four hex digits, such as "10de"'),
    "device": (_hex_digits, 'four hex digits, such as "2484"'),
    "subsystem": (_hex_pair, 'vendor and device in hex digits, such as "1043:87c1"'),
    "serial": (lambda text: text.lower() if _SERIAL.fullmatch(text) else "", 'such as "00-80-ee-00-00-00-41-80"'),
    "slot": (lambda text: text if _SLOT.fullmatch(text) else "", 'a name in /sys/bus/pci/slots, such as "2"'),
    "port": (_port, 'the PCI address of a bridge above the GPU, such as "0000:00:01.0"'),
}
"""How each key is read ("": it is no such thing), and what it must be."""


def match_of(value: object) -> Match:
    """What a GPU is told by, in its one spelling.

    Raises:
        ValueError: it can be told by nothing of the kind.
    """
    if not isinstance(value, dict):
        raise ValueError(
            Sentence(
                "must be a table: write {table}, not {value}",
                table='match = { vendor = "10de", device = "2484" }',
                value=shown(value),
            )
        )
    said = {}
    for key, text in value.items():
        if key not in _MATCH_KEYS:
            raise ValueError(
                Sentence(
                    "{key} is nothing that a GPU is told by; known are {names}",
                    key=reprlib.repr(key),
                    names=", ".join(_MATCH_KEYS),
                )
            )
        read, must = _MATCH_KEYS[key]
        if not isinstance(text, str) or not (known := read(text)):
            raise ValueError(
                Sentence("{key} must be {what}, in quotes, not {value}", key=key, what=must, value=shown(text))
            )
        said[key] = known
    if "device" in said and "vendor" not in said:
        raise ValueError(Sentence("device is of no use without vendor, whose number it is: add vendor"))
    return Match(**said)


def name_of(value: str) -> str:
    """What a GPU is called, as it is; "" is no name.

    Raises:
        ValueError: nothing can be called so.
    """
    # A command to be copied would read a leading - as an option.
    if not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,31})?", value):
        raise ValueError(
            Sentence(
                "{value} is not a name; use at most 32 of: letters, digits, '.', '_', '-', and a letter or digit first",
                value=reprlib.repr(value),
            )
        )
    try:
        PciAddress.parse(value)
    except InvalidArgument:
        return value
    raise ValueError(Sentence("{value} looks like a PCI address; choose another name", value=repr(value)))


def _driver(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", value):
        raise ValueError(Sentence("{value} is not the name of a driver", value=reprlib.repr(value)))
    return value


def _host_driver(value: str) -> str:
    if named_for_vfio(_driver(value)):
        raise ValueError(
            Sentence("{driver} is no host driver; name the one that drives the GPU on this host", driver=value)
        )
    return value


def _vfio_driver(value: str) -> str:
    if _driver(value) and not named_for_vfio(value):
        raise ValueError(
            Sentence(
                "{driver} is no vfio driver: name one, such as {known} or nvgrace-gpu-vfio-pci",
                driver=value,
                known=VFIO_DRIVER,
            )
        )
    return value


def _ip_address_or_none(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value)) if value else ""
    except ValueError:
        said = Sentence("{value} is no IP address: write one, such as 127.0.0.1 or ::1", value=reprlib.repr(value))
        raise ValueError(said) from None


def _path_or_none(value: str) -> str:
    if value and (not value.startswith("/") or "\0" in value):
        raise ValueError(Sentence("{value} is not an absolute path: begin it with /", value=reprlib.repr(value)))
    return value


class Text(str):
    """A value of an environment variable, where everything is text. In a file, 5 and "5" are different things."""

    __slots__ = ()


def _number(value: object) -> object:
    # pydantic takes true for 1 and "5" for 5, so `unbind = true` would become a deadline of one second.
    if isinstance(value, Text) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise PydanticCustomError("float_type", "no number")


def _whole_number(value: object) -> object:
    if isinstance(value, Text) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise PydanticCustomError("int_type", "no whole number")


def _boolean(value: object) -> object:
    # pydantic takes 1 and "yes" for true.
    if isinstance(value, Text | bool):
        return value
    raise PydanticCustomError("bool_type", "neither true nor false")


def _attempt(value: object) -> object:
    if isinstance(value, bool):
        return value
    words: dict[object, object] = {"auto": "auto", **({"true": True, "false": False} if type(value) is Text else {})}
    if not isinstance(value, str) or value not in words:
        raise PydanticCustomError("enum", "none of the words")
    return words[value]


@dataclass(frozen=True, slots=True)
class Form:
    """What the value of a key is, in words of TOML. `values` says which there are, where the type does not.

    `unit` is what a number counts.
    """

    type: str
    values: str = ""
    unit: str = ""


def _one_of(words: type[StrEnum], *more: str) -> Form:
    *first, last = (f'"{word}"' for word in (*words, *more))
    return Form("string", Sentence("{most} or {last}", most=", ".join(first), last=last))


_Address = Annotated[PciAddress, PlainValidator(_address)]


def unit(value: str) -> str:
    """The full name of a systemd unit that may be stopped and started (systemd.unit(5)).

    Raises:
        ValueError: it is none, or one that must stay.
    """
    if not re.fullmatch(r"[A-Za-z0-9:_.\\@-]{1,240}\.(service|socket|target|timer|path|scope)", value):
        raise ValueError(
            Sentence(
                "{value} is not the full name of a unit, such as display-manager.service", value=reprlib.repr(value)
            )
        )
    if value in NEVER_STOPPED:
        raise ValueError(Sentence("{unit} must stay: the system, or the switch itself, lives by it", unit=value))
    return value


def _unit_or_none(value: str) -> str:
    return unit(value) if value else ""


def _vtconsole(value: str) -> str:
    if not re.fullmatch(r"vtcon[0-9]{1,2}", value):
        raise ValueError(
            Sentence("{value} is not a console: they are named vtcon0, vtcon1, ...", value=reprlib.repr(value))
        )
    return value


_ADDRESS = Form("string", Sentence('a PCI address, such as 0000:01:00.0; "" where `match` says which'))
_MATCH = Form(
    "inline table", Sentence("vendor, device, subsystem, serial, slot and port, each a string, those that are wanted")
)
_UNIT = Form("string", Sentence('the full name of a systemd unit, such as display-manager.service, or "" for none'))
_DRIVER = Form("string", Sentence('the name of a driver, or ""'))
_ATTEMPT = Form('boolean or "auto"', Sentence("{most} or {last}", most="true, false", last='"auto"'))

_Boolean = Annotated[
    bool, BeforeValidator(_boolean), Form("boolean", Sentence("{most} or {last}", most="true", last="false"))
]
_Number = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
_Integer = Annotated[int, BeforeValidator(_whole_number)]
_Seconds = Annotated[_Number, Field(le=LONGEST_DEADLINE), Form("number", unit="seconds")]
_Patience = Annotated[_Number, Field(le=LONGEST_WAIT), Form("number", unit="seconds")]
_Unit = Annotated[str, AfterValidator(unit)]
_Path = Annotated[str, AfterValidator(_path_or_none), Form("string", Sentence('an absolute path, or "" for none'))]
Attempt = Annotated[Literal["auto"] | bool, PlainValidator(_attempt), _ATTEMPT]
_AsOnRelease = Annotated[
    Release | None, BeforeValidator(lambda value: None if value == "" else value), _one_of(Release, "")
]
"""TOML has no null: "" stands for it."""


class Table(BaseModel):
    # Built when it is first needed: the service reads its files as `Tables`, and needs no other one's.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Defaults(Table):
    """What holds for a GPU whose own table does not say otherwise, or that has none."""

    allow_boot_display: _Boolean = Field(
        False, description="Whether the GPU may go although it shows the firmware's and the kernel's first screen."
    )
    busy: Annotated[Busy, _one_of(Busy)] = Field(
        Busy.REFUSE,
        description="What becomes of programs that have the GPU open: they are named and nothing is touched, waited "
        "for, asked to end (services through systemd, others by SIGTERM), or ended (by SIGKILL in the end).",
    )
    wait_seconds: _Patience = Field(60.0, description='How long `busy = "wait"` waits for them.')
    grace_seconds: _Seconds = Field(
        10.0, description='How long `"terminate"` and `"kill"` leave them between a polite word and the next step.'
    )
    stop_units: Annotated[tuple[_Unit, ...], Form("array of strings", Sentence("full names of systemd units"))] = Field(
        (), description="Units that are stopped before anything is touched, and started again when the GPU is back."
    )
    after_host: Annotated[str, AfterValidator(_unit_or_none), _UNIT] = Field(
        "", description="A unit that is started when the GPU is back."
    )
    end_sessions: _Boolean = Field(
        False, description="Whether logind sessions that have the GPU open are ended, and all programs in them."
    )
    module_policy: Annotated[ModulePolicy, _one_of(ModulePolicy)] = Field(
        ModulePolicy.AUTO,
        description="When the modules of the host driver are unloaded: where that is the safe way to detach the GPU "
        "(the last NVIDIA GPU), wherever no other GPU uses them, or never.",
    )
    vfio_driver: Annotated[
        str,
        AfterValidator(_vfio_driver),
        Form("string", Sentence('the name of a vfio driver, such as vfio-pci, or ""')),
    ] = Field("", description='The vfio driver of the display functions; "" is the one that fits best.')
    announce_sound: _Boolean = Field(
        True, description="Whether who follows udev, such as PipeWire, is told that the sound card goes, to let it go."
    )
    announce_display: _Boolean = Field(
        False, description="The same for the display; a compositor that draws on the GPU may end."
    )
    leave_consoles: Annotated[
        tuple[Annotated[str, AfterValidator(_vtconsole)], ...],
        Form("array of strings", Sentence("names in /sys/class/vtconsole, such as vtcon1")),
    ] = Field(
        (), description="Text consoles that stay unbound once they were: binding them again freezes some machines."
    )
    restore_boot_framebuffer: _Boolean = Field(
        False, description="Whether the firmware's frame buffer gets its driver back when the GPU is back."
    )
    reset_on_failure: Attempt = Field(
        "auto",
        description="Whether the functions may be reset when the host driver cannot take the GPU, or when neither the "
        'way on nor the way back worked: "auto" only while no host driver has any of them, true also then.',
    )
    rescan_on_failure: Attempt = Field(
        "auto",
        description="Whether, after that, the functions may be removed from the PCI bus and found again; as above.",
    )
    start_grace: _Patience = Field(
        120.0, description="How long a virtual machine that was given the GPU may take to open it before it goes home."
    )
    release_grace: _Seconds = Field(
        10.0,
        description="How long libvirt's word is waited for when the process of a machine is gone, and libvirt has it "
        "in its books no more.",
    )
    libvirt_patience: _Patience = Field(
        60.0,
        description="How long a libvirt that is not there may take to start and to clear up after its machine; the "
        "GPU stays on vfio until then.",
    )
    acquire_seconds: _Seconds = Field(
        120.0,
        description="How long the start of a virtual machine waits for its GPUs before it is refused; more than "
        "`wait_seconds` makes sense.",
    )
    on_release: Annotated[Release, _one_of(Release)] = Field(
        Release.HOST,
        description="Where the GPU goes when its virtual machine is over: home to the host, or it stays on vfio.",
    )
    on_saved: _AsOnRelease = Field(
        None, description='The same when the machine was saved to a file; "" is as `on_release`.'
    )
    on_migrated: _AsOnRelease = Field(
        None, description='The same when the machine went to another host; "" is as `on_release`.'
    )


class GpuTable(Defaults):
    """One managed GPU: there is such a table for each. It has all keys of [defaults], too, for this GPU alone."""

    address: Annotated[PciAddress | None, PlainValidator(_address_or_none), _ADDRESS] = Field(
        None,
        description="The PCI address of the GPU, as `gpuswitchctl list` shows it; any function of the card will do.",
    )
    match: Annotated[Match, PlainValidator(match_of), _MATCH] = Field(
        Match(),
        description="What the GPU is told by, where its address moves with the numbers of the buses: `gpuswitchctl "
        "status` shows what there is. It has to fit one GPU; where it fits several, `address` says which of them.",
    )
    name: Annotated[
        str,
        AfterValidator(name_of),
        Form("string", Sentence("at most 32 letters, digits, dots, underscores and dashes, a letter or digit first")),
    ] = Field("", description="What the GPU is called on the command line.")
    members: Annotated[tuple[_Address, ...], Form("array of strings", Sentence("PCI addresses"))] = Field(
        (), description="Functions of other slots that move along; each belongs to one GPU only."
    )
    host_driver: Annotated[str, AfterValidator(_host_driver), _DRIVER] = Field(
        "",
        description="The driver of the display functions on the host where nothing else tells: the GPU was on a vfio "
        "driver before the service started.",
    )
    at_boot: Annotated[AtBoot, _one_of(AtBoot)] = Field(
        AtBoot.KEEP,
        description="Where the GPU is brought when the machine starts, before the service is ready and the display "
        "manager begins: to its host drivers, to vfio, or nowhere.",
    )

    @model_validator(mode="after")
    def _says_which(self) -> GpuTable:
        if self.address is None and not self.match:
            raise ValueError(
                Sentence(
                    'it does not say which GPU it is about: add address = "0000:01:00.0", as gpuswitchctl list shows '
                    "it, or match"
                )
            )
        return self

    @property
    def label(self) -> str:
        """What it is known by where people are told of it: its address as it is written, else what it matches."""
        return str(self.address or self.match)

    @property
    def called(self) -> str:
        """The same to a person."""
        return called(self.name, self.label)


class Deadlines(Table):
    """How long a step may take before it counts as failed, by kind of step."""

    module: _Seconds = Field(30.0, description="Load or unload kernel modules.")
    power: _Seconds = Field(10.0, description="Wake the GPU, or restore its power management.")
    override: _Seconds = Field(5.0, description="Set or clear `driver_override`.")
    unbind: _Seconds = Field(20.0, description="Take a function from its driver.")
    probe: _Seconds = Field(30.0, description="Have the kernel bind a function to a driver.")
    group: _Seconds = Field(5.0, description="Open or close the VFIO group.")
    nodes: _Seconds = Field(15.0, description="Wait for device nodes, such as those in `/dev/dri`.")
    capture: _Seconds = Field(5.0, description="Read what the way home will have to restore.")
    holders: _Seconds = Field(
        10.0, description="Look once for programs that have the GPU open; who does not answer by then counts as one."
    )
    release: _Seconds = Field(
        5.0, description="Wait for programs that were asked to let go, or that have the GPU open for a moment only."
    )
    announce: _Seconds = Field(5.0, description="Tell who follows udev that a card goes.")
    libvirt: _Seconds = Field(60.0, description="Wait until libvirt has cleared up after a machine.")
    units: _Seconds = Field(100.0, description="Stop or start a unit; systemd itself gives most of them 90 seconds.")
    sessions: _Seconds = Field(20.0, description="End a session.")
    console: _Seconds = Field(10.0, description="Move the text consoles to another screen.")
    inhibit: _Seconds = Field(10.0, description="Keep the machine from sleeping.")
    reset: _Seconds = Field(30.0, description="Reset a function.")
    rescan: _Seconds = Field(60.0, description="Remove the functions from the PCI bus, or find them again.")


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
    """Where Prometheus finds the metrics: at http://ADDRESS:PORT/metrics, or https:// with a certificate."""

    enabled: _Boolean = Field(True, description="Whether there are metrics.")
    address: Annotated[
        str,
        AfterValidator(_ip_address_or_none),
        Form("string", Sentence('an IP address, such as 127.0.0.1 or ::1, or "" for none')),
    ] = Field(
        "127.0.0.1",
        description='Where they are served; "0.0.0.0" or "::" lets other machines read them; "" leaves them to the '
        "file alone (`textfile_directory`).",
    )
    port: Annotated[_Integer, Field(ge=0, le=65535), Form("integer")] = Field(
        9752, description="The TCP port; 0 is any free one."
    )
    certificate: _Path = Field(
        "", description="The file with the certificate to serve them over HTTPS, PEM; `key` belongs to it."
    )
    key: _Path = Field("", description="The file with its private key, PEM, which not everybody may read.")
    client_ca: _Path = Field(
        "", description="A file with certificates of authorities, PEM: only who has a certificate of one is served."
    )
    textfile_directory: _Path = Field(
        "", description="The directory in which node_exporter looks for files; gpuswitch.prom is kept there."
    )

    @model_validator(mode="after")
    def _whole(self) -> Metrics:
        if bool(self.certificate) != bool(self.key):
            there, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise ValueError(
                Sentence(
                    "{there} is of no use without {missing}: set both, or none for plain HTTP",
                    there=there,
                    missing=missing,
                )
            )
        if self.client_ca and not self.certificate:
            raise ValueError(Sentence("client_ca is of no use without certificate and key: set them as well"))
        return self


class History(Table):
    """Which finished switches are remembered."""

    enabled: _Boolean = Field(
        True, description="Whether finished switches are kept in `/var/lib/gpuswitch/history.db`."
    )
    keep_days: Annotated[_Number, Field(le=36500), Form("number", unit="days")] = Field(
        90.0, description="How long each is kept."
    )
    keep: Annotated[_Integer, Field(ge=1, le=10_000), Form("integer", unit="switches")] = Field(
        1000, description="How many are kept at most, the last ones."
    )


class Tables(Table):
    """The layers together, as they are written."""

    gpu: tuple[GpuTable, ...] = ()
    # Each as it is by default, which needs no validation.
    defaults: Defaults = Defaults.model_construct()
    deadlines: Deadlines = Deadlines.model_construct()
    metrics: Metrics = Metrics.model_construct()
    history: History = History.model_construct()
