"""The tables of the configuration, as they are written: every key, its default, and what it is for.

What a key of each kind may hold, `kinds.py` says. That takes pydantic, which the service itself has no need of once its
files are read: see `reading.py`. `reference.py` tells all of it to people; docs/configuration.md is made from that.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from enum import Enum, auto
from typing import Any, Literal

from gpuswitch.config.shown import called, shown
from gpuswitch.errors import InvalidArgument
from gpuswitch.model.address import PciAddress
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


Attempt = Literal["auto"] | bool


class Kind(Enum):
    """What a key holds."""

    BOOLEAN = auto()
    BUSY = auto()
    PATIENCE = auto()
    SECONDS = auto()
    DAYS = auto()
    UNIT_NAMES = auto()
    UNIT_NAME = auto()
    MODULE_POLICY = auto()
    VFIO_DRIVER = auto()
    CONSOLE_NAMES = auto()
    ATTEMPT = auto()
    RELEASE = auto()
    RELEASE_OR_NONE = auto()
    ADDRESS = auto()
    MATCH = auto()
    NAME = auto()
    ADDRESSES = auto()
    HOST_DRIVER = auto()
    AT_BOOT = auto()
    IP_ADDRESS = auto()
    PATH = auto()
    PORT = auto()
    SWITCHES = auto()


class Table:
    """What each of the tables is, a dataclass as well."""


def toml_key(kind: Kind, default: Any, sentence: str) -> Any:
    """One key of a table: what it holds, its default, and what it is for."""
    return field(default=default, metadata={"kind": kind, "sentence": sentence})


def keys_of(table: type[Table]) -> tuple[Field[Any], ...]:
    """The keys of a table."""
    return fields(table)  # type: ignore[arg-type] # each table is a dataclass


def kind_of(key: Field[Any]) -> Kind:
    """What it holds."""
    kind: Kind = key.metadata["kind"]
    return kind


def names_of(table: type[Table]) -> tuple[str, ...]:
    """The names of the keys of a table."""
    return tuple(each.name for each in keys_of(table))


@dataclass(frozen=True, kw_only=True)
class Defaults(Table):
    """What holds for a GPU whose own table does not say otherwise, or that has none."""

    allow_boot_display: bool = toml_key(
        Kind.BOOLEAN, False, "Whether the GPU may go although it shows the firmware's and the kernel's first screen."
    )
    busy: Busy = toml_key(
        Kind.BUSY,
        Busy.REFUSE,
        "What becomes of programs that have the GPU open: they are named and nothing is touched, waited "
        "for, asked to end (services through systemd, others by SIGTERM), or ended (by SIGKILL in the end).",
    )
    wait_seconds: float = toml_key(Kind.PATIENCE, 60.0, 'How long `busy = "wait"` waits for them.')
    grace_seconds: float = toml_key(
        Kind.SECONDS, 10.0, 'How long `"terminate"` and `"kill"` leave them between a polite word and the next step.'
    )
    stop_units: tuple[str, ...] = toml_key(
        Kind.UNIT_NAMES,
        (),
        "Units that are stopped before anything is touched, and started again when the GPU is back.",
    )
    after_host: str = toml_key(Kind.UNIT_NAME, "", "A unit that is started when the GPU is back.")
    end_sessions: bool = toml_key(
        Kind.BOOLEAN, False, "Whether logind sessions that have the GPU open are ended, and all programs in them."
    )
    module_policy: ModulePolicy = toml_key(
        Kind.MODULE_POLICY,
        ModulePolicy.AUTO,
        "When the modules of the host driver are unloaded: where that is the safe way to detach the GPU "
        "(the last NVIDIA GPU), wherever no other GPU uses them, or never.",
    )
    vfio_driver: str = toml_key(
        Kind.VFIO_DRIVER, "", 'The vfio driver of the display functions; "" is the one that fits best.'
    )
    announce_sound: bool = toml_key(
        Kind.BOOLEAN,
        True,
        "Whether who follows udev, such as PipeWire, is told that the sound card goes, to let it go.",
    )
    announce_display: bool = toml_key(
        Kind.BOOLEAN, False, "The same for the display; a compositor that draws on the GPU may end."
    )
    leave_consoles: tuple[str, ...] = toml_key(
        Kind.CONSOLE_NAMES,
        (),
        "Text consoles that stay unbound once they were: binding them again freezes some machines.",
    )
    restore_boot_framebuffer: bool = toml_key(
        Kind.BOOLEAN, False, "Whether the firmware's frame buffer gets its driver back when the GPU is back."
    )
    reset_on_failure: Attempt = toml_key(
        Kind.ATTEMPT,
        "auto",
        "Whether the functions may be reset when the host driver cannot take the GPU, or when neither the "
        'way on nor the way back worked: "auto" only while no host driver has any of them, true also then.',
    )
    rescan_on_failure: Attempt = toml_key(
        Kind.ATTEMPT,
        "auto",
        "Whether, after that, the functions may be removed from the PCI bus and found again; as above.",
    )
    start_grace: float = toml_key(
        Kind.PATIENCE,
        120.0,
        "How long a virtual machine that was given the GPU may take to open it before it goes home.",
    )
    release_grace: float = toml_key(
        Kind.SECONDS,
        10.0,
        "How long libvirt's word is waited for when the process of a machine is gone, and libvirt has it "
        "in its books no more.",
    )
    libvirt_patience: float = toml_key(
        Kind.PATIENCE,
        60.0,
        "How long a libvirt that is not there may take to start and to clear up after its machine; the "
        "GPU stays on vfio until then.",
    )
    acquire_seconds: float = toml_key(
        Kind.SECONDS,
        120.0,
        "How long the start of a virtual machine waits for its GPUs before it is refused; more than "
        "`wait_seconds` makes sense.",
    )
    on_release: Release = toml_key(
        Kind.RELEASE,
        Release.HOST,
        "Where the GPU goes when its virtual machine is over: home to the host, or it stays on vfio.",
    )
    on_saved: Release | None = toml_key(
        Kind.RELEASE_OR_NONE, None, 'The same when the machine was saved to a file; "" is as `on_release`.'
    )
    on_migrated: Release | None = toml_key(
        Kind.RELEASE_OR_NONE, None, 'The same when the machine went to another host; "" is as `on_release`.'
    )


@dataclass(frozen=True, kw_only=True)
class GpuTable(Defaults):
    """One managed GPU: there is such a table for each. It has all keys of [defaults], too, for this GPU alone."""

    address: PciAddress | None = toml_key(
        Kind.ADDRESS,
        None,
        "The PCI address of the GPU, as `gpuswitchctl list` shows it; any function of the card will do.",
    )
    match: Match = toml_key(
        Kind.MATCH,
        Match(),
        "What the GPU is told by, where its address moves with the numbers of the buses: `gpuswitchctl "
        "status` shows what there is. It has to fit one GPU; where it fits several, `address` says which of them.",
    )
    name: str = toml_key(Kind.NAME, "", "What the GPU is called on the command line.")
    members: tuple[PciAddress, ...] = toml_key(
        Kind.ADDRESSES, (), "Functions of other slots that move along; each belongs to one GPU only."
    )
    host_driver: str = toml_key(
        Kind.HOST_DRIVER,
        "",
        "The driver of the display functions on the host where nothing else tells: the GPU was on a vfio "
        "driver before the service started.",
    )
    at_boot: AtBoot = toml_key(
        Kind.AT_BOOT,
        AtBoot.KEEP,
        "Where the GPU is brought when the machine starts, before the service is ready and the display "
        "manager begins: to its host drivers, to vfio, or nowhere.",
    )

    @property
    def label(self) -> str:
        """What it is known by where people are told of it: its address as it is written, else what it matches."""
        return str(self.address or self.match)

    @property
    def called(self) -> str:
        """The same to a person."""
        return called(self.name, self.label)


@dataclass(frozen=True, kw_only=True)
class Deadlines(Table):
    """How long a step may take before it counts as failed, by kind of step."""

    module: float = toml_key(Kind.SECONDS, 30.0, "Load or unload kernel modules.")
    power: float = toml_key(Kind.SECONDS, 10.0, "Wake the GPU, or restore its power management.")
    override: float = toml_key(Kind.SECONDS, 5.0, "Set or clear `driver_override`.")
    unbind: float = toml_key(Kind.SECONDS, 20.0, "Take a function from its driver.")
    probe: float = toml_key(Kind.SECONDS, 30.0, "Have the kernel bind a function to a driver.")
    group: float = toml_key(Kind.SECONDS, 5.0, "Open or close the VFIO group.")
    nodes: float = toml_key(Kind.SECONDS, 15.0, "Wait for device nodes, such as those in `/dev/dri`.")
    capture: float = toml_key(Kind.SECONDS, 5.0, "Read what the way home will have to restore.")
    holders: float = toml_key(
        Kind.SECONDS, 10.0, "Look once for programs that have the GPU open; who does not answer by then counts as one."
    )
    release: float = toml_key(
        Kind.SECONDS, 5.0, "Wait for programs that were asked to let go, or that have the GPU open for a moment only."
    )
    announce: float = toml_key(Kind.SECONDS, 5.0, "Tell who follows udev that a card goes.")
    libvirt: float = toml_key(Kind.SECONDS, 60.0, "Wait until libvirt has cleared up after a machine.")
    units: float = toml_key(Kind.SECONDS, 100.0, "Stop or start a unit; systemd itself gives most of them 90 seconds.")
    sessions: float = toml_key(Kind.SECONDS, 20.0, "End a session.")
    console: float = toml_key(Kind.SECONDS, 10.0, "Move the text consoles to another screen.")
    inhibit: float = toml_key(Kind.SECONDS, 10.0, "Keep the machine from sleeping.")
    reset: float = toml_key(Kind.SECONDS, 30.0, "Reset a function.")
    rescan: float = toml_key(Kind.SECONDS, 60.0, "Remove the functions from the PCI bus, or find them again.")

    def by_kind(self) -> dict[str, float]:
        """Seconds."""
        return dict(vars(self))


def check_kind(kind: str, whose: str) -> None:
    """See that there is a deadline of this kind.

    Raises:
        TypeError: there is none; `whose` it is to be, in a word or two.
    """
    if kind not in names_of(Deadlines):
        known = ", ".join(names_of(Deadlines))
        raise TypeError(
            f"{whose} is of kind {kind!r}, for which there is no deadline in gpuswitch/config/schema.py: {known}"
        )


@dataclass(frozen=True, kw_only=True)
class Metrics(Table):
    """Where Prometheus finds the metrics: at http://ADDRESS:PORT/metrics, or https:// with a certificate."""

    enabled: bool = toml_key(Kind.BOOLEAN, True, "Whether there are metrics.")
    address: str = toml_key(
        Kind.IP_ADDRESS,
        "127.0.0.1",
        'Where they are served; "0.0.0.0" or "::" lets other machines read them; "" leaves them to the '
        "file alone (`textfile_directory`).",
    )
    port: int = toml_key(Kind.PORT, 9752, "The TCP port; 0 is any free one.")
    certificate: str = toml_key(
        Kind.PATH, "", "The file with the certificate to serve them over HTTPS, PEM; `key` belongs to it."
    )
    key: str = toml_key(Kind.PATH, "", "The file with its private key, PEM, which not everybody may read.")
    client_ca: str = toml_key(
        Kind.PATH, "", "A file with certificates of authorities, PEM: only who has a certificate of one is served."
    )
    textfile_directory: str = toml_key(
        Kind.PATH, "", "The directory in which node_exporter looks for files; gpuswitch.prom is kept there."
    )


@dataclass(frozen=True, kw_only=True)
class History(Table):
    """Which finished switches are remembered."""

    enabled: bool = toml_key(
        Kind.BOOLEAN, True, "Whether finished switches are kept in `/var/lib/gpuswitch/history.db`."
    )
    keep_days: float = toml_key(Kind.DAYS, 90.0, "How long each is kept.")
    keep: int = toml_key(Kind.SWITCHES, 1000, "How many are kept at most, the last ones.")


@dataclass(frozen=True, kw_only=True)
class Tables(Table):
    """The layers together, as they are written."""

    gpu: tuple[GpuTable, ...] = ()
    defaults: Defaults = field(default_factory=Defaults)
    deadlines: Deadlines = field(default_factory=Deadlines)
    metrics: Metrics = field(default_factory=Metrics)
    history: History = field(default_factory=History)


TABLES: Mapping[str, type[Table]] = {
    "gpu": GpuTable,
    "defaults": Defaults,
    "deadlines": Deadlines,
    "metrics": Metrics,
    "history": History,
}
"""What stands behind each name at the top of the configuration; of `gpu` there are several."""
