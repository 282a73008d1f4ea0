"""Where the journal's pages are: small files in a directory, each replaced as a whole, durably, also on a full disk."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_log = logging.getLogger(__name__)

SPARE_BYTES = 64 * 1024
"""What is kept free for one file: many times what the journal of a GPU has ever needed."""


class Store(Protocol):
    """Named texts. Every method may raise `OSError`; what was there before is there still then."""

    def names(self) -> list[str]:
        """All that there are, in order."""

    def where(self, name: str) -> str:
        """Where a person finds it."""

    def read(self, name: str) -> bytes:
        """FileNotFoundError: there is none."""

    def reserve(self, name: str) -> None:
        """See to it that the next `replace` of this name works on a full disk, too."""

    def replace(self, name: str, content: bytes) -> None:
        """From now on this is the text of that name, and stays so whatever happens to the service."""

    def remove(self, name: str) -> None:
        """Nothing to do where there is none."""

    def set_aside(self, name: str) -> None:
        """Keep it for people to look at; nobody reads it any more."""


class DirectoryStore:
    """NAME.json in a directory. NAME.spare is as large as NAME.json may become, and takes its place on a full disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        return [path.stem for path in sorted(self._directory.glob("*.json"))]

    def where(self, name: str) -> str:
        return str(self._path(name))

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def reserve(self, name: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._path(name, "spare").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, SPARE_BYTES)

    def replace(self, name: str, content: bytes) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            fresh = self._path(name, "new")
            with fresh.open("wb") as file:
                _write(file.fileno(), content)
            fresh.replace(self._path(name))
        except OSError:
            if not self._used_spare(name, content):
                raise

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        for rest in ("spare", "new"):
            self._path(name, rest).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        self._path(name).replace(self._path(name, "bad"))

    def _used_spare(self, name: str, content: bytes) -> bool:
        """Whether it could be written where room was kept. Room for the next time is what the old file leaves."""
        spare = self._path(name, "spare")
        with suppress(OSError):
            self._path(name, "new").unlink(missing_ok=True)
        try:
            with spare.open("r+b") as file:
                _write(file.fileno(), content)
            spare.replace(self._path(name))
        except OSError:
            return False
        try:
            self.reserve(name)
        except OSError as error:
            _log.warning("cannot keep room for %s: %s", self._path(name), error.strerror)
        return True

    def _path(self, name: str, suffix: str = "json") -> Path:
        return self._directory / f"{name}.{suffix}"


def _write(file: int, content: bytes) -> None:
    """All of it, durably, and nothing after it: last of all what was there before is cut off, which needs no room."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.ftruncate(file, len(content))
    os.fsync(file)
