"""Dataclasses to JSON and back, by their type hints: a new field of one is read and written without further ado.

Strict, since what is read is done to the host one day: nothing passes but what `encode` can have written. A field that
is missing gets its default, so a page of an earlier version is read; one that nobody knows is refused.

| hint | JSON |
|---|---|
| `str`, `int`, `float`, `bool` | the same; a bool is no int, an int no float, and no float is infinite, or no number |
| `X | None` | that of X, or null |
| an enum of strings, or one of `_PARSED` | a string, in the one spelling that the value has |
| `Annotated[X, OneOf(...)]` | that of X, and one of these values, or null where X is `Y | None` |
| `tuple[X, ...]`, `tuple[X, Y]` | an array, of any or of this length |
| `Mapping[X, Y]`, where X is a string in JSON | an object |
| a dataclass | an object: its fields by name |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from gpuswitch.errors import InvalidArgument
from gpuswitch.model.access import UserAccess
from gpuswitch.model.address import PciAddress
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.hints import OneOf

T = TypeVar("T")
_Encoder = Callable[[Any], Any]
_Decoder = Callable[[object], Any]
_PLAIN = (str, int, float, bool)
_PARSED = (PciAddress, FunctionAttribute, UserAccess)


def encode(value: object) -> Any:
    """A dataclass's value as `json` takes it; not to be changed, since what was made last is handed out again."""
    kind: Any = type(value)
    return _encoder(kind)(value)


def encoders_of(kind: type) -> dict[str, Callable[[Any], Any]]:
    """What `encode` does with each field of a dataclass, by the field's name."""
    return {name: _encoder(hint) for name, hint in _hints(kind).items()}


def decode(kind: type[T], content: object) -> T:
    """The value of a dataclass, from what `json` has read.

    Raises:
        ValueError: `encode` did not write this.
    """
    hint: Any = kind
    return cast("T", _decoder(hint)(content))


@cache
def _encoder(hint: Any) -> _Encoder:
    match _shape(hint):
        case "plain":
            return _same
        case "text":
            return str
        case "restricted":
            return _encoder(get_args(hint)[0])
        case "optional":
            return _encode_optional(_encoder(_some(hint)))
        case "tuple of any length":
            return _encode_many(_encoder(get_args(hint)[0]))
        case "tuple":
            return _encode_each(tuple(map(_encoder, get_args(hint))))
        case "mapping":
            key, value = get_args(hint)
            return _encode_mapping(_encoder(key), _encoder(value))
        case _:
            return _encode_dataclass(hint)


@cache
def _decoder(hint: Any) -> _Decoder:
    match _shape(hint):
        case "plain":
            return _decode_plain(hint)
        case "text":
            return _decode_text(hint)
        case "restricted":
            return _decode_restricted(hint)
        case "optional":
            return _decode_optional(_decoder(_some(hint)))
        case "tuple of any length":
            return _decode_many(_decoder(get_args(hint)[0]))
        case "tuple":
            return _decode_each(tuple(map(_decoder, get_args(hint))))
        case "mapping":
            key, value = get_args(hint)
            return _decode_mapping(_decoder(key), _decoder(value))
        case _:
            return _decode_dataclass(hint)


def _shape(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return "plain"
    if isinstance(hint, type) and issubclass(hint, (Enum, *_PARSED)):
        return "text"
    if origin is Annotated:
        return "restricted"
    if origin in {Union, UnionType} and len(arguments) == 2 and NoneType in arguments:
        return "optional"
    if origin is tuple:
        return "tuple of any length" if arguments[1:] == (...,) else "tuple"
    if origin is Mapping:
        return "mapping"
    if isinstance(hint, type) and is_dataclass(hint):
        return "dataclass"
    raise TypeError(f"cannot keep a value of type {hint} as JSON: see gpuswitch.switch.journal.codec")


def _some(hint: Any) -> Any:
    """X of `X | None`."""
    return next(argument for argument in get_args(hint) if argument is not NoneType)


def _same(value: object) -> object:
    return value


def _encode_optional(encoder: _Encoder) -> _Encoder:
    return _same if encoder is _same else lambda value: None if value is None else encoder(value)


def _encode_many(encoder: _Encoder) -> _Encoder:
    return list if encoder is _same else lambda values: [encoder(value) for value in values]


def _encode_each(encoders: tuple[_Encoder, ...]) -> _Encoder:
    return lambda values: [encoder(value) for encoder, value in zip(encoders, values, strict=True)]


def _encode_mapping(key: _Encoder, value: _Encoder) -> _Encoder:
    return lambda values: {key(k): value(v) for k, v in values.items()}


def _encode_dataclass(kind: Any) -> _Encoder:
    # None is seen to here, which is faster.
    hints = _hints(kind)
    encoders = {name: _encoder(_some(hint) if _shape(hint) == "optional" else hint) for name, hint in hints.items()}
    plain = tuple(name for name, encoder in encoders.items() if encoder is _same)
    others = tuple((name, encoder) for name, encoder in encoders.items() if encoder is not _same)

    # A journal is written before each step, and little of it is new then.
    last: tuple[object, dict[str, Any]] = None, {}

    def encoded(value: object) -> dict[str, Any]:
        nonlocal last
        if last[0] is value:
            return last[1]
        content = {name: getattr(value, name) for name in plain}
        for name, encoder in others:
            each = getattr(value, name)
            content[name] = None if each is None else encoder(each)
        last = value, content
        return content

    return encoded


def _decode_plain(kind: type) -> _Decoder:
    def decoded(content: object) -> object:
        if type(content) is not kind or (type(content) is float and not isfinite(content)):
            raise ValueError(f"{content!r} is no {kind.__name__}")
        return content

    return decoded


def _decode_text(kind: type[Enum | PciAddress | FunctionAttribute | UserAccess]) -> _Decoder:
    parse: Callable[[str], object] = kind.parse if issubclass(kind, _PARSED) else kind
    text = _decode_plain(str)

    def decoded(content: object) -> object:
        try:
            value = parse(text(content))
        except InvalidArgument as error:
            raise ValueError(str(error)) from None
        if str(value) != content:
            raise ValueError(f"{content!r} is another spelling of {value}")
        return value

    return decoded


def _decode_restricted(hint: Any) -> _Decoder:
    kind, *rest = get_args(hint)
    decoder = _decoder(kind)
    allowed = [each.values for each in rest if isinstance(each, OneOf)]

    def decoded(content: object) -> object:
        value = decoder(content)
        if value is not None and any(value not in values for values in allowed):
            raise ValueError(f"{content!r} is none of {allowed}")
        return value

    return decoded


def _decode_optional(decoder: _Decoder) -> _Decoder:
    return lambda content: None if content is None else decoder(content)


def _decode_many(decoder: _Decoder) -> _Decoder:
    array = _decode_plain(list)
    return lambda content: tuple([decoder(each) for each in array(content)])


def _decode_each(decoders: tuple[_Decoder, ...]) -> _Decoder:
    array = _decode_plain(list)
    return lambda content: tuple([decoder(each) for decoder, each in zip(decoders, array(content), strict=True)])


def _decode_mapping(key: _Decoder, value: _Decoder) -> _Decoder:
    dictionary = _decode_plain(dict)
    return lambda content: {key(k): value(v) for k, v in dictionary(content).items()}


def _decode_dataclass(kind: Any) -> _Decoder:
    decoders = {name: _decoder(hint) for name, hint in _hints(kind).items()}
    needed = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    dictionary = _decode_plain(dict)

    def decoded(content: object) -> object:
        given = dictionary(content)
        if unknown := given.keys() - decoders.keys():
            raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
        if missing := needed - given.keys():
            raise ValueError(f"{kind.__name__} without {', '.join(sorted(missing))}")
        return kind(**{name: decoders[name](value) for name, value in given.items()})

    return decoded


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in fields(kind)}
