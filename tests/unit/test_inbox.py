"""Whose call is next, and what is known of a call before it is read."""

from __future__ import annotations

from typing import Any

import jeepney
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.api.inbox import MANY, MANY_OF_ONE, MOST_OF_ONE, Inbox, sender_of


def frame(sender: str, number: int = 0) -> bytes:
    return f"{sender}/{number}".encode()


def everything(inbox: Inbox) -> list[str]:
    taken = []
    while (each := inbox.take()) is not None:
        taken.append(each.decode())
    return taken


def test_each_in_turn_and_of_each_in_order() -> None:
    inbox = Inbox()
    for number in range(3):
        inbox.put("flood", frame("flood", number))
    inbox.put("other", frame("other"))
    assert len(inbox) == 4
    assert everything(inbox) == ["other/0", "flood/0", "flood/1", "flood/2"]
    assert len(inbox) == 0


def test_who_waits_for_each_answer_is_before_those_who_do_not() -> None:
    inbox = Inbox()
    for flood in ("a", "b", "c"):
        for number in range(10):
            inbox.put(flood, frame(flood, number))
    for round_ in range(8):
        inbox.put("quiet", frame("quiet", round_))
        assert inbox.take() == frame("quiet", round_)
        inbox.take()
    assert len(inbox) == 22


def test_nobody_is_limited_while_there_is_room() -> None:
    inbox = Inbox()
    assert all(inbox.put("one", frame("one", number)) for number in range(MANY))
    assert not inbox.put("one", frame("one"))
    assert inbox.put("other", frame("other"))


def test_who_crowds_others_is_told() -> None:
    inbox = Inbox()
    for number in range(MANY_OF_ONE):
        inbox.put("some", frame("some", number))
    assert not inbox.crowds("some")
    for number in range(MANY):
        inbox.put("flood", frame("flood", number))
    assert [inbox.crowds(owner) for owner in ("flood", "some", "nobody")] == [True, True, False]
    assert inbox.crowder_next
    inbox.put("few", frame("few"))
    assert not inbox.crowder_next
    inbox.take()
    inbox.take()
    assert not inbox.crowds("some")


def test_who_crowds_others_can_be_passed_over_and_keeps_their_turn() -> None:
    inbox = Inbox()
    for flood in ("a", "b", "c"):
        for number in range(MANY // 2):
            inbox.put(flood, frame(flood, number))
    assert inbox.take() == frame("c", 0)
    for number in range(2):
        inbox.put("few", frame("few", number))
    assert [inbox.take(), inbox.take_from_others()] == [frame("few", 0), frame("few", 1)]
    assert inbox.take_from_others() is None
    inbox.put("new", frame("new"))
    assert [inbox.take(), inbox.take(), inbox.take()] == [frame("new"), frame("b", 0), frame("a", 0)]


def test_where_many_wait_each_has_its_share() -> None:
    inbox = Inbox()
    for number in range(MANY):
        inbox.put(f"user {number % 16}", frame("x", number))
    kept = [inbox.put("late", frame("late", number)) for number in range(MOST_OF_ONE + 5)]
    assert kept == [True] * MOST_OF_ONE + [False] * 5


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=200))
def test_nothing_is_lost_and_nothing_is_served_twice(story: list[tuple[str, bool]]) -> None:
    inbox, put, taken = Inbox(), [], []
    for number, (owner, takes) in enumerate(story):
        inbox.put(owner, frame(owner, number))
        put.append(f"{owner}/{number}")
        if takes and (each := inbox.take()):
            taken.append(each.decode())
    taken += everything(inbox)
    assert sorted(taken) == sorted(put)
    for owner in "abcd":
        of_owner = [each for each in taken if each.startswith(owner)]
        assert of_owner == [each for each in put if each.startswith(owner)]


def message(sender: str, *, endian: Any = jeepney.Endianness.little, **more: str) -> bytes:
    call = jeepney.new_method_call(
        jeepney.DBusAddress("/a", "org.example1", "org.example1.A"), "Member", "sau", ("text", [1, 2])
    )
    fields = call.header.fields
    call.header.endianness = endian
    fields[jeepney.HeaderFields.sender] = sender
    for name, value in more.items():
        fields[jeepney.HeaderFields[name]] = value
    data: bytes = call.serialise(serial=7)
    return data


@pytest.mark.parametrize("endian", [jeepney.Endianness.little, jeepney.Endianness.big], ids=lambda each: each.name)
def test_the_sender_is_found(endian: jeepney.Endianness) -> None:
    assert sender_of(message(":1.42", endian=endian)) == ":1.42"


def test_what_looks_like_a_sender_in_another_field_is_none() -> None:
    """Its bytes, as they would stand in the header."""
    assert sender_of(message(":1.42", destination="a\x07\x01s")) == ":1.42"


def test_a_field_of_a_type_that_nobody_knows() -> None:
    known = message(":1.42")
    fields = known[16 : 16 + int.from_bytes(known[12:16], "little")]
    odd = b"\x63\x02ay\x00" + bytes(2) + b"\x04\x00\x00\x00\x01\x02\x03\x04"
    odd += bytes(-len(odd) % 8)
    header = known[:12] + (len(odd) + len(fields)).to_bytes(4, "little") + odd + fields
    assert sender_of(header + bytes(-len(header) % 8)) == ""


@pytest.mark.parametrize("cut", range(16, 60, 7))
def test_a_header_that_has_no_end(cut: int) -> None:
    """No bus passes that on."""
    assert sender_of(message(":1.42")[:cut]) == ""
