"""Events of the kernel and of udev, as one call: a look may show something new.

The kernel's own events tell at once that a function came, went, was bound or unbound, and that a driver or a vfio node
is there. udev's come when it has finished the device nodes. What an event says beside that is not used: a look tells
more, and none of it can be stale.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import pyudev

_SUBSYSTEMS: Final = {
    "kernel": ("pci", "drivers", "drm", "graphics", "sound", "vfio", "mdev"),
    "udev": ("pci", "drm", "graphics", "sound", "vfio", "vfio-dev", "misc"),  # /dev/iommu is of misc
}
# An event is about 1 KiB, and a machine that boots or wakes up sends thousands in a moment.
_BUFFER_BYTES = 16 << 20
# So many are taken before the loop gets its turn.
_BATCH = 256


def watch(changed: Callable[[], None], *, buffer_bytes: int = _BUFFER_BYTES) -> Callable[[], None]:
    """Call `changed` on the running loop: once for all events of a turn of the loop. Returns the way to stop it.

    Where the kernel had to drop events (ENOBUFS), `changed` is called for those too. The larger buffer needs
    CAP_NET_ADMIN; without it, the system's default has to do.
    """
    return _Watch(changed, buffer_bytes).stop


class _Watch:
    def __init__(self, changed: Callable[[], None], buffer_bytes: int) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Handle | None = None
        context = pyudev.Context()
        self._sockets: list[socket.socket] = []
        self._monitors = [_monitor(context, source, names, buffer_bytes) for source, names in _SUBSYSTEMS.items()]
        for monitor in self._monitors:
            # The loop gets a descriptor of its own, which is ours to close: a monitor closes its one when it is freed.
            mine = socket.socket(fileno=os.dup(monitor.fileno()))
            self._sockets.append(mine)
            self._loop.add_reader(mine, self._receive, monitor, mine)

    def stop(self) -> None:
        for mine in self._sockets:
            self._loop.remove_reader(mine)
            mine.close()
        self._sockets.clear()
        self._monitors.clear()
        if self._told is not None:
            self._told.cancel()

    def _receive(self, monitor: pyudev.Monitor, mine: socket.socket) -> None:
        """Take what there is; what is left over a batch makes the loop call again."""
        for _ in range(_BATCH):
            try:
                if monitor.poll(timeout=0) is None:
                    return
            except OSError as error:
                # pyudev sees that the socket has an error, and neither says which nor takes it off the socket; left
                # there, it would come again for ever.
                number = error.errno or mine.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number != errno.ENOBUFS:
                    raise
            self._tell()

    def _tell(self) -> None:
        if self._told is None:
            self._told = self._loop.call_soon(self._call)

    def _call(self) -> None:
        self._told = None
        self._changed()


def _monitor(context: pyudev.Context, source: str, subsystems: tuple[str, ...], buffer_bytes: int) -> pyudev.Monitor:
    monitor = pyudev.Monitor.from_netlink(context, source=source)
    for subsystem in subsystems:
        monitor.filter_by(subsystem)
    with suppress(PermissionError):
        monitor.set_receive_buffer_size(buffer_bytes)
    monitor.start()
    return monitor
