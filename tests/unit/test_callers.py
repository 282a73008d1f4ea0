"""Who called: what can be told in time, and nothing that was guessed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gpuswitch.api import callers, serving
from gpuswitch.api.bus import Bus, CallError
from gpuswitch.api.callers import Callers, user_of
from gpuswitch.api.serving import Caller
from gpuswitch.errors import GpuswitchError
from gpuswitch.host.linux.procfs import process
from gpuswitch.model.holders import Process
from gpuswitch.runtime.threads import run_in_thread
from gpuswitch.switch.record import AT_BOOT, Requester

Told = int | GpuswitchError | None
"""What the bus says; or raises; or, with None, it says nothing at all."""

GONE = CallError("org.freedesktop.DBus.Error.NameHasNoOwner", "it is gone", "org.freedesktop.DBus")


class FixedBus:
    """A bus that knows this of :1.7, and of nobody else."""

    def __init__(self, pid: Told) -> None:
        self._pid = pid

    async def process(self, name: str) -> int | None:
        assert name == ":1.7"
        if self._pid is None:
            await asyncio.Event().wait()
        if isinstance(self._pid, GpuswitchError):
            raise self._pid
        return cast("int", self._pid) or None


@pytest.fixture(autouse=True)
def a_call() -> Iterator[None]:
    """A method is being served that :1.7 called."""
    token = serving._caller.set(Caller(":1.7", 1000, may_be_asked=False))
    yield
    serving._caller.reset(token)


async def requester(pid: Told) -> Requester:
    return await Callers(cast("Bus", FixedBus(pid))).requester()


async def test_the_bus_knows_the_process_and_proc_its_name() -> None:
    found = await requester(os.getpid())
    assert (found.uid, found.pid, found.service) == (1000, os.getpid(), False)
    assert f"{found.command}\n" == await asyncio.to_thread(Path("/proc/self/comm").read_text)


async def test_a_process_is_one_and_somebodys() -> None:
    """Told by its start; a thread has a number as well, and is none."""
    this = process(os.getpid())
    assert this is not None
    assert await user_of(this) == os.getuid()
    assert await user_of(replace(this, started=this.started + 1)) is None
    assert await user_of(Process(1 << 30, 1)) is None
    asked, done = threading.Event(), threading.Event()

    def waits() -> None:
        asked.set()
        done.wait()

    thread = threading.Thread(target=waits)
    thread.start()
    asked.wait()
    assert thread.native_id is not None
    number = process(thread.native_id)
    assert number is not None
    assert await user_of(number) is None
    done.set()
    thread.join()


async def test_a_process_that_is_gone_has_no_name() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])  # noqa: ASYNC220 -- it ends at once
    ended.wait()
    assert await requester(ended.pid) == Requester(uid=1000, pid=ended.pid)


@pytest.mark.parametrize(
    "pid",
    [CallError("org.freedesktop.DBus.Error.UnixProcessIdUnknown", "not known", "org.freedesktop.DBus"), 0, GONE],
)
async def test_what_the_bus_does_not_know_is_left_out(pid: Told) -> None:
    assert await requester(pid) == Requester(uid=1000)


async def test_what_the_bus_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "SECONDS", 0.01)
    assert await requester(None) == Requester(uid=1000)


async def test_neither_is_a_kernel_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    returning = threading.Event()
    monkeypatch.setattr(callers, "SECONDS", 0.01)
    monkeypatch.setattr(callers, "_process", lambda _pid: returning.wait())
    assert await requester(os.getpid()) == Requester(uid=1000, pid=os.getpid())
    returning.set()


@pytest.mark.parametrize(
    ("requester", "words"),
    [
        (Requester(service=True), "the service itself"),
        (AT_BOOT, "the service itself, at boot"),
        (Requester(), "somebody"),
        (Requester(uid=0), "somebody (uid 0)"),
        (Requester(uid=1000, pid=42, command="bash"), "bash (pid 42, uid 1000)"),
    ],
)
def test_an_asker_in_words(requester: Requester, words: str) -> None:
    assert str(requester) == words


async def test_work_beside_the_loop_returns_or_raises_as_it_did() -> None:
    def fail() -> None:
        raise OSError("no luck")

    assert await run_in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(OSError, match="no luck"):
        await run_in_thread(fail)


async def test_who_waits_no_longer_does_not_disturb_the_thread() -> None:
    begun, going_on, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        going_on.wait()
        over.set()

    waiting = asyncio.create_task(run_in_thread(cast("Callable[[], Any]", work)))
    await asyncio.to_thread(begun.wait)
    waiting.cancel()
    await asyncio.wait([waiting])
    going_on.set()
    assert await asyncio.to_thread(over.wait)
    assert waiting.cancelled()
