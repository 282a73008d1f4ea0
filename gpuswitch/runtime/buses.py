"""Bus addresses: which of them are the system's, and where a simulated service may be."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from gpuswitch.errors import InvalidArgument

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"

CONTAINER = Path("/run/systemd/container")
"""Where systemd says of which kind the container is that it is the first process of: write_container_id() in its
src/core/main.c. `systemd-detect-virt --container` (src/basic/virt.c) goes by more than that: by files that an image may
have brought along, and by a control group of one's own."""


def system_bus() -> str:
    return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS


def check_simulated(bus: str) -> None:
    """See that nobody on this bus can take a simulated service for the one that moves this machine's GPUs.

    On a socket of this machine, those who look are those who were told of it. On the system bus they are not, unless it
    is the bus of a container's own systemd.

    Raises:
        InvalidArgument: it is not a bus for a simulated service.
    """
    named = list(_named(bus))
    if not named or None in named:
        raise InvalidArgument(
            f"a simulated gpuswitchd does not go on the bus {bus!r}: "
            "give it one that is a socket of this machine, like unix:path=/tmp/bus"
        )
    system = {
        mark
        for address in (SYSTEM_BUS, "unix:path=/var/run/dbus/system_bus_socket", system_bus())
        for place in _named(address)
        if place is not None
        for mark in _marks(place)
    }
    theirs = [place for place in named if place is not None and _marks(place) & system]
    if theirs and not CONTAINER.exists():
        raise InvalidArgument(
            "a simulated gpuswitchd does not go on the system bus, but in a container that has a systemd of its own: "
            "give it a --bus of its own, a socket of this machine like unix:path=/tmp/bus"
        )
    if not all(map(_served_here, theirs)):
        raise InvalidArgument(
            "a simulated gpuswitchd does not go on the system bus of the machine that its container runs on: "
            "give it a --bus of its own, a socket like unix:path=/tmp/bus"
        )


def _named(bus: str) -> Iterator[str | None]:
    """The sockets of an address (D-Bus specification, Server Addresses): a path, or `@` and an abstract name.

    None for what is no socket of this machine.
    """
    for part in filter(None, bus.split(";")):
        transport, _, options = part.partition(":")
        keys = {key: unquote(value) for key, _, value in (option.partition("=") for option in options.split(","))}
        path, name = keys.get("path"), keys.get("abstract")
        if transport != "unix" or not (path or name) or "\0" in f"{path}{name}":
            yield None
        else:
            yield path or f"@{name}"


def _marks(place: str) -> set[object]:
    """What tells a socket from others, however it is named: real path, and device and inode; or the abstract name."""
    if place.startswith("@"):
        return {place}
    marks: set[object] = {Path(place).resolve()}
    with suppress(OSError):  # nobody listens there
        status = Path(place).stat()
        marks.add((status.st_dev, status.st_ino))
    return marks


def _served_here(place: str) -> bool:
    """Whether it is a process of this container that listens there, or nobody does.

    The kernel tells of who listens by the number that the process has in the namespace of who asks: 0 where it has none
    (SO_PEERCRED in socket(7)).
    """
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(f"\0{place[1:]}" if place.startswith("@") else place)
        except OSError:
            return True
        pid, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(pid)
