"""What a key of each kind may hold, and the check of all that stands in the files. pydantic is known here alone."""

from __future__ import annotations

import ipaddress
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from gpuswitch.config.schema import (
    LONGEST_DEADLINE,
    LONGEST_WAIT,
    TABLES,
    Attempt,
    Deadlines,
    Defaults,
    GpuTable,
    History,
    Kind,
    Metrics,
    Table,
    Tables,
    keys_of,
    kind_of,
    match_of,
    name_of,
    unit,
)
from gpuswitch.errors import InvalidArgument
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, named_for_vfio
from gpuswitch.model.match import Match
from gpuswitch.model.policy import AtBoot, Busy, ModulePolicy, Release
from gpuswitch.sentence import Sentence

_T = TypeVar("_T", bound=Table)
_CONFIG = ConfigDict(frozen=True, extra="forbid")


def _address_or_none(value: object) -> PciAddress | None:
    return None if value is None or value == "" else _address(value)


def _address(value: object) -> PciAddress:
    try:
        return PciAddress.parse(str(value))
    except InvalidArgument as error:
        raise ValueError(str(error)) from None


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


def _unit_or_none(value: str) -> str:
    return unit(value) if value else ""


def _vtconsole(value: str) -> str:
    if not re.fullmatch(r"vtcon[0-9]{1,2}", value):
        raise ValueError(
            Sentence("{value} is not a console: they are named vtcon0, vtcon1, ...", value=reprlib.repr(value))
        )
    return value


_Number = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
_Integer = Annotated[int, BeforeValidator(_whole_number)]

_KINDS: Mapping[Kind, Any] = {
    Kind.BOOLEAN: Annotated[
        bool, BeforeValidator(_boolean), Form("boolean", Sentence("{most} or {last}", most="true", last="false"))
    ],
    Kind.BUSY: Annotated[Busy, _one_of(Busy)],
    Kind.PATIENCE: Annotated[_Number, Field(le=LONGEST_WAIT), Form("number", unit="seconds")],
    Kind.SECONDS: Annotated[_Number, Field(le=LONGEST_DEADLINE), Form("number", unit="seconds")],
    Kind.DAYS: Annotated[_Number, Field(le=36500), Form("number", unit="days")],
    Kind.UNIT_NAMES: Annotated[
        tuple[Annotated[str, AfterValidator(unit)], ...],
        Form("array of strings", Sentence("full names of systemd units")),
    ],
    Kind.UNIT_NAME: Annotated[
        str,
        AfterValidator(_unit_or_none),
        Form("string", Sentence('the full name of a systemd unit, such as display-manager.service, or "" for none')),
    ],
    Kind.MODULE_POLICY: Annotated[ModulePolicy, _one_of(ModulePolicy)],
    Kind.VFIO_DRIVER: Annotated[
        str,
        AfterValidator(_vfio_driver),
        Form("string", Sentence('the name of a vfio driver, such as vfio-pci, or ""')),
    ],
    Kind.CONSOLE_NAMES: Annotated[
        tuple[Annotated[str, AfterValidator(_vtconsole)], ...],
        Form("array of strings", Sentence("names in /sys/class/vtconsole, such as vtcon1")),
    ],
    Kind.ATTEMPT: Annotated[
        Attempt,
        PlainValidator(_attempt),
        Form('boolean or "auto"', Sentence("{most} or {last}", most="true, false", last='"auto"')),
    ],
    Kind.RELEASE: Annotated[Release, _one_of(Release)],
    # TOML has no null: "" stands for it.
    Kind.RELEASE_OR_NONE: Annotated[
        Release | None, BeforeValidator(lambda value: None if value == "" else value), _one_of(Release, "")
    ],
    Kind.ADDRESS: Annotated[
        PciAddress | None,
        PlainValidator(_address_or_none),
        Form("string", Sentence('a PCI address, such as 0000:01:00.0; "" where `match` says which')),
    ],
    Kind.MATCH: Annotated[
        Match,
        PlainValidator(match_of),
        Form(
            "inline table",
            Sentence("vendor, device, subsystem, serial, slot and port, each a string, those that are wanted"),
        ),
    ],
    Kind.NAME: Annotated[
        str,
        AfterValidator(name_of),
        Form("string", Sentence("at most 32 letters, digits, dots, underscores and dashes, a letter or digit first")),
    ],
    Kind.ADDRESSES: Annotated[
        tuple[Annotated[PciAddress, PlainValidator(_address)], ...], Form("array of strings", Sentence("PCI addresses"))
    ],
    Kind.HOST_DRIVER: Annotated[
        str, AfterValidator(_host_driver), Form("string", Sentence('the name of a driver, or ""'))
    ],
    Kind.AT_BOOT: Annotated[AtBoot, _one_of(AtBoot)],
    Kind.IP_ADDRESS: Annotated[
        str,
        AfterValidator(_ip_address_or_none),
        Form("string", Sentence('an IP address, such as 127.0.0.1 or ::1, or "" for none')),
    ],
    Kind.PATH: Annotated[
        str, AfterValidator(_path_or_none), Form("string", Sentence('an absolute path, or "" for none'))
    ],
    Kind.PORT: Annotated[_Integer, Field(ge=0, le=65535), Form("integer")],
    Kind.SWITCHES: Annotated[_Integer, Field(ge=1, le=10_000), Form("integer", unit="switches")],
}


def _says_which(gpu: Any) -> Any:
    if gpu.address is None and not gpu.match:
        raise ValueError(
            Sentence(
                'it does not say which GPU it is about: add address = "0000:01:00.0", as gpuswitchctl list shows '
                "it, or match"
            )
        )
    return gpu


def _certified(metrics: Any) -> Any:
    if bool(metrics.certificate) != bool(metrics.key):
        there, missing = ("certificate", "key") if metrics.certificate else ("key", "certificate")
        raise ValueError(
            Sentence(
                "{there} is of no use without {missing}: set both, or none for plain HTTP",
                there=there,
                missing=missing,
            )
        )
    if metrics.client_ca and not metrics.certificate:
        raise ValueError(Sentence("client_ca is of no use without certificate and key: set them as well"))
    return metrics


_WHOLE: Mapping[type[Table], Callable[[Any], Any]] = {GpuTable: _says_which, Metrics: _certified}
"""What is checked once all keys of a table are."""


def checked(values: Mapping[str, object]) -> Tables:
    """All tables with these values, each what it has to be.

    Raises:
        pydantic.ValidationError: with every fault.
    """
    found: Any = model_of_all().model_validate(values)
    return Tables(
        gpu=tuple(_plain(GpuTable, gpu) for gpu in found.gpu),
        defaults=_plain(Defaults, found.defaults),
        deadlines=_plain(Deadlines, found.deadlines),
        metrics=_plain(Metrics, found.metrics),
        history=_plain(History, found.history),
    )


def checked_table(table: type[_T], values: Mapping[str, object]) -> _T:
    """One table, as `checked`."""
    return _plain(table, model_of(table).model_validate(values))  # type: ignore[arg-type] # a class can be hashed


@cache
def model_of_all() -> type[BaseModel]:
    """The tables together as pydantic checks them."""
    gpu: Any = model_of(GpuTable)
    once: dict[str, Any] = {name: table for name, table in TABLES.items() if table is not GpuTable}
    keys: dict[str, Any] = {
        name: (model_of(table), Field(default_factory=model_of(table))) for name, table in once.items()
    }
    return create_model("Tables", __config__=_CONFIG, **{"gpu": (tuple[gpu, ...], ()), **keys})


@cache
def model_of(table: Any) -> type[BaseModel]:
    """One table as pydantic checks it."""
    keys: dict[str, Any] = {each.name: (_KINDS[kind_of(each)], each.default) for each in keys_of(table)}
    validators: dict[str, Any] = {"whole": model_validator(mode="after")(_WHOLE[table])} if table in _WHOLE else {}
    return create_model(table.__name__, __config__=_CONFIG, __validators__=validators, **keys)


def form_of(kind: Kind) -> Form:
    """What a key of this kind is in TOML."""
    return next(each for each in get_args(_KINDS[kind]) if isinstance(each, Form))


def limits_of(kind: Kind) -> dict[str, float]:
    """What pydantic holds a number to: `gt` or `ge`, and `le`."""
    found = (part for each in get_args(_KINDS[kind]) if isinstance(each, FieldInfo) for part in each.metadata)
    return {
        word: limit for part in found for word in ("gt", "ge", "le") if (limit := getattr(part, word, None)) is not None
    }


def _plain(table: type[_T], model: BaseModel) -> _T:
    return table(**{each.name: getattr(model, each.name) for each in keys_of(table)})
