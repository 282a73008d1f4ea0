"""How a look reads: what is gone says nothing, and whatever else cannot be read makes the whole look fail (OSError)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from gpuswitch.host.linux.scanning.files import entries as found_in
from gpuswitch.host.linux.scanning.files import is_gone, says_nothing


def entries(folder: str) -> Iterator[tuple[str, int]]:
    """Names and inodes in a folder; nothing where there is none."""
    yield from [(entry.name, entry.inode()) for entry in found_in(folder)]


def inode(link: str) -> int | None:
    """The inode of the link itself, as `entries` gives it."""
    try:
        return os.lstat(link).st_ino
    except OSError as error:
        if is_gone(error):
            return None
        raise


def target(link: str) -> str:
    """Where a link points to, "" where there is none."""
    try:
        return os.readlink(link)  # noqa: PTH115 - a Path takes ten times as long, and there are a thousand links
    except OSError as error:
        if says_nothing(error):
            return ""
        raise


def link(link: str) -> str:
    """The name of what a link points to."""
    return target(link).rpartition("/")[2]


def folder_of_target(link: str) -> str:
    """The name of the folder in which lies what a link points to."""
    return target(link).rpartition("/")[0].rpartition("/")[2]


def there(path: str) -> bool:
    return written(path) is not None


def written(path: str) -> int | None:
    """When a file was written, in nanoseconds; None: there is none."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 - a Path takes several times as long, for each device
    except OSError as error:
        if is_gone(error):
            return None
        raise


def contents(path: str, limit: int) -> bytes:
    """The first `limit` bytes of a file; nothing where it is gone (ENODEV: its device is)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.read(descriptor, limit)
        finally:
            os.close(descriptor)
    except OSError as error:
        if says_nothing(error):
            return b""
        raise


def first_line(path: str) -> str:
    return contents(path, 4096).decode(errors="replace").partition("\n")[0]
