"""What a page of Cockpit sees of the service: `cockpit.py PATH`, by `cockpit-bridge`, which a page talks to.

PATH is the object of a GPU. Says a line of JSON for each thing: its state; the methods that the bridge has found by
introspection; that a switch to vfio has ended, as a signal says; and the error of a call that is refused.

The protocol: cockpit's doc/protocol.md. Each message is its size, a line break, the channel, a line break and JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

NAME = "org.gpuswitch1"
GPU = f"{NAME}.Gpu"


def say(thing: object) -> None:
    print(json.dumps(thing), flush=True)  # noqa: T201 -- its output


class Bridge:
    """One channel to the service, over the system bus."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._send("", {"command": "init", "version": 1, "host": "localhost"})
        self._send("", {"command": "open", "channel": "page", "payload": "dbus-json3", "bus": "system", "name": NAME})

    def send(self, message: dict[str, Any]) -> None:
        self._send("page", message)

    def _send(self, channel: str, message: dict[str, Any]) -> None:
        data = f"{channel}\n{json.dumps(message)}".encode()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{len(data)}\n".encode() + data)
        self._process.stdin.flush()

    def receive(self, key: str) -> dict[str, Any]:
        """The next message of the channel that has this key."""
        assert self._process.stdout is not None
        while size := self._process.stdout.readline():
            channel, _, text = self._process.stdout.read(int(size)).decode().partition("\n")
            message: dict[str, Any] = json.loads(text)
            if "problem" in message:
                sys.exit(f"cockpit-bridge: {message}")
            if channel and key in message:
                return message
        sys.exit("cockpit-bridge has ended")

    def call(self, path: str, interface: str, member: str, *arguments: object) -> dict[str, Any]:
        """The answer: what it returns is its `reply`; name and text of an error are its `error`."""
        self.send({"call": [path, interface, member, list(arguments)], "id": member})
        while (message := self.receive("id"))["id"] != member:
            pass
        return message


def main() -> None:
    path = sys.argv[1]
    with subprocess.Popen(["cockpit-bridge"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        bridge = Bridge(process)
        say(bridge.call(path, "org.freedesktop.DBus.Properties", "Get", GPU, "State")["reply"][0][0]["v"])
        bridge.send({"watch": {"path": path}, "id": "watch"})
        say(sorted(bridge.receive("meta")["meta"][GPU]["methods"]))
        bridge.send({"add-match": {"path": path, "interface": GPU, "member": "SwitchFinished"}})
        [[switch]] = bridge.call(path, GPU, "ToVfio", {})["reply"]
        _, _, member, [ended, result, _] = bridge.receive("signal")["signal"]
        say([member, ended == switch, result])
        say(bridge.call(path, GPU, "Plan", "mars", {})["error"])
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    main()
