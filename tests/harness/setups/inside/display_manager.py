#!/usr/bin/python3 -ISE
"""What a display server does to a GPU, and nothing to look at; READY=1 when it has it, gone on SIGTERM.

    display_manager.py CARD VT
    display_manager.py CARD
    display_manager.py --front VT

With a virtual terminal's number as an X server of root's: it switches there, puts the terminal into graphics mode,
opens the card and is DRM master. Without, as a Wayland compositor in a session that is in front: logind does all that,
and has the card open too. --front only switches there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path

# uapi/linux/vt.h, uapi/linux/kd.h, uapi/drm/drm.h
VT_GETSTATE, VT_ACTIVATE, VT_WAITACTIVE = 0x5603, 0x5606, 0x5607
KDSETMODE, KD_TEXT, KD_GRAPHICS = 0x4B3A, 0, 1
DRM_IOCTL_SET_MASTER = 0x641E

LOGIND = (b"org.freedesktop.login1", b"/org/freedesktop/login1/session/self", b"org.freedesktop.login1.Session")


def notify(text: str) -> None:
    """Tell systemd, sd_notify(3); where it does not ask, say it."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)


class Logind:
    """A connection to logind through libsystemd: what it gave is gone when the connection is."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libsystemd.so.0")
        self._bus = ctypes.c_void_p()
        self._check("connect", self._library.sd_bus_open_system(ctypes.byref(self._bus)))

    def take_control(self) -> None:
        """Be the session's display server: logind puts its terminal into graphics mode."""
        self._call(b"TakeControl", b"b", ctypes.c_int(0))

    def take_device(self, node: str) -> int:
        """A descriptor of the node: of a card, as DRM master while the session is in front."""
        device = Path(node).stat().st_rdev
        reply = self._call(b"TakeDevice", b"uu", ctypes.c_uint32(os.major(device)), ctypes.c_uint32(os.minor(device)))
        fd, inactive = ctypes.c_int(), ctypes.c_int()
        read = self._library.sd_bus_message_read
        self._check("read", read(reply, b"hb", ctypes.byref(fd), ctypes.byref(inactive)))
        if inactive.value:
            raise OSError(f"cannot draw on {node}: the session is not in front")
        # the message owns the descriptor
        return os.dup(fd.value)

    def _call(self, method: bytes, types: bytes, *arguments: ctypes._SimpleCData[int]) -> ctypes.c_void_p:
        reply = ctypes.c_void_p()
        call = self._library.sd_bus_call_method
        done = call(self._bus, *LOGIND, method, None, ctypes.byref(reply), types, *arguments)
        self._check(method.decode(), done)
        return reply

    def _check(self, what: str, result: int) -> None:
        if result < 0:
            raise OSError(-result, f"logind, {what}: {os.strerror(-result)}")


def serve_session(card: str) -> None:
    logind = Logind()
    logind.take_control()
    logind.take_device(card)
    notify("READY=1")
    signal.sigwait({signal.SIGTERM})


def bring_to_front(terminal: int, number: int) -> None:
    fcntl.ioctl(terminal, VT_ACTIVATE, number)
    fcntl.ioctl(terminal, VT_WAITACTIVE, number)


def open_terminal(number: int) -> int:
    return os.open(f"/dev/tty{number}", os.O_RDWR | os.O_NOCTTY)


def serve_terminal(card: str, number: int) -> None:
    terminal = open_terminal(number)
    before = struct.unpack("=3H", fcntl.ioctl(terminal, VT_GETSTATE, bytes(6)))[0]
    bring_to_front(terminal, number)
    fcntl.ioctl(terminal, KDSETMODE, KD_GRAPHICS)
    try:
        fcntl.ioctl(os.open(card, os.O_RDWR), DRM_IOCTL_SET_MASTER)
        notify("READY=1")
        signal.sigwait({signal.SIGTERM})
    finally:
        fcntl.ioctl(terminal, KDSETMODE, KD_TEXT)
        bring_to_front(terminal, before)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    match sys.argv[1:]:
        case ["--front", number]:
            bring_to_front(open_terminal(int(number)), int(number))
        case [card, number]:
            serve_terminal(card, int(number))
        case [card]:
            serve_session(card)


if __name__ == "__main__":
    main()
