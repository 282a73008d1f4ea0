"""Keeps the metrics in a file for node_exporter, whose textfile collector reads every `*.prom` of a directory."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from prometheus_client import CollectorRegistry, generate_latest

from gpuswitch.runtime.threads import resolve

_log = logging.getLogger(__name__)

NAME = "gpuswitch.prom"
PAUSE_SECONDS = 1.0
"""From the end of one writing to the next."""
LAST_SECONDS = 3.0
"""How long the end of the service waits for a disk to take the file away."""


class Textfile:
    """Writes `registry` to the file `NAME` in a directory, when it is told that something is different.

    A thread of its own does so, one job after the other, and at most one write waits: a disk that does not answer
    keeps nobody waiting. What is written next says what was missed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._directory: Path | None = None
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._stale = self._at_it = self._complained = False

    def keep_in(self, directory: Path | None) -> None:
        """Keep it there from here on, and nowhere else; None: nowhere."""
        if directory != self._directory:
            self._leave()
            self._directory = directory
            self._complained = False
        self.soon()

    def soon(self) -> None:
        """Something is different: write it, at once, or when the last writing is `PAUSE_SECONDS` ago."""
        self._stale = True
        if self._directory is not None and not self._at_it:
            self._at_it = True
            asyncio.get_running_loop().call_soon(self._write)

    async def stop(self) -> None:
        """Take it away: soon nobody keeps it true."""
        self._leave()
        if self._thread is not None:
            done = self._do(lambda: None)
            self._jobs.put(None)
            self._thread = None
            await asyncio.wait([asyncio.wrap_future(done)], timeout=LAST_SECONDS)

    def _leave(self) -> None:
        if self._directory is not None:
            self._do(partial(_remove, self._directory / NAME))
            self._directory = None

    def _write(self) -> None:
        self._stale = False
        if self._directory is None:
            self._at_it = False
            return
        done = self._do(partial(_replace, self._directory / NAME, generate_latest(self._registry)))
        asyncio.wrap_future(done).add_done_callback(partial(self._written, self._directory))

    def _written(self, directory: Path, done: asyncio.Future[None]) -> None:
        error = done.exception()
        if directory == self._directory:
            if error is not None and not self._complained:
                _log.warning("the metrics are not kept in %s for now: %s", directory, _why(error, directory))
            self._complained = error is not None
        asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._rested)

    def _rested(self) -> None:
        self._at_it = False
        if self._stale:
            self.soon()

    def _do(self, work: Callable[[], None]) -> Future[None]:
        if self._thread is None:
            self._thread = Thread(target=self._work, name="textfile", daemon=True)
            self._thread.start()
        done: Future[None] = Future()
        self._jobs.put(partial(resolve, done, work))
        return done

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _replace(path: Path, text: bytes) -> None:
    """Whoever reads it finds the old file or the new one, whole.

    The directory may be another user's: nothing that lies there under the new one's name is written to.
    """
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, 0o644)  # whatever our umask is: node_exporter is another user
        stream.write(text)
    new.replace(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _why(error: BaseException, directory: Path) -> str:
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{error.strerror}; where that is for the service alone: ReadWritePaths={directory} in its unit"
    return str(error.strerror) if isinstance(error, OSError) else repr(error)
