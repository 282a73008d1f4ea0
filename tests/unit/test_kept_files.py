"""Files that are put back: byte for byte, whenever the power goes, and never over what somebody else has written."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from gpuswitch.cli import kept_files
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.kept_files import ChangedError, KeptFiles

OURS, LATER = b"ours\n", b"ours, later\n"
_CALLS = 85
"""Calls that change the disk while two files are written twice, and put back."""


class Disk:
    """A folder of files; `files` of it are written by setup."""

    def __init__(self, folder: Path) -> None:
        self.etc = folder / "etc"
        self.etc.mkdir()
        self.state = folder / "lib" / "setup"
        (self.etc / "there").write_bytes(b"before \xff\n")
        (self.etc / "there").chmod(0o640)
        self.there, self.new = self.etc / "there", self.etc / "a/b/new"

    @property
    def kept(self) -> KeptFiles:
        """As each command has its own."""
        return KeptFiles(self.state)

    def tree(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(each.relative_to(self.etc)): (each.stat().st_mode, each.read_bytes() if each.is_file() else b"")
            for each in self.etc.rglob("*")
        }


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


class PowerCutError(BaseException):
    """Nothing of the process runs any more: no handler either."""


def test_every_byte_and_the_mode_come_back_after_several_writes(disk: Disk) -> None:
    before = disk.tree()
    disk.kept.write({disk.there: OURS, disk.new: OURS})
    assert (disk.there.read_bytes(), disk.there.stat().st_mode & 0o777) == (OURS, 0o640)
    disk.kept.write({disk.there: LATER})
    assert disk.kept.changed_by_others() == []
    assert dict(disk.kept.undo()) == {disk.there: "restored", disk.new: "removed"}
    assert (disk.tree(), disk.state.parent.exists()) == (before, False)
    assert list(disk.kept.undo()) == []


def test_folders_that_others_made_or_use_stay(disk: Disk) -> None:
    disk.state.parent.mkdir()
    disk.kept.write({disk.there: OURS})
    list(disk.kept.undo())
    assert list(disk.state.parent.iterdir()) == []
    disk.state.parent.rmdir()
    disk.kept.write({disk.there: OURS})
    (disk.state.parent / "history").touch()
    list(disk.kept.undo())
    assert [each.name for each in disk.state.parent.iterdir()] == ["history"]


def test_what_is_refused_leaves_no_folders(disk: Disk) -> None:
    (disk.etc / "link").symlink_to(disk.there)
    with pytest.raises(CtlError, match="it is a link"):
        disk.kept.write({disk.etc / "link": OURS})
    assert not disk.state.parent.exists()


def test_what_undo_would_do_is_told_and_not_done(disk: Disk) -> None:
    assert disk.kept.to_undo() == []
    disk.kept.write({disk.there: OURS, disk.new: OURS})
    written = disk.tree()
    planned = [(disk.there, "restored", b"before \xff\n"), (disk.new, "removed", None)]
    assert disk.kept.to_undo() == planned
    disk.new.write_bytes(b"theirs\n")
    with pytest.raises(ChangedError, match="setup undo --force"):
        disk.kept.to_undo()
    assert disk.kept.to_undo(force=True) == planned
    disk.new.write_bytes(OURS)
    assert disk.tree() == written
    assert dict(disk.kept.undo()) == {disk.there: "restored", disk.new: "removed"}


def cut(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The power goes at the so-manieth of the calls that change the disk."""
    left = iter(range(after))

    def dies(real: object) -> object:
        def call(*arguments: object, **more: object) -> object:
            if next(left, None) is None:
                raise PowerCutError
            return real(*arguments, **more)  # type: ignore[operator]  # a function of os, or a method

        return call

    for where, name in (
        (os, "fsync"),
        (os, "fchmod"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "rmdir"),
    ):
        monkeypatch.setattr(where, name, dies(getattr(where, name)))


@pytest.mark.parametrize("calls", range(_CALLS))
def test_whenever_the_power_goes_undo_puts_all_back(disk: Disk, calls: int) -> None:
    before = disk.tree()
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, calls)
        with pytest.raises(PowerCutError):
            _twice_and_back(disk)
    # What is half-done is hidden, and goes with the next command.
    assert {path.read_bytes() for path in (disk.there, disk.new) if path.exists()} <= {b"before \xff\n", OURS, LATER}
    list(disk.kept.undo())
    assert disk.tree() == before


def test_with_that_many_calls_all_is_done(disk: Disk) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, _CALLS)
        _twice_and_back(disk)


def _twice_and_back(disk: Disk) -> None:
    disk.kept.write({disk.there: OURS, disk.new: OURS})
    disk.kept.write({disk.there: LATER, disk.new: LATER})
    list(disk.kept.undo())


def test_what_others_have_changed_stays_unless_forced(disk: Disk) -> None:
    before = disk.tree()
    disk.kept.write({disk.there: OURS, disk.new: OURS})
    disk.new.write_bytes(b"theirs\n")
    assert disk.kept.changed_by_others() == [disk.new]
    with pytest.raises(ChangedError, match="somebody has changed"):
        disk.kept.write({disk.new: LATER})
    with pytest.raises(ChangedError, match="setup undo --force") as error:
        list(disk.kept.undo())
    assert error.value.file == disk.new
    assert (disk.there.read_bytes(), disk.new.read_bytes()) == (OURS, b"theirs\n")
    assert dict(disk.kept.undo(force=True)) == {disk.there: "restored", disk.new: "removed"}
    assert (disk.tree(), disk.kept.kept_text(disk.new).read_bytes()) == (before, b"theirs\n")


def test_what_somebody_has_put_beside_it_stays(disk: Disk) -> None:
    disk.kept.write({disk.new: OURS})
    (disk.new.parent / "theirs").touch()
    assert dict(disk.kept.undo()) == {disk.new: "removed"}
    assert (disk.new.parent / "theirs").exists()


def test_a_file_that_was_taken_away_is_put_back_only_by_force(disk: Disk) -> None:
    disk.kept.write({disk.there: OURS})
    disk.there.unlink()
    with pytest.raises(ChangedError):
        list(disk.kept.undo())
    assert dict(disk.kept.undo(force=True)) == {disk.there: "restored"}
    assert disk.there.read_bytes() == b"before \xff\n"


@pytest.mark.parametrize("name", ["new", "record.json", "there"])
def test_a_full_disk_changes_nothing(disk: Disk, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = disk.tree(), kept_files._replace

    def replace(file: Path, content: bytes, status: object, *, mode: int = 0o644) -> None:
        if file.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(file, content, status, mode=mode)  # type: ignore[arg-type]  # as it came

    monkeypatch.setattr(kept_files, "_replace", replace)
    with pytest.raises(CtlError, match=f"cannot write .*{name}: No space left on device; nothing is changed"):
        disk.kept.write({disk.there: OURS, disk.new: OURS})
    assert (disk.tree(), disk.kept.changed_by_others()) == (before, [])


def test_a_record_that_cannot_be_made_shorter_is_no_failure(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, saved = disk.tree(), kept_files._replace, []

    def replace(file: Path, content: bytes, status: object, *, mode: int = 0o644) -> None:
        saved.append(file.name)
        if saved.count("record.json") > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(file, content, status, mode=mode)  # type: ignore[arg-type]  # as it came

    with monkeypatch.context() as patch:
        patch.setattr(kept_files, "_replace", replace)
        disk.kept.write({disk.new: OURS})
    assert (disk.new.read_bytes(), disk.kept.changed_by_others()) == (OURS, [])
    assert dict(disk.kept.undo()) == {disk.new: "removed"}
    assert disk.tree() == before


def test_a_link_is_no_file_to_write(disk: Disk) -> None:
    (disk.etc / "link").symlink_to(disk.there)
    with pytest.raises(CtlError, match="it is a link"):
        disk.kept.write({disk.etc / "link": OURS})
    assert disk.there.read_bytes() == b"before \xff\n"


def test_a_record_that_cannot_be_read_is_not_guessed_at(disk: Disk) -> None:
    disk.kept.write({disk.there: OURS})
    (disk.state / "record.json").write_text('{"version": 9}')
    with pytest.raises(CtlError, match="is damaged, or another version's"):
        list(disk.kept.undo())
    assert disk.there.read_bytes() == OURS


def test_one_at_a_time(disk: Disk) -> None:
    disk.state.mkdir(parents=True)
    other = os.open(disk.state, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(CtlError, match="another gpuswitchctl setup is at work"):
        disk.kept.write({disk.there: OURS})
    os.close(other)


def test_what_is_taken_away_is_forgotten_and_the_rest_stays_kept(disk: Disk) -> None:
    before = disk.tree()
    disk.kept.write({disk.there: OURS})
    disk.kept.write({disk.new: OURS})
    disk.kept.take_away([disk.new])
    assert (disk.there.read_bytes(), disk.new.exists(), disk.kept.has(disk.new)) == (OURS, False, False)
    assert dict(disk.kept.undo()) == {disk.there: "restored"}
    assert disk.tree() == before

    disk.kept.write({disk.new: OURS})
    disk.kept.take_away([disk.new])
    assert (disk.tree(), disk.state.parent.exists()) == (before, False)
