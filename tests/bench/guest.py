"""Runs in the virtual machine, with the service's own Python: times switches beside the bare writes of a shell script.

    guest.py FLOOR_SCRIPT ROUNDS FUNCTION...

The client of the service is running already when the clock starts, and the shell is not: it is part of a script.
Prints a list of seconds by name, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection


def floor(script: str, target: str, functions: list[str]) -> float:
    """Seconds that the script takes."""
    begun = time.perf_counter()
    subprocess.run(["/bin/sh", script, f"to-{target}", *functions], check=True)
    return time.perf_counter() - begun


class Client:
    """Somebody on the bus who stays connected."""

    def __init__(self, connection: DBusConnection, gpu: str) -> None:
        path = "/org/gpuswitch1/gpu/" + gpu.replace(":", "_").replace(".", "_")
        self._connection = connection
        self._gpu = DBusAddress(path, "org.gpuswitch1", "org.gpuswitch1.Gpu")

    def go(self, target: str) -> tuple[float, float]:
        """Seconds as this client sees them, and as the service's own record says."""
        begun = time.perf_counter()
        method = {"vfio": "ToVfio", "host": "ToHost"}[target]
        reply = self._connection.send_and_get_reply(new_method_call(self._gpu, method, "a{sv}", ({},)), timeout=120)
        [switch] = reply.body
        reply = self._connection.send_and_get_reply(new_method_call(self._gpu, "Wait", "s", (switch,)), timeout=120)
        seconds = time.perf_counter() - begun
        record = {key: value for key, (_, value) in reply.body[0].items()}
        if record["result"] != "done":
            sys.exit(f"the switch to {target} ended as {record['result']}: {record['reason']}")
        return seconds, record["finished"] - record["started"]


def main() -> None:
    script, rounds, *functions = sys.argv[1:]
    measured: dict[str, list[float]] = {}
    with open_dbus_connection("SYSTEM") as connection:
        client = Client(connection, functions[0])
        for number in range(int(rounds) + 1):
            for target in ("vfio", "host"):
                seen, own = client.go(target)
                if number:  # the first round starts the worker and loads what is loaded once
                    measured.setdefault(f"client to {target}", []).append(seen)
                    measured.setdefault(f"service to {target}", []).append(own)
            for target in ("vfio", "host"):
                seconds = floor(script, target, functions)
                if number:
                    measured.setdefault(f"floor to {target}", []).append(seconds)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
