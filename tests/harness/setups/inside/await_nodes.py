#!/usr/bin/python3 -ISE
"""Waits until a process has all of some device nodes open, or none.

    await_nodes.py PID all|none NODE...

The nodes lie in one folder.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from pathlib import Path

IN_OPEN, IN_CLOSE = 0x20, 0x18
LOOK_AGAIN = 100
"""Milliseconds: the kernel tells of an open just before the descriptor is in the process's table."""


def opened(pid: str) -> set[str]:
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    return links


def main() -> None:
    pid, wanted, *nodes = sys.argv[1:]
    libc = ctypes.CDLL(None)
    events = libc.inotify_init()
    libc.inotify_add_watch(events, bytes(Path(nodes[0]).parent), IN_OPEN | IN_CLOSE)
    poll = select.poll()
    poll.register(events, select.POLLIN)
    while opened(pid) & set(nodes) != (set(nodes) if wanted == "all" else set()):
        if poll.poll(LOOK_AGAIN):
            os.read(events, 1 << 16)


if __name__ == "__main__":
    main()
