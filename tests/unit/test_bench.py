"""What `make bench` makes of what it measured, and of the revision that it is given."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from gpuswitch.model.gpu import discover
from tests.bench import many
from tests.bench.builds import checked_out, find_commit
from tests.bench.rounds import Experiment, Quantity, ratio, ratios
from tests.bench.table import Row, count, show, write_shown
from tests.harness.containers.inside.server import server
from tests.harness.debian.errors import HarnessError


@pytest.mark.parametrize(
    ("this", "base", "said"),
    [
        ([1.0, 3.0, 2.0, 8.0, 5.0], [1.0, 1.0, 1.0, 2.0, 1.0], "3.00 (2.00 to 4.00)"),
        ([3.0], [2.0], "1.50"),
        ([0.0, 1.0], [1.0, 0.0], "-"),
    ],
)
def test_ratios_are_of_pairs(this: list[float], base: list[float], said: str) -> None:
    assert ratio(this, base) == said


def test_both_are_measured_by_turns() -> None:
    turns: list[str] = []

    def sample(subject: str) -> Iterable[float]:
        turns.append(subject)
        yield len(turns)

    [row] = ratios([Experiment([Quantity("turn", count)], sample, times=1, pairs=3)], "A", "B")
    assert turns == ["A", "B", "B", "A", "A", "B"]
    assert row == ("turn (3 pairs)", "4", "3", "0.83 (0.67 to 1.08)")


@pytest.fixture(autouse=True)
def plain_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of git runs with names of its own repository; people sign their commits, and read other languages."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("LC_ALL", "C")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With two commits, the older one tagged `old`."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=tester", "-c", "user.email=tester@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name in ("old", "new"):
        (tmp_path / "file").write_text(name)
        for words in (["add", "file"], ["commit", "--quiet", f"--message={name}"], ["tag", name]):
            subprocess.run([*git, *words], check=True)
    return tmp_path


def test_a_revision_is_checked_out_as_it_was_committed(repository: Path) -> None:
    commit = find_commit("old", repository)
    assert find_commit(commit, repository) == commit
    with checked_out(commit, repository) as tree:
        assert (tree / "file").read_text() == "old"
    assert not tree.exists()


@pytest.mark.parametrize("revision", ["nope", "", "-h", "old:file", "1234567890" * 4])
def test_a_revision_that_there_is_not(repository: Path, revision: str) -> None:
    with pytest.raises(HarnessError) as error:
        find_commit(revision, repository)
    assert str(error.value) == (
        f"cannot compare with {revision!r}: git knows no such commit; BASE is a branch, a tag or an id"
    )


def test_a_revision_of_what_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"cannot compare with 'old': .*not a git repository"):
        find_commit("old", tmp_path)


def test_what_is_shown_is_written_as_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show("A test", ("measured", "target"), [Row("this", "1 ms", "< 2 ms")])
    assert "this" in capsys.readouterr().out
    write_shown(tmp_path / "all.json")
    tables = json.loads((tmp_path / "all.json").read_text())
    assert tables["A test"] == [{"what": "this", "measured": "1 ms", "target": "< 2 ms"}]


def test_a_server_of_any_size() -> None:
    facts = server(many.MANY).look()
    assert len(discover(facts, {})) == many.MANY
