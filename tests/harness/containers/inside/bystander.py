"""Somebody else on the system bus, while others attack: `bystander.py STOP`.

Looks at a GPU, one call after the other, and has it switched there and back. Says a line of JSON when it is on the bus,
and one at the end, once the file STOP is there: the calls and switches, and the seconds that half and 99 of 100 calls
took at most; and calls of the bus itself, which are answered without us.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jeepney
from jeepney.io.blocking import open_dbus_connection

NAME, GPU = "org.gpuswitch1", "/org/gpuswitch1/gpu/0000_01_00_0"
PROPERTIES = jeepney.DBusAddress(GPU, NAME, "org.freedesktop.DBus.Properties")
BUS = jeepney.DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
METHODS = jeepney.DBusAddress(GPU, NAME, f"{NAME}.Gpu")


def main() -> None:
    stop = Path(sys.argv[1])
    seconds: list[float] = []
    of_the_bus: list[float] = []
    switches = 0
    with open_dbus_connection("SYSTEM") as bus:

        def ask(address: jeepney.DBusAddress, member: str, signature: str, *arguments: Any) -> Any:
            reply = bus.send_and_get_reply(
                jeepney.new_method_call(address, member, signature or None, arguments), timeout=100
            )
            if reply.header.message_type is jeepney.MessageType.error:
                sys.exit(f"{member}: {reply.body}")
            return reply.body[0]

        print(json.dumps("on the bus"), flush=True)  # noqa: T201 -- its output
        while not stop.exists() or switches < 2:
            for _ in range(50):
                begun = time.monotonic()
                ask(PROPERTIES, "GetAll", "s", f"{NAME}.Gpu")
                seconds.append(time.monotonic() - begun)
                begun = time.monotonic()
                ask(BUS, "GetId", "")
                of_the_bus.append(time.monotonic() - begun)
            switch = ask(METHODS, ("ToVfio", "ToHost")[switches % 2], "a{sv}", {})
            assert ask(METHODS, "Wait", "s", switch)["result"] == ("s", "done")
            switches += 1
        if switches % 2:
            ask(METHODS, "Wait", "s", ask(METHODS, "ToHost", "a{sv}", {}))
    told: dict[str, float] = {"calls": len(seconds), "switches": switches}
    for whose, measured in (("", seconds), ("bus ", of_the_bus)):
        measured.sort()
        told |= {f"{whose}p50": measured[len(measured) // 2], f"{whose}p99": measured[int(len(measured) * 0.99)]}
    print(json.dumps(told), flush=True)  # noqa: T201 -- its output


if __name__ == "__main__":
    main()
