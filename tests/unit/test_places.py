"""Where in a file something stands."""

from __future__ import annotations

import re
import tomllib

import pytest

from gpuswitch.config.places import Fault, Location, Places
from gpuswitch.config.schema import TABLES, names_of
from tests.harness.pages import ROOT

FILE = '''\
# what nobody reads
top = 1

[metrics]
port = 9752
"address" = """
127.0.0.1
"""   # more than one line

[deadlines]
unbind = 5
[[gpu]]   # the first

address = "01:00.0"
members = [
    # sound
    "02:00.0",
    "03:00.0", "04:00.0",
    "05:00.0"]
[[gpu]]
address = "06:00.0"
stop_units = [
  "a",
  "b"
]
name = "x"'''


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("top",), 2),
        (("metrics",), 4),
        (("metrics", "port"), 5),
        (("metrics", "address"), 6),
        (("deadlines", "unbind"), 11),
        (("gpu",), 12),
        (("gpu", 0), 12),
        (("gpu", 0, "address"), 14),
        (("gpu", 0, "members"), 15),
        (("gpu", 0, "members", 0), 17),
        (("gpu", 0, "members", 1), 18),
        (("gpu", 0, "members", 2), 18),
        (("gpu", 0, "members", 3), 19),
        (("gpu", 1), 20),
        (("gpu", 1, "stop_units", 1), 24),
        (("gpu", 1, "name"), 26),
        # What is not there belongs to its table.
        (("gpu", 1, "host_driver"), 20),
        (("metrics", "key"), 4),
        (("history", "keep_days"), 0),
    ],
)
def test_each_key_and_each_item_has_its_line(location: Location, line: int, end: str) -> None:
    assert Places(FILE.replace("\n", end)).line_of(location) == line


@pytest.mark.parametrize(
    ("text", "location", "line"),
    [
        ("metrics.port = 1\nmetrics.key = 2\n", ("metrics", "key"), 2),
        ("\n\nmetrics = { port = 1, key = 2 }\n", ("metrics", "key"), 3),
        ('gpu = [\n  { address = "a" },\n  { address = "b" },\n]\n', ("gpu", 1, "address"), 3),
        ("[metrics]\n[metrics.more]\na = 1\n[deadlines]\n", ("metrics", "more", "a"), 3),
        ("[a]\nb = [[1],\n[2]]\n", ("a", "b", 1, 0), 3),
        ("", ("a",), 0),
        # It would take too long.
        ("a = [\n" + "1,\n" * 500 + "]\n", ("a", 400), 0),
        ("a = [\n" + "1,\n" * 200 + "]\n#" + "x" * 50_000, ("a", 100), 0),
    ],
)
def test_whichever_way_it_is_written(text: str, location: Location, line: int) -> None:
    assert Places(text).line_of(location) == line


def test_each_beginning_is_read_once_however_many_places_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list may be wrong from its first to its last item."""
    read: list[str] = []
    loads = tomllib.loads

    def counted(text: str) -> object:
        read.append(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", counted)
    places = Places("a = [\n" + "1,\n" * 200 + "]\n")
    assert [places.line_of(("a", item)) for item in range(200)] == list(range(2, 202))
    # As it is, and closed.
    assert len(read) <= 2 * 203


def test_every_key_of_the_template() -> None:
    """With each `#` off that a person would take off."""
    template = (ROOT / "gpuswitch/config/template.toml").read_text()
    text = re.sub(r"^# ?(?=\[|\w+ = )", "", template, flags=re.MULTILINE)
    lines, places = text.splitlines(), Places(text)
    for table, model in TABLES.items():
        for key in names_of(model):
            location: Location = ("gpu", 0, key) if table == "gpu" else (table, key)
            assert lines[places.line_of(location) - 1].startswith(f"{key} = ")


def test_a_fault_is_one_sentence_with_its_place() -> None:
    assert Fault.within("/a", "bad", line=3, column=4, key="b.c").text == "cannot use /a:3:4: b.c: bad"
    assert Fault.within("/a", "bad").text == "cannot use /a: bad"
    assert Fault.of("the variable A", "bad", key="b").text == "cannot use the variable A: b: bad"
    assert Fault.of("the variable A", "bad").file == ""
