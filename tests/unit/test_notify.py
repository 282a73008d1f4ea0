"""What systemd hears of the service, on a socket like its own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuswitch.runtime.notify import notify, reloading, watchdog_seconds


@pytest.fixture
def systemd() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        yield listener


@pytest.mark.parametrize("place", ["file", "abstract"])
def test_sends_one_datagram(
    place: str, systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify") if place == "file" else f"\0gpuswitch-test-{os.getpid()}"
    systemd.bind(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path.replace("\0", "@"))
    notify("READY=1", "STATUS=2 GPUs")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=2 GPUs"


def test_a_reload_begins_with_the_time(systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    reloading()
    word, clock = systemd.recv(4096).decode().split("\n")
    assert word == "RELOADING=1"
    name, _, usec = clock.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_where_nobody_listens_nothing_happens(
    systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")
    systemd.bind(str(tmp_path / "gone"))
    systemd.close()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/" + "x" * 500)
    notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        (None, None, None),
        ("", None, None),
        ("30000000", None, 15.0),
        ("30000000", "ours", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
    ],
)
def test_feeds_the_watchdog_twice_in_its_time(
    usec: str | None, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_seconds() == seconds
