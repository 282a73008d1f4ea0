"""What the parts of a look read, each in one go; what is gone again reads as nothing.

Whatever else keeps something from being read is raised: that nothing is seen says nothing then.
"""

import errno
import os
import re
from stat import S_ISBLK, S_ISCHR

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ENODEV, errno.ENXIO})
# What root alone may read says nothing to others, whenever they ask; EINVAL: this is no link, or has nothing to say.
_MUTE = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL})
# Where names lead that are no names: who mounts something may say that it is a device of any name.
_NOWHERE = frozenset({errno.ELOOP, errno.ENAMETOOLONG})

ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


def is_gone(error: OSError) -> bool:
    """Whether what was asked about is not there, or not any more."""
    return error.errno in _GONE


def says_nothing(error: OSError) -> bool:
    """Whether what was asked about is gone, or has nothing to say to us, whenever it is asked."""
    return error.errno in _GONE or error.errno in _MUTE


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder. What is a folder or a link, it knows without another look."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        if is_gone(error):
            return []
        raise


def names(folder: str) -> list[str]:
    """The names in a folder, in order."""
    return sorted(entry.name for entry in entries(folder))


def contents(path: str, folder: int | None = None) -> bytes:
    """A whole file; `path` may be relative to the open `folder`.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY, dir_fd=folder)
    try:
        parts = []
        # The kernel makes up a page at a time; a large buffer would be allocated for nothing.
        while part := os.read(descriptor, 8192):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def text(path: str, folder: int | None = None) -> str:
    """A whole file, without the space at its end."""
    try:
        return contents(path, folder).decode(errors="replace").rstrip()
    except OSError as error:
        if says_nothing(error):
            return ""
        raise


def lines(path: str) -> list[str]:
    """Those of a file of the kernel's.

    Names in it are other people's: the kernel escapes a new line in them, and none of what else ends a line to Python.
    """
    return [line for line in text(path).split("\n") if line]


def target(link: str, folder: int | None = None) -> str:
    """What a link points to."""
    try:
        return os.readlink(link, dir_fd=folder)
    except OSError as error:
        if says_nothing(error):
            return ""
        raise


def last(path: str) -> str:
    return path.rpartition("/")[2]


def number_text(mode: int, major: int, minor: int) -> str:
    """How a device number is written here, `c226:0` or `b8:16`; nothing where this is the mode of something else."""
    if S_ISCHR(mode):
        return f"c{major}:{minor}"
    return f"b{major}:{minor}" if S_ISBLK(mode) else ""


def number_of(node: str) -> str:
    """The device number of a node, links followed; nothing where it is none."""
    try:
        found = os.stat(node)  # noqa: PTH116 - a Path takes several times as long
    except OSError as error:
        if says_nothing(error) or error.errno in _NOWHERE:
            return ""
        raise
    return number_text(found.st_mode, os.major(found.st_rdev), os.minor(found.st_rdev))
