"""Say which signals of gpuswitchd come: `listen.py LAST`.

Says `ready` when it listens, then the member of each signal, and ends with LAST.
"""

from __future__ import annotations

import sys

from jeepney import HeaderFields, MatchRule
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import Proxy, open_dbus_connection


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 -- its output


def main() -> None:
    rule = MatchRule(type="signal", sender="org.gpuswitch1")
    with (
        open_dbus_connection("SYSTEM") as bus,
        bus.filter(MatchRule(type="signal", path_namespace="/org/gpuswitch1")) as signals,
    ):
        Proxy(message_bus, bus).AddMatch(rule)
        say("ready")
        member = ""
        while member != sys.argv[1]:
            member = bus.recv_until_filtered(signals).header.fields[HeaderFields.member]
            say(member)


if __name__ == "__main__":
    main()
