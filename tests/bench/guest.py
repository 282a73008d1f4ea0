"""Runs in the virtual machine, with the service's own Python: times switches beside the bare writes of a shell script.

    guest.py FLOOR_SCRIPT ROUNDS FUNCTION...

The client of the service is running already when the clock starts, and the shell is not: it is part of a script. Each
of both begins on a machine at rest, whose sound cards stay awake: one that is awake, and would sleep by now, is put
to sleep by an unbind (`__device_release_driver` in drivers/base/dd.c), and QEMU's codec does not say that it sleeps,
for which the kernel waits half a second (`snd_hdac_sync_power_state` in sound/hda/hdac_device.c). Prints a list of
seconds by name, as JSON.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

from jeepney import DBusAddress, Message, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

ID_LENGTH = 8
"""Characters in the id of a switch."""


def rest() -> None:
    """Until udev has nothing to do."""
    subprocess.run(["/usr/bin/udevadm", "settle"], check=True)


def floor(script: str, target: str, functions: list[str]) -> float:
    """Seconds that the script takes."""
    begun = time.perf_counter()
    subprocess.run(["/bin/sh", script, f"to-{target}", *functions], check=True)
    return time.perf_counter() - begun


class Client:
    """Somebody on the bus who stays connected, and has its calls ready.

    Python is emulated here: what this makes of an answer would take as long as a fifth of a switch, and is not the
    service's. So an answer is read when the clock has stopped.
    """

    def __init__(self, connection: DBusConnection, gpu: str) -> None:
        path = "/org/gpuswitch1/gpu/" + gpu.replace(":", "_").replace(".", "_")
        self._socket = connection.sock
        self._socket.setblocking(True)
        self._serials = connection.outgoing_serial
        self._gpu = DBusAddress(path, "org.gpuswitch1", "org.gpuswitch1.Gpu")
        self._received = b""

    def go(self, target: str) -> tuple[float, float]:
        """Seconds as this client sees them, and as the service's own record says."""
        method = {"vfio": "ToVfio", "host": "ToHost"}[target]
        moves, waits = next(self._serials), next(self._serials)
        call = new_method_call(self._gpu, method, "a{sv}", ({},)).serialise(serial=moves)
        unfinished = new_method_call(self._gpu, "Wait", "s", ("0" * ID_LENGTH,)).serialise(serial=waits)
        begun = time.perf_counter()
        self._socket.sendall(call)
        [switch] = self._answer().body
        self._socket.sendall(unfinished.replace(b"0" * ID_LENGTH, switch.encode()))
        frame = self._frame()
        seconds = time.perf_counter() - begun
        record = {key: value for key, (_, value) in Message.from_buffer(frame).body[0].items()}
        if record["result"] != "done":
            sys.exit(f"the switch to {target} ended as {record['result']}: {record['reason']}")
        return seconds, record["finished"] - record["started"]

    def _answer(self) -> Message:
        return Message.from_buffer(self._frame())

    def _frame(self) -> bytes:
        """The next answer (D-Bus specification, Message Format); the bus itself has told us our name before."""
        while True:
            if len(self._received) >= 16:
                body, fields = struct.unpack_from("<I4xI", self._received, 4)
                size = 16 + (fields + 7) // 8 * 8 + body
                if len(self._received) >= size:
                    frame, self._received = self._received[:size], self._received[size:]
                    if frame[1] != MessageType.signal.value:
                        return frame
                    continue
            self._received += self._socket.recv(65536)


def main() -> None:
    script, rounds, *functions = sys.argv[1:]
    measured: dict[str, list[float]] = {}
    Path("/sys/module/snd_hda_intel/parameters/power_save").write_text("0")
    with open_dbus_connection("SYSTEM") as connection:
        client = Client(connection, functions[0])
        for number in range(int(rounds) + 1):
            for target in ("vfio", "host"):
                rest()
                seen, own = client.go(target)
                if number:  # the first round starts the worker and loads what is loaded once
                    measured.setdefault(f"client to {target}", []).append(seen)
                    measured.setdefault(f"service to {target}", []).append(own)
            for target in ("vfio", "host"):
                rest()
                seconds = floor(script, target, functions)
                if number:
                    measured.setdefault(f"floor to {target}", []).append(seconds)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
