"""The instances and profiles of Incus on this machine that are given GPUs, as its daemon says over its socket.

Their devices are in a database that only the daemon reads (dqlite). It is asked where it runs, and is not started for
that, as systemd would do for whoever connects to the socket. Paths are those of the source of Incus 7.0
(internal/server/response, doc/rest-api.md).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

from gpuswitch.doctor.findings import Unseen
from gpuswitch.doctor.looks import units
from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import IncusDevice
from gpuswitch.sentence import Sentence

UNIT = "incus.service"
SOCKETS = ("/var/lib/incus/unix.socket", "/run/incus/unix.socket")
"""Of a package; of others."""
_SECONDS = 5.0
"""How long each answer may take that comes from memory and a local database."""
_MOST = 16 << 20
"""Bytes of an answer: some thousand instances."""
_SHORT = len("01:00.0")


def look(files: Files) -> tuple[IncusDevice, ...]:
    place = next((place for place in SOCKETS if files.there(place)), "")
    if not place:
        return ()
    running = (units.look(files, [UNIT]) or {}).get(UNIT)
    if running is None or not running.active:
        # Nobody takes a card then; what instances are given is told when it runs.
        return ()
    if not files.machine.as_root:
        files.unseen.append(Unseen("Incus", Sentence("only root may look at it"), for_root=True))
        return ()
    try:
        return devices(files, place)
    except (OSError, HTTPException, ValueError, TypeError, KeyError, AttributeError) as error:
        files.unseen.append(Unseen("Incus", Sentence("its daemon does not answer: {why}", why=str(error))))
        return ()


def devices(files: Files, place: str) -> tuple[IncusDevice, ...]:
    """What the daemon at this socket says.

    Raises:
        OSError, HTTPException: it does not answer.
        ValueError, TypeError, KeyError, AttributeError: with something else.
    """
    instances, profiles = (_asked(files.machine.path(place), what) for what in ("instances", "profiles"))
    return (*_of_instances(files, instances), *_of_profiles(files, profiles))


class _Connection(HTTPConnection):
    """HTTP over a Unix socket, by its path."""

    def __init__(self, path: str) -> None:
        super().__init__("incus", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        folder = os.open(os.path.dirname(self._path), os.O_PATH | os.O_CLOEXEC)  # noqa: PTH120 -- text, as it is given
        try:
            # A path of any length (unix(7): 108 bytes).
            self.sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(self._path)}")  # noqa: PTH119 -- as above
        finally:
            os.close(folder)


def _asked(place: str, what: str) -> list[Mapping[str, Any]]:
    """All of them, in all projects. Raises what `devices` does."""
    connection = _Connection(place)
    try:
        connection.request("GET", f"/1.0/{what}?recursion=1&all-projects=true")
        answer = connection.getresponse()
        said = json.loads(answer.read(_MOST))
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(said["error"])
    return list(said["metadata"])


def _of_instances(files: Files, instances: list[Mapping[str, Any]]) -> Iterator[IncusDevice]:
    for each in instances:
        name = _named(str(each["name"]), str(each.get("project", "default")))
        for device, keys in each["expanded_devices"].items():
            yield from _device(files, name, str(each["type"]), str(device), keys)


def _of_profiles(files: Files, profiles: list[Mapping[str, Any]]) -> Iterator[IncusDevice]:
    """Those that an instance uses are told with it: its devices are expanded."""
    for each in profiles:
        if not each.get("used_by"):
            name = _named(str(each["name"]), str(each.get("project", "default")))
            for device, keys in each["devices"].items():
                yield from _device(files, name, "profile", str(device), keys)


def _named(name: str, project: str) -> str:
    return name if project == "default" else f"{name} (project {project})"


def _device(files: Files, owner: str, kind: str, name: str, keys: Mapping[str, str]) -> Iterator[IncusDevice]:
    """What a device is given by (gpuSelected in internal/server/device/gpu.go, pci.go beside it)."""
    if keys.get("type") == "pci":
        yield IncusDevice(owner, kind, name, "pci", function=_whole(keys.get("address", "")))
    elif keys.get("type") == "gpu" and keys.get("gputype", "physical") in {"", "physical"}:
        number = keys.get("id", "")
        function, found = _whole(keys.get("pci", "")), True
        if number.isdecimal():
            # As it is now: a card that is on vfio has no number, and Incus would not find it either.
            uevent = files.lines(f"/sys/class/drm/card{number}/device/uevent")
            function = next((line.partition("=")[2] for line in uevent if line.startswith("PCI_SLOT_NAME=")), "")
            found = bool(function)
        if found:
            ids = keys.get("vendorid", ""), keys.get("productid", "")
            yield IncusDevice(owner, kind, name, "gpu", function=function, ids=ids)


def _whole(address: str) -> str:
    """With the domain (NormaliseAddress in internal/server/device/pci/pci.go)."""
    return (f"0000:{address}" if len(address) == _SHORT else address).lower()
