"""The file for node_exporter: when it is written, and what becomes of it when that does not work."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gpuswitch.api import textfile
from gpuswitch.api.textfile import NAME, Textfile


class Kept:
    """A file of one metric, and what it says on the disk."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.gauge = Gauge("gpuswitch_made_up", "Made up.", registry=registry)
        self.file = Textfile(registry)

    async def settled(self) -> None:
        """What was asked for up to now is done: its thread does one thing after the other."""
        await asyncio.sleep(0)  # what a call has put off to this turn of the loop
        await asyncio.wrap_future(self.file._do(lambda: None))
        await asyncio.sleep(0)


@pytest.fixture
async def kept(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kept]:
    """One whose pauses do not end, unless a test ends them."""
    monkeypatch.setattr(textfile, "PAUSE_SECONDS", 3600)
    kept = Kept()
    yield kept
    await kept.file.stop()


def said(folder: Path) -> str:
    """What the file says of the metric."""
    return (folder / NAME).read_text().splitlines()[-1].rpartition(" ")[2]


def contents(folder: Path) -> list[tuple[str, int]]:
    """What lies there, with its permissions."""
    return [(each.name, each.stat().st_mode & 0o777) for each in folder.iterdir()]


async def test_it_is_there_at_once_for_everybody_to_read(kept: Kept, tmp_path: Path) -> None:
    umask = os.umask(0o077)
    kept.file.keep_in(tmp_path)
    await kept.settled()
    os.umask(umask)
    assert said(tmp_path) == "0.0"
    assert contents(tmp_path) == [(NAME, 0o644)]


async def test_it_is_written_once_in_a_pause_however_often_something_is_different(kept: Kept, tmp_path: Path) -> None:
    kept.file.keep_in(tmp_path)
    await kept.settled()
    for number in range(100):
        kept.gauge.set(number)
        kept.file.soon()
    await kept.settled()
    assert said(tmp_path) == "0.0"
    kept.file._rested()
    await kept.settled()
    assert said(tmp_path) == "99.0"


async def test_where_nothing_is_different_nothing_is_written(kept: Kept, tmp_path: Path) -> None:
    kept.file.keep_in(tmp_path)
    await kept.settled()
    (tmp_path / NAME).unlink()
    kept.file._rested()
    await kept.settled()
    assert contents(tmp_path) == []


async def test_a_file_that_is_read_meanwhile_stays_whole(kept: Kept, tmp_path: Path) -> None:
    kept.file.keep_in(tmp_path)
    await kept.settled()
    with (tmp_path / NAME).open() as reader:
        kept.gauge.set(7)
        kept.file.soon()
        kept.file._rested()
        await kept.settled()
        assert said(tmp_path) == "7.0"
        assert reader.read().endswith("gpuswitch_made_up 0.0\n")


async def test_nothing_that_lies_in_its_way_is_written_to(kept: Kept, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("another's")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f".{NAME}.new").symlink_to(other)
    (folder / NAME).symlink_to(other)
    kept.file.keep_in(folder)
    await kept.settled()
    assert other.read_text() == "another's"
    assert said(folder) == "0.0"


async def test_it_is_taken_away_at_the_end_and_where_it_is_no_more_wanted(kept: Kept, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in one, other:
        folder.mkdir()
    kept.file.keep_in(one)
    await kept.settled()
    kept.file.keep_in(other)
    kept.file._rested()
    await kept.settled()
    assert (contents(one), said(other)) == ([], "0.0")
    await kept.file.stop()
    assert contents(other) == []


async def test_a_failure_is_said_once_and_again_after_it_was_mended(
    kept: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    kept.file.keep_in(folder)
    for _ in range(3):
        await kept.settled()
        kept.file.soon()
        kept.file._rested()
    await kept.settled()
    sentence = f"the metrics are not kept in {folder} for now: No such file or directory"
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [sentence]
    folder.mkdir()
    kept.file.soon()
    kept.file._rested()
    await kept.settled()
    assert said(folder) == "0.0"
    (folder / NAME).unlink()
    folder.rmdir()
    kept.file.soon()
    kept.file._rested()
    await kept.settled()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [sentence] * 2


async def test_a_disk_that_does_not_answer_keeps_nobody_waiting(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file system here can be made to hang; so what writes to it does."""
    answers, asked = threading.Event(), []

    def hang(path: Path, text: bytes) -> None:
        asked.append(text)
        answers.wait()

    monkeypatch.setattr(textfile, "_replace", hang)
    monkeypatch.setattr(textfile, "LAST_SECONDS", 0.01)
    kept.file.keep_in(tmp_path)
    for _ in range(100):
        await asyncio.sleep(0)
        kept.file.soon()
    await kept.file.stop()
    answers.set()
    assert len(asked) == 1
