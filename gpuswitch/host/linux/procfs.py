"""What /proc shows of a process that may be in the kernel for ever. Reading it waits for nobody."""

from __future__ import annotations

import re
from pathlib import Path

from gpuswitch.model.holders import Process

# [<0>] nv_pci_remove+0x1c9/0x3f0 [nvidia]
_FRAME = re.compile(r"^\[<\w+>\] ([^\s+]+)", re.MULTILINE)


def process(pid: int) -> Process | None:
    """The process that has this number now; None: none has.

    Raises:
        OSError: nobody can tell.
    """
    try:
        fields = _fields(_text(pid, "stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(fields[19]))


def sitting(pid: int) -> int:
    """The process that sits in the kernel: the worker, or the program that it waits for."""
    children = _read(pid, f"task/{pid}/children").split()
    return int(children[0]) if children else pid


def state(pid: int) -> str:
    """Field 3 of /proc/PID/stat."""
    return "".join(_fields(_read(pid, "stat"))[:1])


def kernel_wait(pid: int) -> str:
    """/proc/PID/wchan; it says 0 where the process does not wait, or where we may not know."""
    wait = _read(pid, "wchan").strip()
    return "" if wait == "0" else wait


def stack(pid: int) -> tuple[str, ...]:
    """The kernel functions that it is in, the innermost first; nothing where we may not know."""
    return tuple(_FRAME.findall(_read(pid, "stack")))


def _fields(stat: str) -> list[str]:
    """/proc/PID/stat from field 3 on, the first one after the name in brackets (which may hold brackets itself)."""
    return stat.rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    try:
        return _text(pid, name)
    except OSError:
        return ""


def _text(pid: int, name: str) -> str:
    """A process may call itself by any bytes, and the kernel cuts what is longer than 15, also within a letter."""
    return Path(f"/proc/{pid}/{name}").read_text("utf-8", errors="replace")
