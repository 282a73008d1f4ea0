"""The clock that goes on while the machine sleeps: that of the event loop (CLOCK_MONOTONIC) stands still then."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time

from gpuswitch.errors import KernelError

_LIBC = ctypes.CDLL(None, use_errno=True)
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
"""TFD_CLOEXEC and TFD_NONBLOCK are these two (include/linux/timerfd.h of the kernel)."""
_ABSOLUTE = 1
"""TFD_TIMER_ABSTIME."""


class _Moment(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timer(ctypes.Structure):
    """struct itimerspec; an `interval` of 0: once."""

    _fields_ = (("interval", _Moment), ("first", _Moment))


def boottime() -> float:
    """As `Host.boottime`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def until(moment: float) -> None:
    """As `Host.until`: by timerfd_create(2), which Python has from 3.13 on."""
    timer = _checked(_LIBC.timerfd_create(time.CLOCK_BOOTTIME, _FLAGS))
    loop = asyncio.get_running_loop()
    try:
        # The moment 0 would disarm it.
        first = _Moment(max(int(moment), 0), max(int(moment % 1 * 1e9), 1))
        _checked(_LIBC.timerfd_settime(timer, _ABSOLUTE, ctypes.byref(_Timer(_Moment(0, 0), first)), None))
        expired = asyncio.Event()
        loop.add_reader(timer, expired.set)
        await expired.wait()
    finally:
        loop.remove_reader(timer)
        os.close(timer)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError("set", "a timer", number, os.strerror(number))
    return result
