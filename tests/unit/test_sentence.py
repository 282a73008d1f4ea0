"""Sentences: text like any other, which still knows what it was made of."""

from __future__ import annotations

import json
import pickle
import sqlite3
from contextlib import closing

import pytest

from gpuswitch.errors import Failed
from gpuswitch.sentence import Sentence, fields

INNER = Sentence("{unit} is not there", unit="gdm.service")
OUTER = Sentence("cannot move {gpu}: {why}", gpu="0000:01:00.0", why=INNER)
TEXT = "cannot move 0000:01:00.0: gdm.service is not there"


def test_it_is_the_finished_text() -> None:
    assert OUTER == TEXT
    assert json.dumps(OUTER) == json.dumps(TEXT)
    assert f"{OUTER}; and more" == f"{TEXT}; and more"
    with closing(sqlite3.connect(":memory:")) as database:
        assert database.execute("SELECT ?", (OUTER,)).fetchone() == (TEXT,)


def test_it_knows_what_it_was_made_of() -> None:
    assert OUTER.template == "cannot move {gpu}: {why}"
    assert OUTER.data == {"gpu": "0000:01:00.0", "why": INNER}
    why = OUTER.data["why"]
    assert isinstance(why, Sentence)
    assert (why.template, why.data) == ("{unit} is not there", {"unit": "gdm.service"})


def test_an_exception_keeps_it() -> None:
    again = Sentence("again: {error}", error=Failed(OUTER)).data["error"]
    assert isinstance(again, Sentence)
    assert again.template == OUTER.template
    assert Sentence.of(Failed(OUTER)) is OUTER


def test_other_text_is_kept_as_it_is() -> None:
    plain = Sentence.of("what {somebody} wrote, 100 %")
    assert plain == "what {somebody} wrote, 100 %"
    assert plain.data == {"text": "what {somebody} wrote, 100 %"}


def test_what_stands_in_a_field_is_no_template() -> None:
    assert Sentence("{name} is {state}", name="{state}", state="there") == "{state} is there"


def test_several_make_one() -> None:
    both = Sentence.joined("\n", [INNER, "more"])
    assert (both, both.template) == ("gdm.service is not there\nmore", "{part1}\n{part2}")
    assert both.data["part1"] is INNER


def test_a_field_needs_something() -> None:
    with pytest.raises(KeyError):
        Sentence("{gpu} is there")
    assert fields("{a} and {b}") == ["a", "b"]


def test_what_was_said_by_a_template_is_read() -> None:
    templates = ["it is busy", "module {module} has {count} users"]
    read = Sentence.read("module nvidia has 2 users", templates)
    assert (read.template, read.data) == (templates[1], {"module": "nvidia", "count": "2"})
    assert Sentence.read("it is busy", templates).template == "it is busy"
    assert Sentence.read("it is not busy", templates).template == "{text}"


def test_it_goes_to_another_process_as_what_it_is() -> None:
    inner = Sentence("the {what} {braces}", what="thing", braces="{x}")
    made = pickle.loads(pickle.dumps(Sentence("look: {inner}", inner=inner)))  # noqa: S301 -- of our own making
    assert made == "look: the thing {x}"
    assert isinstance(made.data["inner"], Sentence)
    assert made.data["inner"].template == "the {what} {braces}"
