"""D-Bus types as Python types, and values on their way to the bus and from it.

The methods, properties and signals of an `Interface` are declared with the types below. What they take and give is
plain Python: str, bool, int, float, list, tuple (a D-Bus struct), dict. Variants are made and opened here.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, get_args

from gpuswitch.api.connection import SignatureTree, SignatureType, Variant


@dataclass(frozen=True)
class Signature:
    """The D-Bus signature that an annotated type stands for."""

    text: str


Str = Annotated[str, Signature("s")]
Bool = Annotated[bool, Signature("b")]
UInt32 = Annotated[int, Signature("u")]
Int64 = Annotated[int, Signature("x")]
Double = Annotated[float, Signature("d")]
ObjectPath = Annotated[str, Signature("o")]
StrArray = Annotated[list[str], Signature("as")]
UInt32Array = Annotated[list[int], Signature("au")]
StrPair = Annotated[tuple[str, str], Signature("(ss)")]
StrTripleArray = Annotated[list[tuple[str, str, str]], Signature("a(sss)")]
StrDict = Annotated[dict[str, str], Signature("a{ss}")]
Value = Annotated[object, Signature("v")]
Values = Annotated[dict[str, object], Signature("a{sv}")]
ValuesArray = Annotated[list[dict[str, object]], Signature("aa{sv}")]


def signature_of(annotation: object) -> str:
    """The D-Bus signature of one of the types above; of None: the empty one.

    Raises TypeError for any other type.
    """
    if annotation is None or annotation is type(None):
        return ""
    for mark in get_args(annotation):
        if isinstance(mark, Signature):
            return mark.text
    raise TypeError(f"{annotation!r} has no D-Bus signature: use a type of gpuswitch.api.signatures")


def variant(value: object) -> Variant:
    """`value` with the signature that its type suggests; a Variant stays what it is.

    Every int is an int64 ("x"), whatever its value: a field must not change its type from one day to the next. An
    empty list is one of strings. Raises TypeError for None, for any other class, and for a list of unlike elements.
    """
    if isinstance(value, Variant):
        return value
    return typed(_suggested(value), value)


def typed(signature: str, value: object) -> Variant:
    """`value` with this signature, where its own value does not tell it: an empty list. Raises as `pack` does."""
    return Variant(signature, pack(signature, value))


def variants(values: dict[str, object]) -> dict[str, Variant]:
    """The body of an `a{sv}`. Raises TypeError as `variant` does."""
    return {key: variant(value) for key, value in values.items()}


def _suggested(value: object) -> str:
    match value:
        case bool():
            return "b"
        case int():
            return "x"
        case float():
            return "d"
        case str():
            return "s"
        case dict():
            return "a{sv}"
        case list():
            elements = {_suggested(element) for element in value} or {"s"}
            if len(elements) == 1:
                return "a" + elements.pop()
    raise TypeError(f"cannot put {value!r} on the bus: no D-Bus type fits it")


def plain(value: object) -> object:
    """What arrived from the bus without its variants: struct and array are lists."""
    match value:
        case Variant():
            return plain(value.value)
        case list() | tuple():
            return [plain(element) for element in value]
        case dict():
            return {key: plain(element) for key, element in value.items()}
        case bytearray():  # `ay`, of dbus-fast
            return bytes(value)
    return value


def pack(signature: str, value: object) -> object:
    """`value` as the library wants it for `signature` (one complete type): variants made, tuples turned into lists.

    Raises TypeError as `variant` does, ValueError if a struct has too few or too many members.
    """
    type_ = _type(signature)
    return value if type_ is None else _pack(type_, value)


@lru_cache(maxsize=128)
def _type(signature: str) -> SignatureType | None:
    """The type that `signature` names, None where its values can stay as they are."""
    first: SignatureType = SignatureTree(signature).types[0]
    return first if "v" in signature or "(" in signature else None


def _pack(type_: SignatureType, value: object) -> object:
    inner = type_.children
    match type_.token, value:
        case "v", _:
            return variant(value)
        case "(", tuple() | list():
            return [_pack(child, member) for child, member in zip(inner, value, strict=True)]
        case "a", dict():
            return {key: _pack(inner[0].children[1], member) for key, member in value.items()}
        case "a", list():
            return [_pack(inner[0], member) for member in value]
    return value
