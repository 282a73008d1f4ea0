"""What a machine's agent does by itself, without starting a program: in an emulated machine that is what costs.

`Machine.do` has the agent call one of these. Arguments and results are what JSON has. Those that wait do so until the
machine's patience with a command is at its end. Not all that is waited for makes an event: they look again by
themselves.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

BETWEEN_LOOKS = 0.02
"""Seconds."""


def until(look: Callable[[], T]) -> T:
    """Look again and again, until there is something to see; gives that."""
    while not (seen := look()):
        time.sleep(BETWEEN_LOOKS)
    return seen


def write(path: str, text: str, mode: int) -> None:
    """Write a file, making its folders; `text` is its bytes, as Latin-1 has them."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("latin-1"))
    file.chmod(mode)


def read(path: str) -> str:
    return Path(path).read_text(errors="replace")


def look(paths: list[str]) -> list[str | None]:
    """What is at each of these: where a link leads to, the names in a folder, the text of a file; None: nothing."""
    return [look_at(path) for path in paths]


def find(patterns: list[str]) -> dict[str, str | None]:
    """What is at each path that a pattern of these fits, in order; as `look` tells it."""
    paths = [str(path) for pattern in patterns for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    return dict(zip(paths, look(paths), strict=True))


def look_at(path: str) -> str | None:
    place = Path(path)
    try:
        if place.is_symlink():
            return str(place.readlink())
        if place.is_dir():
            return "\n".join(sorted(each.name for each in place.iterdir()))
        return place.read_text(errors="replace")
    except FileNotFoundError:
        return None


def link(target: str, path: str) -> None:
    """Make a symbolic link."""
    Path(path).symlink_to(target)


def exchange(ask: str, told: str, line: str) -> str:
    """Write a line into a fifo; gives the line that comes out of another one."""
    Path(ask).write_text(f"{line}\n")
    return Path(told).read_text()


def set_clock(seconds: float) -> None:
    """Set the time, in seconds since the epoch."""
    time.clock_settime(time.CLOCK_REALTIME, seconds)


def await_end(pid: int) -> None:
    """Wait until a process is gone: has ended, and its parent has heard of it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([pidfd], [], [])
    os.close(pidfd)
    until(lambda: not Path("/proc", str(pid)).exists())


def await_open(pid: str, node: str) -> None:
    """Wait until a process, which lives, has a file open."""
    folder = Path("/proc", pid, "fd")
    until(lambda: node in look([str(each) for each in folder.iterdir()]))


def await_program(name: str) -> None:
    """Wait until a process of this name runs, as the kernel has it: its first 15 letters."""
    until(lambda: name in {text and text.strip() for text in find(["/proc/[0-9]*/comm"]).values()})


def await_process_state(pid: int, state: str) -> None:
    """Wait until a process is in a state of proc(5): R, S, D."""
    until(lambda: Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == state)


def await_there(path: str) -> None:
    """Wait until something is at that path."""
    until(lambda: os.path.lexists(path))


def await_gone(path: str) -> None:
    """Wait until nothing is at that path; where a link leads to does not matter."""
    until(lambda: not os.path.lexists(path))


def await_text(path: str, pattern: str) -> str:
    """Wait until a file has something in it that a regular expression fits; gives all of it."""
    return until(lambda: text if re.search(pattern, text := look_at(path) or "", re.MULTILINE) else "")
