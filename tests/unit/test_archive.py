"""The file of the history: it gives back what it was given, and whatever happened to it, it never gets in the way."""

from __future__ import annotations

import dataclasses
import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.history import archive
from gpuswitch.history.archive import Archive, ArchiveError, Entry, ReturnEntry, StepEntry

STEPS = (
    StepEntry(1, "unbind 0000:01:00.0 from nvidia", "unbind", "done", 1_000_000, 5),
    StepEntry(2, "bind 0000:01:00.0 to vfio-pci", "probe", "failed", 1_000_005, 2),
    StepEntry(1, "unbind 0000:01:00.0 from nvidia", "unbind", "reverted", 1_000_007, 7),
)
ENTRY = Entry(
    id="5f0c3a1b",
    gpu="0000:01:00.0",
    target="vfio",
    count=2,
    started=1_000_000,
    finished=1_000_014,
    result="reverted",
    reason="cannot bind 0000:01:00.0: Invalid argument",
    options={"busy": "wait", "wait_seconds": 30.0, "stop_units": ["a.service"]},
    requester={"service": False, "uid": 1000, "unit": "session-2.scope", "command": "gpuswitchctl", "vm": ""},
    steps=STEPS,
)
EVERYTHING = {"keep": 1000, "since": 0}


def entries(*ids: str) -> list[Entry]:
    """One after the other, a second each."""
    return [dataclasses.replace(ENTRY, id=id_, finished=number * 1_000_000) for number, id_ in enumerate(ids, start=1)]


def ids(found: list[Entry]) -> list[str]:
    return [entry.id for entry in found]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history.db"


@pytest.fixture
def full(path: Path) -> Path:
    """With one switch in it."""
    Archive(path).add([ENTRY], **EVERYTHING)
    return path


def test_gives_back_what_it_was_given_to_the_next_run(path: Path) -> None:
    Archive(path).add([ENTRY], **EVERYTHING)
    assert Archive(path).find(ENTRY.id) == ENTRY
    assert Archive(path).last(5) == [dataclasses.replace(ENTRY, steps=())]
    assert names(path.parent) == ["history.db"]


def test_knows_nothing_at_first(path: Path) -> None:
    assert Archive(path).last(5) == []
    assert Archive(path).find(ENTRY.id) is None


def test_the_newest_come_first_whatever_the_clock_said(path: Path) -> None:
    kept = Archive(path)
    for entry in (*entries("a", "b"), dataclasses.replace(ENTRY, id="c", started=0, finished=1)):
        kept.add([entry], **EVERYTHING)
    assert ids(kept.last(2)) == ["c", "b"]


def test_a_kernel_that_returned_stands_with_what_was_wedged(path: Path) -> None:
    """Whatever else was of the same switch, and in a file that the version before has begun."""
    kept = Archive(path)
    wedged = dataclasses.replace(ENTRY, result="wedged", reason="it has not returned")
    kept.add([wedged, ENTRY, *entries("b")], **EVERYTHING)
    returned = ReturnEntry(ENTRY.id, 5_000_000, "it took long", "host", "")
    kept.add([returned], **EVERYTHING)
    _b, ended, first = Archive(path).last(9)
    assert (ended.result, ended.returned, ended.reason) == ("reverted", None, ENTRY.reason)
    assert (first.result, first.returned, first.reason) == ("wedged", returned, "it took long")
    later = dataclasses.replace(returned, state="failed", reason="no luck")
    kept.add([later], **EVERYTHING)
    assert Archive(path).last(9)[-1].returned == later
    kept.add([], keep=2, since=0)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM returned").fetchall() == [(0,)]


def test_a_return_from_what_nobody_kept_is_no_fault(path: Path) -> None:
    kept = Archive(path)
    kept.add([ReturnEntry("a", 0, "it took long", "host", ""), *entries("b")], **EVERYTHING)
    assert ids(kept.last(9)) == ["b"]


def test_keeps_so_many(path: Path) -> None:
    kept = Archive(path)
    kept.add(entries("a", "b", "c"), **EVERYTHING)
    kept.add(entries("d"), keep=2, since=0)
    assert ids(kept.last(9)) == ["d", "c"]
    assert kept.find("a") is None
    assert steps_in(path) == 2 * len(STEPS)


def test_keeps_so_long(path: Path) -> None:
    kept = Archive(path)
    kept.add(entries("a", "b", "c"), keep=1000, since=2_000_000)
    assert ids(kept.last(9)) == ["c", "b"]
    kept.add([], keep=1000, since=3_000_000)
    assert ids(kept.last(9)) == ["c"]
    assert steps_in(path) == len(STEPS)


def steps_in(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        [[count]] = database.execute("SELECT count(*) FROM step")
    return int(count)


def test_all_of_several_or_none(path: Path) -> None:
    broken = dataclasses.replace(ENTRY, id="b", reason=None)  # type: ignore[arg-type] # what the table refuses
    with pytest.raises(ArchiveError, match="NOT NULL"):
        Archive(path).add([ENTRY, broken], **EVERYTHING)
    assert Archive(path).last(5) == []


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE cookies (a)")


def later(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version=2")


def without_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE switch")


def without_sense(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE switch SET options = '{'")


def overwritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096] + os.urandom(path.stat().st_size - 4096))


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"\xff\x00" * 4096),
    "text": lambda path: path.write_text("some notes, and not a database at all; but longer than its header " * 9),
    "torn": lambda path: os.truncate(path, path.stat().st_size // 2),
    "torn in the header": lambda path: os.truncate(path, 50),
    "overwritten": overwritten,
    "foreign": foreign,
    "later": later,
    "without a table": without_a_table,
    "a directory": a_directory,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reading", [False, True], ids=["written first", "read first"])
def test_what_cannot_be_used_is_set_aside_once_with_a_warning(
    damage: str, reading: bool, full: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](full)
    before = full.read_bytes() if full.is_file() else b""
    kept = Archive(full)
    if reading:
        assert kept.last(5) == []
    kept.add(entries("a"), **EVERYTHING)
    kept.add(entries("b"), **EVERYTHING)
    assert ids(kept.last(5)) == ["b", "a"]
    assert names(full.parent) == ["history.db", "history.db.bad"]
    run_in_thread = full.with_name("history.db.bad")
    assert (run_in_thread.read_bytes() if run_in_thread.is_file() else b"") == before
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(full) in record.message


def test_a_row_that_makes_no_sense_is_damage_too(full: Path) -> None:
    without_sense(full)
    assert Archive(full).last(5) == []
    assert names(full.parent) == ["history.db", "history.db.bad"]


def test_an_empty_file_is_a_new_one(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A power cut may leave it so."""
    path.parent.mkdir()
    path.touch()
    Archive(path).add([ENTRY], **EVERYTHING)
    assert Archive(path).find(ENTRY.id) == ENTRY
    assert caplog.records == []


def test_what_breaks_while_it_is_in_use_is_set_aside_too(full: Path) -> None:
    kept = Archive(full)
    assert ids(kept.last(5)) == [ENTRY.id]
    DAMAGES["garbage"](full)
    kept.add(entries("a"), **EVERYTHING)
    assert ids(kept.last(5)) == ["a"]


def test_the_journal_of_what_is_set_aside_is_not_played_back_into_the_new_one(full: Path) -> None:
    journal = full.with_name("history.db-journal")
    journal.write_bytes(b"the journal of the broken one")
    DAMAGES["garbage"](full)
    (full.parent / "history.db.bad-wal").write_text("of one that was set aside before")
    Archive(full).add([ENTRY], **EVERYTHING)
    assert Archive(full).find(ENTRY.id) == ENTRY
    assert not journal.exists()
    assert not (full.parent / "history.db.bad-wal").exists()


def test_one_that_was_moved_away_is_replaced(full: Path) -> None:
    kept = Archive(full)
    kept.add(entries("a"), **EVERYTHING)
    full.rename(full.with_name("elsewhere.db"))
    kept.add(entries("b"), **EVERYTHING)
    assert ids(kept.last(5)) == ["b"]


_KILLED = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size=1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE switch SET reason = 'half-way'")
database.execute("CREATE TABLE large (a)")
database.execute("INSERT INTO large VALUES (zeroblob(1000000))")
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_service_had_half_written_is_taken_back(full: Path) -> None:
    """It dies with pages of an open transaction in the file, as in a power cut: the journal has what they were."""
    killed = subprocess.run([sys.executable, "-c", _KILLED, full], check=False)
    assert killed.returncode == -9
    assert names(full.parent) == ["history.db", "history.db-journal"]
    assert Archive(full).find(ENTRY.id) == ENTRY
    assert names(full.parent) == ["history.db"]


def test_somebody_who_has_it_locked_is_no_reason_to_set_it_aside(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LOCKED_SECONDS", 0.0)
    with closing(sqlite3.connect(full, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ArchiveError, match="database is locked"):
            Archive(full).add(entries("a"), **EVERYTHING)
        with pytest.raises(ArchiveError, match="database is locked"):
            Archive(full).last(5)
    Archive(full).add(entries("a"), **EVERYTHING)
    assert ids(Archive(full).last(5)) == ["a", ENTRY.id]


_FULL_DISK = """
import resource, sys
from pathlib import Path
from gpuswitch.history.archive import Archive, ArchiveError
from tests.unit.test_archive import EVERYTHING, entries
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
kept = Archive(Path(sys.argv[1]))
try:
    kept.add(entries("a"), **EVERYTHING)
except ArchiveError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [64, 5000], ids=["nothing more", "not all of it"])
def test_a_disk_that_is_full_leaves_the_file_as_it_was(size: int, full: Path) -> None:
    """A limit on the size of files stands for it: the write fails in the middle, as on a disk without room."""
    said = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, full, str(size)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.startswith(f"cannot use {full}: ")
    kept = Archive(full)
    assert ids(kept.last(5)) == [ENTRY.id]
    kept.add(entries("a"), **EVERYTHING)
    assert ids(kept.last(5)) == ["a", ENTRY.id]
    assert names(full.parent) == ["history.db"]


def test_where_there_can_be_no_file_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArchiveError, match=rf"^cannot use {tmp_path}/file/history.db: "):
        Archive(tmp_path / "file" / "history.db").add([ENTRY], **EVERYTHING)


def test_what_cannot_even_be_set_aside_stays_where_it_is(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES["garbage"](full)
    full.with_name("history.db.bad").mkdir()
    (full.with_name("history.db.bad") / "file").touch()
    with pytest.raises(ArchiveError, match=rf"^cannot use {full}: "):
        Archive(full).add([ENTRY], **EVERYTHING)
    assert full.read_bytes() == b"\xff\x00" * 4096
    assert caplog.records == []


_text = st.text(st.characters(exclude_categories=["Cs"]))
_number = st.integers(0, 2**62)


@given(
    entry=st.builds(
        Entry,
        *(_text, _text, _text, _number, _number, _number, _text, _text),
        options=st.dictionaries(_text, _text | st.lists(_text)),
        requester=st.dictionaries(_text, st.booleans() | _number | _text),
        steps=st.lists(st.builds(StepEntry, _number, _text, _text, _text, _number, _number)).map(tuple),
    )
)
def test_anything_comes_back_as_it_was(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = Archive(tmp_path_factory.mktemp("state") / "history.db")
    kept.add([entry], **EVERYTHING)
    assert kept.find(entry.id) == entry
