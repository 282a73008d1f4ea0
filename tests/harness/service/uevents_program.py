"""Runs in a network namespace of its own, where it may send uevents that nobody else hears.

The kernel lets the owner of a network namespace send uevents into it (uevent_net_rcv in lib/kobject_uevent.c); they
arrive as the kernel's own do. Prints one word for each case that went as it should.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import sys

from gpuswitch.host.linux import uevents

NETLINK_KOBJECT_UEVENT = 15
_numbers = itertools.count(1)


def send(subsystem: str, *, action: str = "bind", count: int = 1) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as sender:
        for number in itertools.islice(_numbers, count):
            # libudev drops an event of a driver whose path is not a driver's.
            path = f"/bus/pci/drivers/{number}" if subsystem == "drivers" else f"/devices/pci0000:00/{number}"
            values = f"{action}@{path}\0ACTION={action}\0DEVPATH={path}\0SUBSYSTEM={subsystem}\0".encode()
            # struct nlmsghdr: length, type (any above the control types), NLM_F_REQUEST, sequence number, port.
            header = struct.pack("=LHHLL", 16 + len(values), 0x10, 1, 0, 0)
            sender.sendto(header + values, (0, 0))


class Changes:
    """Counts the calls, and lets a test wait for the next one."""

    def __init__(self) -> None:
        self.count = 0
        self.told = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self.told.set()

    async def next(self) -> None:
        await self.told.wait()
        self.told.clear()


async def each_subsystem_tells() -> None:
    for subsystem in ("pci", "drivers", "drm", "sound", "vfio"):
        changes = Changes()
        stop = uevents.watch(changes)
        send(subsystem)
        await changes.next()
        stop()


async def others_do_not() -> None:
    changes = Changes()
    stop = uevents.watch(changes)
    send("block", count=5)
    send("pci")
    await changes.next()
    assert changes.count == 1
    stop()


async def a_burst_is_one_call() -> None:
    """However many there are: one call in a turn of the loop, and the loop gets its turns."""
    changes = Changes()
    stop = uevents.watch(changes)
    send("pci", count=200)
    await changes.next()
    assert changes.count == 1
    stop()


async def an_overflow_tells_and_is_survived() -> None:
    """The kernel drops what does not fit, and says so once (ENOBUFS); later events arrive."""
    changes = Changes()
    stop = uevents.watch(changes, buffer_bytes=4096)
    send("block", count=5000)
    await changes.next()
    send("pci")
    await changes.next()
    stop()


async def a_stopped_one_is_silent() -> None:
    silent, changes = Changes(), Changes()
    stop_silent, stop = uevents.watch(silent), uevents.watch(changes)
    send("pci")
    stop_silent()
    stop_silent()
    await changes.next()
    assert silent.count == 0
    stop()


if __name__ == "__main__":
    asyncio.run(
        {
            case.__name__: case
            for case in (
                each_subsystem_tells,
                others_do_not,
                a_burst_is_one_call,
                an_overflow_tells_and_is_survived,
                a_stopped_one_is_silent,
            )
        }[sys.argv[1]]()
    )
    sys.stdout.write("kept\n")
