"""The configuration in words, and the page that is made of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpuswitch.cli import configuration_topic
from gpuswitch.cli.main import main
from gpuswitch.config.reference import Key, key_of, must_be, reference
from gpuswitch.config.schema import TABLES, Deadlines, Defaults, GpuTable, History, Metrics, Tables, names_of

ROOT = Path(__file__).parents[2]
KEYS = [pytest.param(key, id=f"{table.heading}{key.name}") for table in reference() for key in table.keys]


def test_every_table_is_there_with_its_own_keys() -> None:
    assert list(TABLES) == list(names_of(Tables))
    told = {table.heading: [key.name for key in table.keys] for table in reference()}
    own = [name for name in names_of(GpuTable) if name not in names_of(Defaults)]
    assert told["[[gpu]]"] == own == ["address", "match", "name", "members", "host_driver", "at_boot"]
    assert told["[defaults]"] == list(names_of(Defaults))
    assert told["[deadlines]"] == list(names_of(Deadlines))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_has_a_sentence_and_says_what_may_stand_there(key: Key) -> None:
    assert key.sentence[0].isupper()
    assert key.sentence.endswith(".")
    assert key.values
    assert key.default


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (key_of(Deadlines, "unbind"), "a number of seconds above 0 and at most 600"),
        (key_of(Defaults, "wait_seconds"), "a number of seconds above 0 and at most 86400"),
        (key_of(Metrics, "port"), "a whole number from 0 to 65535"),
        (key_of(History, "keep"), "a whole number of switches from 1 to 10000"),
        (key_of(Defaults, "busy"), '"refuse", "wait", "terminate" or "kill"'),
        (key_of(GpuTable, "members"), "a list of PCI addresses"),
        (key_of(Defaults, "on_saved"), '"host", "stay" or ""'),
    ],
)
def test_what_a_value_must_be(key: Key, words: str) -> None:
    assert must_be(key) == words


def test_the_page_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "configuration.md"
    keys = tmp_path / "keys.json"
    subprocess.run([sys.executable, "docs/generate_configuration.py", fresh, keys], cwd=ROOT, check=True)
    assert (ROOT / "docs/configuration.md").read_text() == fresh.read_text(), "run `make docs`"
    assert configuration_topic.KEYS.read_text() == keys.read_text(), "run `make docs`"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_help_has_every_key_and_fits(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["help", "configuration"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    for table in reference():
        assert f"\n{table.heading}\n" in out
        told = " ".join(out.partition(f"\n{table.heading}\n")[2].split())
        for key in table.keys:
            assert f"{key.name} = {key.default} {key.sentence} Values: {must_be(key)}" in told
