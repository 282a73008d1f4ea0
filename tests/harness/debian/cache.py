"""What was built is kept, under the hash of everything that went in.

An entry is a folder FOLDER/KIND/KEY. It is built under another name and renamed when it is whole, by one builder at
a time; the kernel drops the lock of a builder that died, and the next one clears away what it left. Who uses an entry
has a lock on it until its process ends, so tests of two checkouts may run at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = 2
"""Entries of each kind that stay: the ones used last, and those that another process uses."""

_used: dict[Path, int] = {}
"""What this process uses until it ends: the descriptor whose lock says so to others."""

Say = Callable[[str], None]
"""Takes one line about what is going on."""
Build = Callable[[Path], None]
"""Fills the empty folder that it is given."""


def default_folder() -> Path:
    if chosen := os.environ.get("GPUSWITCH_TEST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuswitch-tests"


def content_key(*parts: str | Path) -> str:
    """A hash over strings and over the names and contents of files, folders gone through in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(f"text {part}\0".encode())
            continue
        for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if file.is_file() and "__pycache__" not in file.parts:
                name = file.relative_to(part.parent)
                mode = file.stat().st_mode & 0o111
                total.update(f"file {name} {mode} {hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return total.hexdigest()[:20]


class Cache:
    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.say = say

    def find(self, kind: str, key: str) -> Path | None:
        """The entry, marked as used now; None where it has yet to be built."""
        entry = self.folder / kind / key
        try:
            use(entry)
        except FileNotFoundError:
            return None
        return entry

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only builder. Waits for another one for as long as that takes, and says so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"waiting for another build in {self.folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def make(self, kind: str, key: str, build: Build) -> Path:
        """The entry, built first where need be. The caller holds the lock."""
        if entry := self.find(kind, key):
            return entry
        entry = self.folder / kind / key
        staging = self.folder / kind / "unfinished"
        remove(staging)
        staging.mkdir(parents=True)
        self.say(f"building {kind}")
        started = time.monotonic()
        try:
            build(staging)
            # a rename must not outlive a power cut that the contents do not
            os.sync()
            staging.rename(entry)
            use(entry)
        finally:
            remove(staging)
        self._prune(kind)
        self.say(f"built {kind} in {time.monotonic() - started:.0f} s")
        return entry

    def _prune(self, kind: str) -> None:
        entries = sorted((self.folder / kind).iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in entries[KEPT:]:
            if not in_use(entry):
                remove(entry)


def use(entry: Path) -> None:
    """Keep others from removing it, and note the time: the kernel's own stamps are some milliseconds coarse.

    Raises FileNotFoundError where there is none.
    """
    if entry not in _used:
        descriptor = os.open(entry, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not entry.exists():  # removed in between
            os.close(descriptor)
            raise FileNotFoundError(entry)
        _used[entry] = descriptor
    now = time.time_ns()
    os.utime(entry, ns=(now, now))


def in_use(entry: Path) -> bool:
    """By this process or another one."""
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
