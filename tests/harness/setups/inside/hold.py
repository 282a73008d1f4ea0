#!/usr/bin/python3 -ISE
"""Holds device nodes, says READY=1 to systemd when it does, and lets go on SIGTERM.

    hold.py [--map | --hide] [--stubborn] NODE...

The last part of a node's name may be a pattern, for the nodes with a device behind them; something must be there that
fits it.
--map       keeps the nodes mapped into memory, and no descriptor
--hide      keeps them in a message on a socket that nobody has read: in no process's table of descriptors
--stubborn  ignores SIGTERM
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys
from pathlib import Path

# uapi/drm/drm_mode.h: struct drm_mode_create_dumb, struct drm_mode_map_dumb
CREATE_DUMB, MAP_DUMB = 0xC02064B2, 0xC01064B3
MAP_FAILED = ctypes.c_void_p(-1).value


def notify(text: str) -> None:
    """Tell systemd: sd_notify(3)."""
    path = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)


def found(pattern: str) -> list[str]:
    path = Path(pattern)
    nodes = sorted(str(node) for node in path.parent.glob(path.name)) or [pattern]
    return [node for node in nodes if node == pattern or is_there(node)]


def is_there(node: str) -> bool:
    """Whether there is a device behind it: nodes that no driver looks after stay when it goes."""
    try:
        os.close(os.open(node, os.O_RDWR))
    except OSError as error:
        return error.errno not in {errno.ENODEV, errno.ENXIO}
    return True


def buffer_of(fd: int) -> tuple[int, int]:
    """A buffer to draw into on a DRM device: where it is to be mapped, and its size in bytes."""
    created = bytearray(struct.pack("=6IQ", 64, 64, 32, 0, 0, 0, 0))
    fcntl.ioctl(fd, CREATE_DUMB, created)
    *_, handle, _pitch, size = struct.unpack("=6IQ", created)
    mapped = bytearray(struct.pack("=2IQ", handle, 0, 0))
    fcntl.ioctl(fd, MAP_DUMB, mapped)
    return struct.unpack("=2IQ", mapped)[2], size


def map_node(node: str) -> None:
    """Map it with the C library: Python's own mmap keeps a descriptor."""
    fd = os.open(node, os.O_RDWR)
    offset, size = buffer_of(fd) if "/dri/" in node else (0, mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    if libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset) == MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), node)
    os.close(fd)


def hide(fds: list[int]) -> tuple[socket.socket, socket.socket]:
    """Send them to ourselves, and close them. What is returned must stay open."""
    ends = socket.socketpair()
    ends[0].sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)
    return ends


def main() -> None:
    options = {word for word in sys.argv[1:] if word.startswith("--")}
    nodes = [node for word in sys.argv[1:] if not word.startswith("--") for node in found(word)]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    kept: object = None
    if "--map" in options:
        for node in nodes:
            map_node(node)
    else:
        fds = [os.open(node, os.O_RDWR) for node in nodes]
        kept = hide(fds) if "--hide" in options else fds
    notify("READY=1")
    # a blocked signal that nobody takes is ignored
    signal.sigwait({signal.SIGUSR1} if "--stubborn" in options else {signal.SIGTERM})
    del kept


if __name__ == "__main__":
    main()
