"""What the tests of the scanner share: programs that have something open, and a /proc that has them in it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.holders import Holder, Scan
from tests.harness.sysfs_tree import Tree

FULL = "1:7"
"""The number of /dev/full: everybody may open it, and hardly anybody does."""
ZERO = "1:5"
"""The number of /dev/zero: everybody may map it."""
UNSEEN = "" if os.geteuid() == 0 else "its mappings cannot be read"
"""The doubt about every process: the kernel follows what is mapped for root only."""
OPEN = "held = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]; ready()"
MAP = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
zero = os.open("/dev/zero", os.O_RDWR)
place = int(sys.argv[1])
libc.mmap(place or None, 4096, 1, 2 | (0x10 if place else 0), zero, 0)
os.close(zero)
ready()
"""
THREAD = """
import ctypes, threading
def work():
    ctypes.CDLL(None).unshare(0x400)
    os.open("/dev/full", os.O_RDONLY)
    ready()
threading.Thread(target=work).start()
"""
_BEGIN = """
import os, sys
def ready():
    os.write(1, b".")
    while os.read(0, 1):
        for held in globals().pop("held", ()):
            os.close(held)
"""


@contextmanager
def program(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that says that it is ready, closes what it `held` when it is written to, and ends at end-of-file."""
    command = [sys.executable, "-IS", "-c", _BEGIN + code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        yield process


def processes(tree: Tree) -> LinuxProcesses:
    """The real processes and nodes, beside made-up devices."""
    return LinuxProcesses(real(tree.roots))


def real(roots: Roots) -> Roots:
    return replace(roots, dev="/dev", proc="/proc")


def of(scan: Scan, pid: int) -> list[Holder]:
    return [holder for holder in scan.holders if holder.pid == pid]


def wait_for_the_first_thread(pid: int) -> None:
    """Wait until a process whose other threads go on is a process by name only; nothing tells when that is so."""
    while procfs.state(pid) != "Z":
        os.sched_yield()


def threads(pid: int) -> set[int]:
    """Those that a process has beside its first."""
    return {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - {pid}


def own_node(folder: Path) -> str:
    """A node of the number of /dev/full with an inode of its own, as a container has; who may not make one has none."""
    node = folder / "a-node-of-its-own"
    with suppress(PermissionError):
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        return str(node)
    return "/dev/full"


NOBODYS = 5_000_000
"""The number of a made-up process: above all that a kernel gives (PID_MAX_LIMIT), so it is nobody's, nor ours."""


class Proc:
    """A made-up /proc. What is of processes may be links to what is real."""

    def __init__(self, root: Path) -> None:
        self.root = root / "proc"
        self.root.mkdir()
        self.write("devices", "Character devices:\n  1 mem\n195 nvidia-frontend\n\nBlock devices:\n  1 ramdisk\n")

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def real(self, pid: int) -> None:
        (self.root / str(pid)).symlink_to(f"/proc/{pid}")

    def process(self, pid: int, name: str, *, flags: int = 0, state: str = "S", threads: int = 1) -> Path:
        """One that has nothing open, and is no child of whoever runs this test; returns its folder."""
        fields = f"{pid} ({name}) {state} {NOBODYS - 9} 1 1 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 {threads} 0 4321 0 0\n"
        self.write(f"{pid}/stat", fields)
        self.write(f"{pid}/status", f"Name:\t{name}\nUid:\t54321\t0\t0\t0\n")
        self.write(f"{pid}/cmdline", f"/usr/bin/{name}-and-more\0--quiet\0")
        self.write(f"{pid}/cgroup", f"0::/system.slice/{name}.service\n")
        self.write(f"{pid}/maps", "")
        (self.root / str(pid) / "fd").mkdir()
        return self.root / str(pid)
