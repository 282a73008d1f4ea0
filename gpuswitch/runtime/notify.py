"""Telling systemd how the service is (sd_notify(3)): one datagram to the socket that it named. Elsewhere: nothing."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

_SECONDS = 1.0
"""How long a systemd that does not read may keep us."""


def notify(*assignments: str) -> None:
    """Send assignments such as `READY=1`. Without systemd, or where it does not listen, nothing happens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_SECONDS)
        sender.connect(path)
        sender.sendall("\n".join(assignments).encode())


def reloading() -> None:
    """Say that a reload begins; `READY=1` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds() -> float | None:
    """How often systemd wants to hear `WATCHDOG=1`: twice in the time that it allows. None: it does not."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(usec) / 2_000_000 if usec.isdecimal() and int(usec) and for_us else None
