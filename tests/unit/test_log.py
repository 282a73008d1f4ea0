"""What journald gets of the log, from a socket that is journald's here; what is made of the events."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gpuswitch.log import events
from gpuswitch.log.events import EVENTS
from gpuswitch.log.fields import FIELDS, about, about_nothing, fields_of, told
from gpuswitch.log.journald import JournalHandler, encoded, is_journal

ROOT = Path(__file__).parents[2]
_log = logging.getLogger("gpuswitch.test_log")


class Journald:
    """Its socket, and what comes there."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "socket")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(self.path)

    def read(self) -> dict[str, str]:
        """One line of the log."""
        data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, 4)
        if descriptors:
            with os.fdopen(descriptors[0], "rb") as memory:
                memory.seek(0)
                data = memory.read()
        return decoded(data)


def decoded(data: bytes) -> dict[str, str]:
    """As journald reads it."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length, rest = int.from_bytes(rest[:8], "little"), rest[8:]
            value, rest = rest[:length], rest[length + 1 :]
        found[name.decode()] = value.decode()
        data = rest
    return found


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    listener = Journald(tmp_path)
    with listener.socket:
        yield listener


class Stream(io.StringIO):
    """Standard error, as a pipe that somebody reads, or nobody."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor


@pytest.fixture
def stream() -> Iterator[Stream]:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    yield Stream(writing)
    os.close(reading)
    os.close(writing)


@pytest.fixture
def handler(journald: Journald, stream: Stream) -> Iterator[JournalHandler]:
    made = JournalHandler(logging.StreamHandler(stream), journald.path)
    _log.addHandler(made)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    yield made
    _log.removeHandler(made)
    _log.setLevel(logging.NOTSET)
    _log.propagate = True
    made.close()


def fill(path: str) -> None:
    """Until nobody takes any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        while True:
            try:
                other.sendto(b"MESSAGE=one of many\n", path)
            except BlockingIOError:
                return


def line(**fields: object) -> Mapping[str, str]:
    """What a line is about that is told with these fields."""
    return fields_of(logging.makeLogRecord(told(**fields)))


async def test_what_has_none_of_a_field_does_not_have_that_of_the_task() -> None:
    about(GPU="0000:01:00.0", OWNER="win11", STEP="unbind")
    assert line(GPU="0000:02:00.0", OWNER=None, STEP="") == {"GPU": "0000:02:00.0"}
    assert line(STEP="probe") == {"GPU": "0000:01:00.0", "OWNER": "win11", "STEP": "probe"}


async def test_what_is_about_nothing_leaves_the_task_as_it_is() -> None:
    about(GPU="0000:01:00.0")
    found: list[Mapping[str, str]] = []
    about_nothing(lambda: found.append(line(STATE="host")))
    assert (found, line()) == ([{"STATE": "host"}], {"GPU": "0000:01:00.0"})


class TestJournald:
    @pytest.mark.parametrize(
        ("level", "priority"),
        [(logging.CRITICAL, "2"), (logging.ERROR, "3"), (logging.WARNING, "4"), (logging.INFO, "6")],
    )
    def test_a_line_with_its_priority_and_fields(
        self, level: int, priority: str, journald: Journald, handler: JournalHandler
    ) -> None:
        assert handler.level == logging.NOTSET
        _log.log(level, "%s: host", "0000:01:00.0", extra=told(events.STATE, GPU="0000:01:00.0", OWNER=None, REASON=""))
        found = journald.read()
        assert (found["MESSAGE"], found["PRIORITY"], found["GPU"]) == ("0000:01:00.0: host", priority, "0000:01:00.0")
        assert found["MESSAGE_ID"] == events.STATE.message_id
        assert found["SYSLOG_IDENTIFIER"] == "gpuswitchd"
        assert found["CODE_FILE"] == __file__
        assert not found.keys() & {"OWNER", "REASON"}

    def test_a_line_of_several(self, journald: Journald, handler: JournalHandler) -> None:  # noqa: ARG002 -- it listens
        _log.warning("one\nMESSAGE_ID=two\n")
        found = journald.read()
        assert found["MESSAGE"] == "one\nMESSAGE_ID=two\n"
        assert "MESSAGE_ID" not in found

    def test_a_fault_says_so_with_its_traceback(self, journald: Journald, handler: JournalHandler) -> None:  # noqa: ARG002 -- as above
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            _log.exception("a fault")
        found = journald.read()
        assert found["MESSAGE_ID"] == events.FAULT.message_id
        assert "test_a_fault_says_so" in found["MESSAGE"]

    def test_what_is_longer_than_a_datagram(self, journald: Journald, handler: JournalHandler) -> None:  # noqa: ARG002 -- as above
        _log.error("x" * 1_000_000)
        assert journald.read()["MESSAGE"] == "x" * 1_000_000

    def test_what_is_no_text_of_any_locale(self) -> None:
        assert encoded([("MESSAGE", "a\udc80b")]) == b"MESSAGE=a\\udc80b\n"


class TestWithout:
    def test_who_does_not_read_keeps_nobody(self, journald: Journald, handler: JournalHandler, stream: Stream) -> None:  # noqa: ARG002 -- as above
        fill(journald.path)
        _log.warning("to standard error")
        assert stream.getvalue() == "to standard error\n"

    def test_what_nobody_takes_is_counted(self, journald: Journald, handler: JournalHandler, stream: Stream) -> None:  # noqa: ARG002 -- as above
        fill(journald.path)
        while True:
            try:
                os.write(stream.descriptor, b"x" * 4096)
            except BlockingIOError:
                break
        _log.warning("lost")
        _log.warning("lost, too")
        assert stream.getvalue() == ""
        while _more(journald):
            assert journald.read()["MESSAGE"] == "one of many"
        _log.warning("heard")
        assert journald.read()["MESSAGE"] == "2 lines of the log are lost: journald did not read"
        assert journald.read()["MESSAGE"] == "heard"

    def test_one_that_is_not_there(self, handler: JournalHandler, journald: Journald, stream: Stream) -> None:  # noqa: ARG002 -- as above
        Path(journald.path).unlink()
        _log.warning("it says so itself")
        assert stream.getvalue() == "it says so itself\n"


def _more(journald: Journald) -> bool:
    try:
        journald.socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


def test_it_is_the_journal_where_standard_error_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        there = os.fstat(file.fileno())
        for value, so in ((f"{there.st_dev}:{there.st_ino}", True), (f"{there.st_dev}:1", False), ("", False)):
            monkeypatch.setenv("JOURNAL_STREAM", value)
            assert is_journal(file.fileno()) is so
    monkeypatch.setenv("JOURNAL_STREAM", ":")
    assert not is_journal(file.fileno() if not file.closed else 99)


async def test_a_task_is_about_what_it_says_and_no_other_is() -> None:
    async def work(gpu: str) -> Mapping[str, str]:
        about(GPU=gpu, STEP="unbind")
        about(STEP="")
        await asyncio.sleep(0)
        return fields_of(logging.makeLogRecord(told(RESULT="done")))

    found = await asyncio.gather(work("a"), work("b"))
    assert list(found) == [
        {"GPU": "a", "RESULT": "done"},
        {"GPU": "b", "RESULT": "done"},
    ]
    assert fields_of(logging.makeLogRecord({})) == {}


# What is made of it


def test_each_event_has_an_id_of_its_own_and_names_fields_that_there_are() -> None:
    assert len({event.message_id for event in EVENTS}) == len(EVENTS)
    known = [event for event in vars(events).values() if isinstance(event, events.LogEvent)]
    assert sorted(known) == sorted(EVENTS)
    for event in EVENTS:
        assert re.fullmatch("[0-9a-f]{32}", event.message_id)
        assert set(re.findall("@([A-Z_]+)@", event.subject + event.text)) <= FIELDS.keys()


def test_the_catalog_and_the_page_are_what_is_made_of_the_events(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate_catalog.py", tmp_path], check=True)
    for name in "units/gpuswitch.catalog", "docs/logs.md":
        assert (ROOT / name).read_text() == (tmp_path / name).read_text(), (
            f"{name} is not as it would be made: make docs"
        )


def test_every_event_is_explained_in_every_language() -> None:
    text = (ROOT / "units" / "gpuswitch.catalog").read_text()
    for event in EVENTS:
        for language in "", " de", " fr", " zh_CN":
            assert f"-- {event.message_id}{language}\nSubject: " in text


def test_no_command_in_it_is_broken() -> None:
    lines = (ROOT / "units" / "gpuswitch.catalog").read_text().splitlines()
    assert [line for line in lines if line.endswith(("gpuswitchctl", " status", " show", " help"))] == []
