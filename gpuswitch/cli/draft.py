"""A file that is written beside another one, looked at there, and renamed over it in one instant."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gpuswitch.cli.disk import sync
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed


class Draft:
    """What may take the place of `file`: beside it, with its mode and owner, and with a name that begins with a dot, so
    that nobody reads it.

    `text` is what it has at first, and `before` what the file had when that was made of it, None where there was none.
    `path` is where it is. What is done with it later goes by a descriptor: an editor may have written a new file in its
    place, and somebody else may have put a link there, which leads to what is not to be touched.

    Raises:
        OSError: there can be none.
    """

    def __init__(self, file: Path, before: bytes | None, text: bytes) -> None:
        self.file = file
        self._target = file.resolve()  # a link stays one
        self._before = before
        self._begun = text
        if self._before is None:
            self._target.parent.mkdir(mode=0o755, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            dir=self._target.parent, prefix=f".{self._target.stem}.{os.getpid()}.", suffix=self._target.suffix
        )
        self.path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self._begun)
                stream.flush()
                self._as_the_file(descriptor)
        except OSError:
            self.drop()
            raise

    @property
    def is_there(self) -> bool:
        """Whether anything is left of it, be it a link to nowhere."""
        return os.path.lexists(self.path)

    @property
    def changed(self) -> bool:
        """Whether it has another text than in the beginning.

        Raises:
            CtlError: there is something else in its place.
            OSError: it cannot be read.
        """
        with self._opened() as stream:
            return stream.read() != self._begun

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)

    def replace(self) -> bool:
        """Put it in the place of the file, on disk before this returns; False where that was changed meanwhile.

        Raises:
            CtlError: there is something else in its place.
            OSError: it cannot be done.
        """
        if self._content() != self._before:
            return False
        with self._opened() as stream:
            self._as_the_file(stream.fileno())
            os.fsync(stream.fileno())
        self.path.replace(self._target)
        sync(self._target.parent)
        return True

    def _content(self) -> bytes | None:
        try:
            return self._target.read_bytes()
        except FileNotFoundError:
            return None

    def _opened(self) -> BinaryIO:
        try:
            # Not to wait for whoever writes into a pipe.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._replaced() from None
            raise
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            os.close(descriptor)
            raise self._replaced()
        return os.fdopen(descriptor, "rb")

    def _replaced(self) -> CtlError:
        text = _(
            "cannot save {file}: its copy is no regular file with one name any more; nothing is changed", file=self.file
        )
        return CtlError.of(Failed, text)

    def _as_the_file(self, descriptor: int) -> None:
        """Give it the mode, owner and attributes of the file; of one that is not there yet, the usual ones."""
        if self._before is None:
            os.fchmod(descriptor, 0o644)
            return
        status = self._target.stat()
        os.fchown(descriptor, status.st_uid, status.st_gid)
        for name in _attributes(self._target):  # its label for SELinux, say
            with suppress(OSError):  # one that we may not set, or that is not for this file system: as cp -p has it
                os.setxattr(descriptor, name, os.getxattr(self._target, name))
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def _attributes(file: Path) -> list[str]:
    try:
        return os.listxattr(file)
    except OSError:  # a file system without any
        return []
