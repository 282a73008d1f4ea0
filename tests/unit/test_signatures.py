"""Values on their way to the bus and from it."""

from enum import StrEnum
from typing import Annotated

import pytest

from gpuswitch.api.connection import Variant
from gpuswitch.api.signatures import (
    Bool,
    Double,
    Int64,
    ObjectPath,
    Signature,
    Str,
    StrArray,
    StrPair,
    StrTripleArray,
    UInt32,
    UInt32Array,
    Value,
    Values,
    ValuesArray,
    pack,
    plain,
    signature_of,
    typed,
    variant,
    variants,
)


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("annotation", "signature"),
    [
        (Str, "s"),
        (Bool, "b"),
        (UInt32, "u"),
        (Int64, "x"),
        (Double, "d"),
        (ObjectPath, "o"),
        (StrArray, "as"),
        (UInt32Array, "au"),
        (StrPair, "(ss)"),
        (StrTripleArray, "a(sss)"),
        (Value, "v"),
        (Values, "a{sv}"),
        (ValuesArray, "aa{sv}"),
        (Annotated[int, "of seconds", Signature("q")], "q"),
        (None, ""),
    ],
)
def test_a_type_has_its_signature(annotation: object, signature: str) -> None:
    assert signature_of(annotation) == signature


def test_a_type_of_another_kind_has_none() -> None:
    with pytest.raises(TypeError, match=r"<class 'str'> has no D-Bus signature: use a type of gpuswitch"):
        signature_of(str)


@pytest.mark.parametrize(
    ("value", "signature"),
    [
        ("text", "s"),
        (Colour.RED, "s"),
        (True, "b"),
        (0, "x"),
        (-5, "x"),
        (0.5, "d"),
        (["a", "b"], "as"),
        ([], "as"),
        ([1, 2], "ax"),
        ({"a": 1}, "a{sv}"),
        ([{"a": 1}, {}], "aa{sv}"),
    ],
)
def test_a_variant_has_the_signature_of_its_value(value: object, signature: str) -> None:
    made = variant(value)
    assert made.signature == signature
    assert plain(made) == value


def test_a_variant_stays_what_it_is() -> None:
    assert variants({"t": Variant("t", 5), "s": "a"}) == {"t": Variant("t", 5), "s": Variant("s", "a")}


def test_a_list_that_may_be_empty_can_be_given_its_signature() -> None:
    assert typed("aa{sv}", []) == Variant("aa{sv}", [])
    assert typed("aa{sv}", [{"a": 1}]) == variant([{"a": 1}])


@pytest.mark.parametrize("value", [None, object(), ["a", 1], {"a": None}, b"bytes"])
def test_a_value_that_no_type_fits_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"cannot put .* on the bus: no D-Bus type fits it"):
        variant(value)


def test_values_inside_a_structure_are_packed() -> None:
    assert pack("a(sv)", [("a", 1), ("b", "c")]) == [["a", Variant("x", 1)], ["b", Variant("s", "c")]]
    assert pack("a{oa{sv}}", {"/a": {"b": True}}) == {"/a": {"b": Variant("b", True)}}
    assert pack("as", ["a"]) == ["a"]


def test_a_struct_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is"):
        pack("(ss)", ("a",))


def test_what_arrives_is_opened_to_the_bottom() -> None:
    pairs = Variant("a(sv)", [["c", Variant("u", 1)]])
    arrived = {"a": Variant("a{sv}", {"b": pairs}), "d": Variant("v", Variant("s", "e"))}
    assert plain(arrived) == {"a": {"b": [["c", 1]]}, "d": "e"}
