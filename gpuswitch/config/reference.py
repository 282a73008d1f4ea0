"""Every key in words, for pages and for sentences: what may stand there, what holds by default, what it is for."""

from __future__ import annotations

import inspect
import json
from dataclasses import Field, dataclass
from typing import Any

from gpuswitch.config.kinds import form_of, limits_of
from gpuswitch.config.schema import TABLES, Defaults, GpuTable, Kind, Table, keys_of, kind_of, names_of
from gpuswitch.model.address import PciAddress
from gpuswitch.model.match import Match
from gpuswitch.sentence import Sentence, template


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table.

    `type` is the one that TOML has for it, `values` which of that type may stand there ("above 0 and at most 600"),
    `unit` what a number counts ("": nothing), `default` as TOML writes it ("": the key is required), `sentence` what it
    is for.
    """

    name: str
    type: str
    values: str
    unit: str
    default: str
    sentence: str


@dataclass(frozen=True, slots=True)
class TableReference:
    """One table: its `heading` as TOML writes it (`[[gpu]]`), what it is for, and the keys that it has of its own."""

    heading: str
    sentence: str
    keys: tuple[Key, ...]


def reference() -> tuple[TableReference, ...]:
    """The whole configuration."""
    return tuple(_table(name, table) for name, table in TABLES.items())


def key_of(table: type[Table], name: str) -> Key:
    """One key of a table. Raises `KeyError` where it has no such key."""
    return _key({each.name: each for each in keys_of(table)}[name])


def _key(field: Field[Any]) -> Key:
    form = form_of(kind_of(field))
    return Key(
        name=field.name,
        type=form.type,
        values=form.values or _range(kind_of(field)),
        unit=form.unit,
        default=as_toml(field.default),
        sentence=field.metadata["sentence"],
    )


_NUMBERS = {
    ("number", "seconds"): template("a number of seconds {range}"),
    ("number", "days"): template("a number of days {range}"),
    ("integer", "switches"): template("a whole number of switches {range}"),
    ("integer", ""): template("a whole number {range}"),
}
"""By the type of a key, and what it counts."""


def must_be(key: Key) -> str:
    """What a value of this key has to be, to go on after "must be": `a number of seconds above 0 and at most 600`."""
    match key.type:
        case "number" | "integer":
            return Sentence(_NUMBERS[key.type, key.unit], range=key.values)
        case "array of strings":
            return Sentence("a list of {values}", values=key.values)
    return key.values


def as_toml(value: object) -> str:
    """A value in force as TOML writes it."""
    if isinstance(value, PciAddress):
        return json.dumps(str(value))
    if isinstance(value, Match):
        said = ", ".join(f"{key} = {json.dumps(text)}" for key, text in value.says().items())
        return f"{{ {said} }}" if said else "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(as_toml(item) for item in value)}]"
    if value is None:  # as it is written: TOML has no null
        return '""'
    return json.dumps(value)


def _table(name: str, table: type[Table]) -> TableReference:
    inherited = names_of(Defaults) if table is GpuTable else ()
    return TableReference(
        heading="[[gpu]]" if table is GpuTable else f"[{name}]",
        sentence=" ".join(inspect.cleandoc(str(table.__doc__)).split()),
        keys=tuple(_key(each) for each in keys_of(table) if each.name not in inherited),
    )


def _range(kind: Kind) -> str:
    limits = limits_of(kind)
    if "gt" in limits:
        return Sentence("above {least} and at most {most}", least=limits["gt"], most=limits["le"])
    return Sentence("from {least} to {most}", least=limits["ge"], most=limits["le"])
