"""Files that are written so that they can be put back: what was there before is kept, with a record of it.

The record is on disk before a file is touched, and says what the file was and what it may have become; so after a power
cut between any two writes, what lies there is one of both, and known. The folder of the record has:

    record.json    {"version": 1, "folders": [PATH],
                    "files": {PATH: {"before": null | {"sha256", "mode", "uid", "gid"}, "after": [sha256]}}}
                   `folders` were made by us, those that this folder lies in among them, the outermost first
    SHA256         what a file was before, under the sum of its content
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpuswitch.cli.disk import sync
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed, InProgress

STATE = Path("/var/lib/gpuswitch/setup")
"""Where setup has its record."""
_VERSION = 1
_RECORD = "record.json"
_NEW = ".new"
"""What a file is called until it is whole: hidden, so that nobody reads it, and the same each time, so that one that a
power cut has left is found again."""


UNDO = "gpuswitchctl setup undo"
"""What puts back what setup has written."""


class ChangedError(CtlError):
    """Somebody else has changed a file since it was written."""

    def __init__(self, file: Path, text: str) -> None:
        super().__init__(text, Failed.exit_code, name=Failed.name)
        self.file = file


def changed_by_somebody(file: Path, undo: str = UNDO) -> ChangedError:
    """Why a file is not written; `undo` is the command that puts it back."""
    text = _(
        "cannot write {file}: somebody has changed it since setup wrote it; give it another name there to keep that, "
        "or: {command}",
        file=file,
        command=f"{undo} --force",
    )
    return ChangedError(file, text)


class KeptFiles:
    """The files that were written by way of this folder. `undo`: the command that puts them back, for people."""

    def __init__(self, folder: Path, *, undo: str = UNDO) -> None:
        self.folder = folder
        self._undone_by = undo

    def changed_by_others(self) -> list[Path]:
        """Files that are neither as we wrote them, nor as they were before that.

        Raises:
            CtlError: what was written is not known.
        """
        return [Path(name) for name, entry in self._record()["files"].items() if _is_foreign(Path(name), entry)]

    def added(self) -> list[Path]:
        """Files that were written, and were not there before.

        Raises:
            CtlError: what was written is not known.
        """
        return [Path(name) for name, entry in self._record()["files"].items() if entry["before"] is None]

    def has(self, file: Path) -> bool:
        """Whether it was written by way of this folder, and not put back since.

        Raises:
            CtlError: what was written is not known.
        """
        return str(file) in self._record()["files"]

    def write(self, files: Mapping[Path, bytes], *, mode: int | None = None) -> None:
        """Write all of these, on disk before this returns. What was there before the first time is kept.

        `mode`: theirs; None: as they are, and 0644 where there is none yet.

        Raises:
            CtlError: nothing was changed.
        """
        try:
            with self._alone() as made:
                self._write(files, mode, made)
        except OSError as error:
            named = error.filename or self.folder
            text = _("cannot write {file}: {why}; nothing is changed", file=named, why=error.strerror)
            raise CtlError.of(Failed, text) from error

    def undo(self, *, force: bool = False) -> Iterator[tuple[Path, str]]:
        """Put all of them back, byte for byte: each with `removed`, `restored`, or `unchanged` where it was so already.

        `force`: also those that somebody else has changed since, whose text is kept (`kept_text`).

        Raises:
            ChangedError: there is such a file; nothing was changed.
            CtlError: not all of them could be put back; those that were, stay so, and the rest can be tried again.
        """
        if not self.folder.exists():
            return
        try:
            with self._alone():
                yield from self._undo(force=force)
        except OSError as error:
            raise self._cannot_put_back(error) from error

    def take_away(self, files: Iterable[Path]) -> None:
        """Remove these, which were written by way of this folder; what was not there before is forgotten.

        Raises:
            CtlError: not all of them could be removed.
        """
        try:
            with self._alone():
                record = self._record()
                rest = json.loads(json.dumps(record))
                for file in files:
                    _put(file, None, None)
                    if record["files"][str(file)]["before"] is None:
                        del rest["files"][str(file)]
                if not rest["files"]:
                    self._forget(record)
                    return
                self._save(rest)
        except OSError as error:
            raise self._cannot_put_back(error) from error

    def _cannot_put_back(self, error: OSError) -> CtlError:
        text = _(
            "cannot put back {file}: {why}; what is left is done by another: {command}",
            file=error.filename or self.folder,
            why=error.strerror,
            command=self._undone_by,
        )
        return CtlError.of(Failed, text)

    def to_undo(self, *, force: bool = False) -> list[tuple[Path, str, bytes | None]]:
        """What `undo` would do now, and what each file would be (None: not there). Nothing is changed.

        Raises:
            ChangedError: as `undo`.
            CtlError: what was written is not known.
        """
        record = self._record()
        self._refuse_foreign(record, force=force)
        return [
            (Path(name), _outcome(Path(name), entry), self._before(entry["before"]))
            for name, entry in record["files"].items()
        ]

    def kept_text(self, file: Path) -> Path:
        """Where the text of a file lies that was overwritten by force."""
        return self.folder.with_name(f"{self.folder.name}-kept") / file.name

    def _write(self, files: Mapping[Path, bytes], mode: int | None, made: Sequence[Path]) -> None:
        """`made` are the folders that were made for our own."""
        before = self._record()
        for file in files:
            if file.is_symlink():
                text = _("cannot write {file}: it is a link; put a file there, or take it away", file=file)
                raise CtlError.of(Failed, text)
            if str(file) in before["files"] and _is_foreign(file, before["files"][str(file)]):
                raise changed_by_somebody(file, self._undone_by)
        planned = json.loads(json.dumps(before))
        for file, content in files.items():
            entry = planned["files"].setdefault(str(file), {"before": self._kept(file), "after": []})
            entry["after"] = [*entry["after"], _sum(content)]
            planned["folders"] += [str(each) for each in _missing(file.parent) if str(each) not in planned["folders"]]
        planned["folders"] += [str(each) for each in made if str(each) not in planned["folders"]]
        self._save(planned)
        was = {file: _content(file) for file in files}
        try:
            for file, content in files.items():
                file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                status = planned["files"][str(file)]["before"]
                if status is not None and mode is not None:
                    status = {**status, "mode": mode}
                _replace(file, content, status, mode=0o644 if mode is None else mode)
        except OSError:
            # As it was: what can be put back has its room on disk already, or none was taken.
            for file, old in was.items():
                _put(file, old, planned["files"][str(file)]["before"], mode=0o644 if mode is None else mode)
            _without_folders(each for each in planned["folders"] if each not in before["folders"])
            self._back_to(before)
            raise
        for file, content in files.items():
            planned["files"][str(file)]["after"] = [_sum(content)]
        with suppress(OSError):  # the files are written, and the record on disk allows for what they are
            self._save(planned)

    def _undo(self, *, force: bool) -> Iterator[tuple[Path, str]]:
        record = self._record()
        for file in self._refuse_foreign(record, force=force):
            if (content := _content(file)) is not None:
                kept = self.kept_text(file)
                kept.parent.mkdir(mode=0o700, exist_ok=True)
                _replace(kept, content, None)
        done = []
        for name, entry in record["files"].items():
            file, now = Path(name), entry["before"]
            _beside(file).unlink(missing_ok=True)  # a power cut may have left it
            done.append((file, _outcome(file, entry)))
            if not _is_before(file, entry):
                _put(file, self._before(now), now)
        self._forget(record)
        yield from done

    def _forget(self, record: Any) -> None:
        """All of it is as it was before; so are the folders that were made for it."""
        ours = self.folder.parents
        _without_folders(each for each in record["folders"] if Path(each) not in ours)
        self._back_to(_nothing())
        _without_folders(each for each in record["folders"] if Path(each) in ours)

    def _refuse_foreign(self, record: Any, *, force: bool) -> list[Path]:
        """The files that somebody else has changed.

        Raises:
            ChangedError: there are some, and nobody forces it.
        """
        foreign = [Path(name) for name, entry in record["files"].items() if _is_foreign(Path(name), entry)]
        if foreign and not force:
            text = _(
                "cannot put back {files}: somebody has changed it since; to have it as it was before all the same, "
                "with that text kept: {command}",
                files=", ".join(map(str, foreign)),
                command=f"{self._undone_by} --force",
            )
            raise ChangedError(foreign[0], text)
        return foreign

    def _before(self, now: Mapping[str, Any] | None) -> bytes | None:
        """What such a file was; None: it was not there."""
        return None if now is None else (self.folder / now["sha256"]).read_bytes()

    def _record(self) -> Any:
        try:
            said = json.loads((self.folder / _RECORD).read_bytes())
        except FileNotFoundError:
            return _nothing()
        except OSError as error:
            text = _("cannot read {file}: {why}", file=self.folder / _RECORD, why=error.strerror)
            raise CtlError.of(Failed, text) from error
        except ValueError:
            said = {}
        if not isinstance(said, dict) or said.get("version") != _VERSION:
            text = _(
                "cannot tell what was written before: {file} is damaged, or another version's; take the files of setup "
                "away by hand, and then it",
                file=self.folder / _RECORD,
            )
            raise CtlError.of(Failed, text)
        return said

    def _save(self, record: object) -> None:
        _replace(self.folder / _RECORD, json.dumps(record, indent=2).encode(), None, mode=0o600)

    def _back_to(self, record: Any) -> None:
        """Forget all that this record does not have. On a full disk a file is removed all the same."""
        if record["files"]:
            with suppress(OSError):  # the one that is there allows for what this one does
                self._save(record)
            return
        (self.folder / _RECORD).unlink(missing_ok=True)
        sync(self.folder)
        for each in self.folder.iterdir():
            each.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _kept(self, file: Path) -> dict[str, Any] | None:
        """What the file is now, with its content on disk beside the record; None: there is none."""
        content = _content(file)
        if content is None:
            return None
        status = file.stat()
        _replace(self.folder / _sum(content), content, None, mode=0o600)
        return {
            "sha256": _sum(content),
            "mode": stat.S_IMODE(status.st_mode),
            "uid": status.st_uid,
            "gid": status.st_gid,
        }

    @contextmanager
    def _alone(self) -> Iterator[list[Path]]:
        """One at a time; with the folders that had to be made for ours, the outermost first. They go again where there
        is no record in the end.

        Raises:
            CtlError: another one is at it.
        """
        made = _missing(self.folder.parent)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield made
            finally:
                if not (self.folder / _RECORD).exists():
                    _without_folders(map(str, (*made, self.folder)))
        except BlockingIOError:
            text = _("another gpuswitchctl setup is at work; nothing is changed")
            raise CtlError.of(InProgress, text) from None
        finally:
            os.close(descriptor)


def _nothing() -> dict[str, Any]:
    return {"version": _VERSION, "files": {}, "folders": []}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_before(file: Path, entry: Mapping[str, Any]) -> bool:
    content = _content(file)
    if content is None or entry["before"] is None:
        return content is None and entry["before"] is None
    return _sum(content) == str(entry["before"]["sha256"])


def _outcome(file: Path, entry: Mapping[str, Any]) -> str:
    """What it is to be put back, in a word (`KeptFiles.undo`)."""
    if _is_before(file, entry):
        return "unchanged"
    return "removed" if entry["before"] is None else "restored"


def _is_foreign(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether somebody else has changed it. That it is gone is a change, too, where there was one before."""
    if _is_before(file, entry):
        return False
    content = _content(file)
    return content is None or file.is_symlink() or _sum(content) not in entry["after"]


def _missing(folder: Path) -> list[Path]:
    """The folders that are not there yet, the outermost first."""
    return [each for each in (*reversed(folder.parents), folder) if not each.exists()]


def _without_folders(names: Iterable[str]) -> None:
    """Remove those folders that are empty: what somebody else has put in there stays."""
    for name in reversed(list(names)):
        with suppress(OSError):
            Path(name).rmdir()


def _put(file: Path, content: bytes | None, status: Mapping[str, Any] | None, *, mode: int = 0o644) -> None:
    if content is not None:
        if _content(file) != content:
            _replace(file, content, status, mode=mode)
        return
    _beside(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    if file.parent.exists():
        sync(file.parent)


def _replace(file: Path, content: bytes, status: Mapping[str, Any] | None, *, mode: int = 0o644) -> None:
    """Put a file there in one instant, on disk before this returns; with the mode and owner of `status`.

    Raises:
        OSError: the file is as it was.
    """
    new = _beside(file)
    new.unlink(missing_ok=True)
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            if status is not None:
                os.fchown(descriptor, status["uid"], status["gid"])
            os.fchmod(descriptor, mode if status is None else status["mode"])
            os.fsync(descriptor)
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error
    sync(file.parent)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}{_NEW}")
