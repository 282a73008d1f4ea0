"""Incus' daemon, as far as the doctor asks it: what 7.0.2 of Debian answers, with devices of a test's choice."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread

Devices = Mapping[str, Mapping[str, str]]


def instance(name: str, devices: Devices, *, kind: str = "virtual-machine", project: str = "default") -> object:
    """With the keys that are read, and some that are not."""
    root = {"root": {"path": "/", "pool": "default", "type": "disk"}}
    return {
        "name": name,
        "project": project,
        "type": kind,
        "status": "Stopped",
        "profiles": ["default"],
        "devices": devices,
        "expanded_devices": {**root, **devices},
    }


def profile(name: str, devices: Devices, used_by: Sequence[str] = ()) -> object:
    return {"name": name, "project": "default", "description": "", "devices": devices, "used_by": list(used_by)}


def serve(place: Path, instances: Sequence[object], profiles: Sequence[object], looks: int) -> None:
    """Answer what so many looks ask, at this socket."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(place.parent, os.O_PATH)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"/proc/self/fd/{folder}/{place.name}")
    os.close(folder)
    listening.listen()
    Thread(target=_answer, args=(listening, {"instances": instances, "profiles": profiles}, looks), daemon=True).start()


def _answer(listening: socket.socket, known: Mapping[str, Sequence[object]], looks: int) -> None:
    with listening:
        for _ in range(looks * len(known)):
            caller, _address = listening.accept()
            with caller, caller.makefile("rb") as asked:
                _get, path, _version = asked.readline().decode().split()
                what = path.removeprefix("/1.0/").partition("?")[0]
                body = json.dumps({"type": "sync", "status_code": 200, "error": "", "metadata": known[what]}).encode()
                caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
