"""The history as the service has it: every finished switch, and a disk that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpuswitch.config.schema import History as Settings
from gpuswitch.errors import Failed, InvalidArgument
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.history import history as module
from gpuswitch.history.archive import Archive, Entry
from gpuswitch.history.history import History
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Drift, Requester, Result, Switch
from tests.harness.facts import at

GPU = cast("GpuRecord", SimpleNamespace(gpu=SimpleNamespace(address=at("0000:01:00.0"))))
"""As much of a record as the history looks at."""


def finished(**how: Any) -> Switch:
    switch = Switch(State.VFIO, 1, **how)
    switch.finish(Result.DONE, "")
    return switch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


@pytest.fixture
async def history(path: Path) -> AsyncIterator[History]:
    history = History(path, Settings())
    history.start()
    yield history
    await history.close()


async def ids(history: History, limit: int = 0) -> list[str]:
    return [entry.id for entry in await history.last(limit)]


async def test_what_somebody_else_moved_is_an_entry_too(history: History) -> None:
    history.finished(GPU, finished())
    history.drifted(GPU, Drift(State.HOST, State.VFIO, "all functions are on vfio-pci", at := float(int(time.time()))))
    entry, _ = await history.last(0)
    assert (entry.gpu, entry.target, entry.result, entry.reason) == (
        "0000:01:00.0",
        "vfio",
        "drifted",
        "all functions are on vfio-pci",
    )
    assert (entry.count, entry.started, entry.finished) == (0, at * 1_000_000, at * 1_000_000)
    assert entry.requester == {"somebody_else": True}
    assert await history.find(entry.id) == entry


async def test_a_switch_is_there_once_it_is_finished_newest_first(history: History) -> None:
    switches = [finished() for _ in range(3)]
    for switch in switches:
        history.finished(GPU, switch)
    newest_first = [switch.id for switch in reversed(switches)]
    assert await ids(history) == newest_first
    assert await ids(history, 2) == newest_first[:2]


async def test_an_entry_says_all_that_is_known_of_it(history: History) -> None:
    options = Options(Busy.WAIT, 30.0, ("a.service",))
    requester = Requester(uid=1000, pid=42, unit="session-2.scope", command="bash")
    switch = Switch(State.VFIO, 2, options, requester)
    step = cast("Any", SimpleNamespace(title="unbind 0000:01:00.0 from nvidia", kind="unbind"))
    for status in (Status.RUNNING, Status.DONE, Status.REVERTING, Status.REVERTED):
        switch.at(StepEvent(1, 2, step, status, 0.5 if status is Status.DONE else 0.0))
    switch.finish(Result.CANCELLED, "why")
    history.finished(GPU, switch)
    entry = await history.find(switch.id)
    assert [(each.number, each.title, each.kind, each.status, each.usec) for each in entry.steps] == [
        (1, step.title, "unbind", "done", 500_000),
        (1, step.title, "unbind", "reverted", 0),
    ]
    assert entry.steps[1].started - entry.steps[0].started >= 500_000
    assert entry.steps[1].started <= entry.finished
    assert (entry.gpu, entry.target, entry.count, entry.result, entry.reason) == (
        *("0000:01:00.0", "vfio", 2, "cancelled", "why"),
    )
    assert entry.options == {"busy": "wait", "wait_seconds": 30.0, "stop_units": ["a.service"]}
    assert entry.requester == {
        "service": False, "uid": 1000, "pid": 42, "unit": "session-2.scope", "command": "bash", "vm": ""
    }  # fmt: skip  # one record
    assert entry.started == int(switch.started * 1_000_000)


async def test_who_is_not_known_is_left_out_and_the_service_says_so(history: History) -> None:
    unknown, own = finished(requester=Requester()), finished()
    history.finished(GPU, unknown)
    history.finished(GPU, own)
    assert (await history.find(unknown.id)).requester == {"service": False, "unit": "", "command": "", "vm": ""}
    assert (await history.find(own.id)).requester["service"] is True
    assert (await history.find(own.id)).options == {}


async def test_a_switch_that_it_does_not_know_is_named(history: History) -> None:
    with pytest.raises(InvalidArgument, match=r"^the history knows of no switch '5f'$"):
        await history.find("5f")


async def test_the_beginning_of_an_id_will_do_where_no_other_begins_so(history: History) -> None:
    for name in ("5f0c3a1b", "5f0cffff", "a0000000"):
        history.finished(GPU, finished(id=name))
    assert (await history.find("a")).id == "a0000000"
    assert (await history.find("5f0cf")).id == "5f0cffff"
    with pytest.raises(InvalidArgument, match=r"^several switches begin with '5f': 5f0cffff, 5f0c3a1b; write more"):
        await history.find("5f")
    with pytest.raises(InvalidArgument, match=r"^the history knows of no switch ''$"):
        await history.find("")


async def test_the_next_run_finds_what_was_written_until_the_end(path: Path) -> None:
    first = History(path, Settings())
    first.start()
    switch = finished()
    first.finished(GPU, switch)
    await first.close()
    second = History(path, Settings())
    second.start()
    assert await ids(second) == [switch.id]
    await second.close()


async def test_what_is_too_old_is_forgotten_at_start_and_by_new_settings(path: Path) -> None:
    now = int(time.time() * 1_000_000)
    day = 86_400_000_000
    entries = [
        Entry(f"{age} days", "0000:01:00.0", "vfio", 1, now - age * day, now - age * day, "done", "", {}, {})
        for age in (100, 80, 3, 1)
    ]
    Archive(path).add(entries, keep=100, since=0)
    history = History(path, Settings())
    history.start()
    assert await ids(history) == ["1 days", "3 days", "80 days"]
    history.configure(Settings(keep_days=10.0))
    assert await ids(history) == ["1 days", "3 days"]
    history.configure(Settings(keep=1))
    assert await ids(history) == ["1 days"]
    await history.close()


async def test_switched_off_it_touches_nothing_and_says_so(path: Path) -> None:
    history = History(path, Settings(enabled=False))
    history.start()
    history.finished(GPU, finished())
    for question in (history.last(0), history.find("5f")):
        with pytest.raises(Failed, match=r"^no history is kept: the configuration says history.enabled = false$"):
            await question
    history.configure(Settings())
    switch = finished()
    history.finished(GPU, switch)
    assert await ids(history) == [switch.id]
    history.configure(Settings(enabled=False))
    history.finished(GPU, finished())
    history.configure(Settings())
    assert await ids(history) == [switch.id]
    await history.close()


async def test_what_could_not_be_written_is_written_when_it_can_be_and_one_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "state"
    directory.touch()  # what stands in the way
    history = History(directory / "history.db", Settings())
    history.start()
    switches = [finished() for _ in range(3)]
    for switch in switches[:2]:
        history.finished(GPU, switch)
    with pytest.raises(Failed, match=rf"^the history cannot be read: cannot use {directory}/history.db: "):
        await history.last(0)
    directory.unlink()
    history.finished(GPU, switches[2])
    assert await ids(history) == [switch.id for switch in reversed(switches)]
    await history.close()
    [warning] = caplog.messages
    assert warning.startswith(f"the history is not kept for now: cannot use {directory}/history.db: ")


class Disk:
    """Stands between the history and its file: it does not answer until it is told to."""

    def __init__(self, history: History) -> None:
        self._archive = history._archive
        self._answers = threading.Event()
        self.asked = threading.Event()
        history._archive = cast("Archive", self)

    def answer(self) -> None:
        self._answers.set()

    def add(self, *arguments: Any, **more: Any) -> None:
        self.asked.set()
        self._answers.wait()
        self._archive.add(*arguments, **more)

    def last(self, limit: int) -> list[Entry]:
        return self._archive.last(limit)


@pytest.fixture
def hung(path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """A history whose disk does not answer."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(module, "BACKLOG", 5)
    return History(path, Settings())


async def test_the_loop_never_waits_for_the_disk(hung: History, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk(hung)
    hung.start()
    switch = finished()
    hung.finished(GPU, switch)
    assert await asyncio.to_thread(disk.asked.wait)
    with pytest.raises(Failed, match=r"the disk did not answer within 0.05 s$"):
        await hung.last(0)
    disk.answer()
    await hung.close()
    assert [entry.id for entry in Archive(path).last(5)] == [switch.id]
    assert caplog.records == []


async def test_the_end_of_the_service_does_not_wait_for_a_disk_that_hangs(
    hung: History, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.05)
    disk = Disk(hung)
    hung.start()
    hung.finished(GPU, finished())
    await hung.close()
    assert caplog.messages == ["the disk did not take the last of the history within 0.05 s"]
    disk.answer()


async def test_a_disk_that_hangs_for_ever_does_not_fill_the_memory(
    hung: History, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(hung)
    hung.start()
    assert await asyncio.to_thread(disk.asked.wait)
    switches = [finished() for _ in range(7)]
    for switch in switches:
        hung.finished(GPU, switch)
    with pytest.raises(Failed, match="the disk did not answer"):
        await hung.last(0)
    assert caplog.messages == [
        f"the disk does not answer: the history will not know of switch {switch.id}" for switch in switches[5:]
    ]
    disk.answer()
    await hung.close()


async def test_everything_on_the_disk_is_done_in_another_thread(
    history: History, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    attempt = Archive._attempt

    def noted(self: Archive, work: Any) -> Any:
        threads.add(threading.get_ident())
        return attempt(self, work)

    monkeypatch.setattr(Archive, "_attempt", noted)
    history.finished(GPU, finished())
    await history.last(0)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_fault_of_our_own_costs_no_more_than_the_switches_that_it_struck(
    history: History, caplog: pytest.LogCaptureFixture
) -> None:
    unwritable = finished()
    unwritable.reason = "\udcff"  # no Unicode
    history.finished(GPU, unwritable)
    fine = finished()
    history.finished(GPU, fine)
    assert await ids(history) == [fine.id]
    assert "a fault of gpuswitch itself: 1 switches are missing in the history" in caplog.text
