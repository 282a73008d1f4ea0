"""The history: every finished switch with its steps, kept for people to look at.

A thread of its own writes and reads the file, one job after the other; the event loop only puts jobs into its queue,
and nobody waits for it should the disk hang.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from gpuswitch.config.schema import History as Settings
from gpuswitch.errors import Failed, InvalidArgument
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.history.archive import Archive, ArchiveError, Entry, ReturnEntry, StepEntry
from gpuswitch.runtime.threads import resolve
from gpuswitch.sentence import Sentence
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.record import Drift, Returned, Switch

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
"""How long the end of the service waits for what is not yet written."""
ANSWER_SECONDS = 10.0
BACKLOG = 1000
"""Entries, and questions, that wait for a disk which does not answer; what comes after that is lost."""
ANSWER = 1000
"""Entries in one answer: one message on the bus, made on the event loop."""
_DAY = 86400
_MOST_NAMED = 5


class History:
    """Keeps finished switches in the file at `path`. An `Observer` (`gpuswitch.gpu.observer`)."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._archive = Archive(path)
        self._settings = settings
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._asking = asyncio.Lock()
        self._unwritten: deque[Entry | ReturnEntry] = deque(maxlen=BACKLOG)
        self._complained = False

    def start(self) -> None:
        """Look at the file, and forget what is too old."""
        Thread(target=self._work, name="history", daemon=True).start()
        self.configure(self._settings)

    def configure(self, settings: Settings) -> None:
        """Follow new settings."""
        self._settings = settings
        if settings.enabled:
            self._jobs.put(partial(self._write, settings))

    async def close(self) -> None:
        """Write what is not yet written, if the disk lets us soon."""
        flushed: Future[None] = Future()
        self._jobs.put(partial(resolve, flushed, lambda: None))
        self._jobs.put(None)
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.wrap_future(flushed)
        except TimeoutError:
            _log.warning("the disk did not take the last of the history within %g s", FLUSH_SECONDS)

    # What is kept ---------------------------------------------------------------------------------------------------

    def appeared(self, actor: Actor) -> None:
        """Nothing to keep."""

    def vanished(self, actor: Actor) -> None:
        """Nothing to keep."""

    def changed(self, record: GpuRecord) -> None:
        """Nothing to keep."""

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        """Nothing to keep: the switch has its steps itself."""

    def waits(self, record: GpuRecord) -> None:
        """Nothing to keep: what came of it is told when the step ends."""

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        self._keep(entry_of(str(record.gpu.address), switch), f"switch {switch.id}")

    def returned(self, record: GpuRecord, switch: Switch) -> None:  # noqa: ARG002 -- an Observer's
        self._keep(return_of(switch), f"the kernel's return from switch {switch.id}")

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        self._keep(entry_of_drift(str(record.gpu.address), drift), f"what somebody else did to {record.gpu.address}")

    def recovered(self, record: GpuRecord) -> None:
        """Nothing to keep: the switch that it was part of says so."""

    def _keep(self, entry: Entry | ReturnEntry, what: str) -> None:
        if not self._settings.enabled:
            return
        if self._jobs.qsize() < BACKLOG:
            self._jobs.put(partial(self._write, self._settings, entry))
        else:
            _log.warning("the disk does not answer: the history will not know of %s", what)

    # What is asked --------------------------------------------------------------------------------------------------

    async def last(self, limit: int) -> list[Entry]:
        """The last `limit` switches (0: all that are kept), newest first and at most `ANSWER`, without their steps.

        Raises:
            Failed: it cannot be told.
        """
        return await self._ask(partial(self._archive.last, min(limit or ANSWER, ANSWER)))

    async def find(self, id: str) -> Entry:  # noqa: A002 -- as on the bus
        """One switch with its steps, by its id or the beginning of that, as long as no other begins so.

        Raises:
            InvalidArgument: there is none of this id, or several begin so.
            Failed: it cannot be told.
        """
        if entry := await self._ask(partial(self._archive.find, id)):
            return entry
        alike = await self._ask(partial(self._archive.beginning_with, id, _MOST_NAMED + 1)) if id else []
        if len(alike) == 1 and (entry := await self._ask(partial(self._archive.find, alike[0]))):
            return entry
        if alike:
            named = ", ".join(alike[:_MOST_NAMED])
            more = ", ..." if len(alike) > _MOST_NAMED else ""
            raise InvalidArgument(f"several switches begin with {id!r}: {named}{more}; write more of it")
        raise InvalidArgument(Sentence("the history knows of no switch {id}", id=repr(id[:80])))

    async def _ask(self, question: Callable[[], _T]) -> _T:
        if not self._settings.enabled:
            raise Failed("no history is kept: the configuration says history.enabled = false")
        answer: Future[_T] = Future()
        try:
            # One question at a time: anyone may ask.
            async with asyncio.timeout(ANSWER_SECONDS), self._asking:
                if self._jobs.qsize() >= BACKLOG:
                    raise TimeoutError
                self._jobs.put(partial(resolve, answer, question))
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            raise Failed(f"the history cannot be read: the disk did not answer within {ANSWER_SECONDS:g} s") from None
        except ArchiveError as error:
            raise Failed(f"the history cannot be read: {error}") from error

    # In the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _write(self, settings: Settings, *entries: Entry | ReturnEntry) -> None:
        """Write them, and what could not be written before."""
        self._unwritten.extend(entries)
        since = int((time.time() - settings.keep_days * _DAY) * 1_000_000)
        try:
            self._archive.add(tuple(self._unwritten), keep=settings.keep, since=since)
        except ArchiveError as error:
            if not self._complained:
                _log.warning("the history is not kept for now: %s", error)
            self._complained = True
        except Exception:  # noqa: BLE001 -- one switch that cannot be written must not end the history
            _log.exception("a fault of gpuswitch itself: %d switches are missing in the history", len(self._unwritten))
            self._unwritten.clear()
        else:
            self._complained = False
            self._unwritten.clear()


def entry_of(gpu: str, switch: Switch) -> Entry:
    """What is kept of a finished switch."""
    return Entry(
        id=switch.id,
        gpu=gpu,
        target=str(switch.target),
        count=switch.count,
        started=_usec(switch.started),
        finished=_usec(switch.finished or switch.started),
        result=str(switch.result),
        reason=switch.reason,
        options=_options(switch),
        requester=switch.requester.as_data(),
        steps=tuple(
            StepEntry(step.index, step.title, step.kind, str(step.status), _usec(step.started), _usec(step.seconds))
            for step in switch.steps
        ),
    )


def return_of(switch: Switch) -> ReturnEntry:
    """What is kept of a kernel that has returned from a switch after all."""
    returned = switch.returned or Returned(0.0, "")
    return ReturnEntry(switch.id, _usec(returned.at), returned.what, str(returned.state), returned.reason)


def entry_of_drift(gpu: str, drift: Drift) -> Entry:
    """What is kept of a change that was no switch of ours."""
    at = _usec(drift.at)
    return Entry(
        id=secrets.token_hex(4),
        gpu=gpu,
        target=str(drift.after),
        count=0,
        started=at,
        finished=at,
        result="drifted",
        reason=drift.text,
        options={},
        requester={"somebody_else": True},
    )


def _options(switch: Switch) -> dict[str, Any]:
    """Those that were given."""
    options = switch.options
    given = {"busy": options.busy, "wait_seconds": options.wait_seconds, "stop_units": list(options.stop_units)}
    given |= {"trial_seconds": options.trial_seconds}
    return {key: value for key, value in given.items() if value}


def _usec(seconds: float) -> int:
    return int(seconds * 1_000_000)
