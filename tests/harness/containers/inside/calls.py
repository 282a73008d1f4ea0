"""Call methods on the system bus and say what came of each: `calls.py < CALLS`.

CALLS is a JSON list of calls, each a list of destination, path, interface (may be empty: the call names none), member.
Each is made with an argument that no method takes, so that one that is let through does nothing. The name of the error
is said for each, in a line of JSON.
"""

from __future__ import annotations

import json
import sys

import jeepney
from jeepney.io.blocking import open_dbus_connection

NONSENSE = "(yn)", ((1, 2),)


def main() -> None:
    with open_dbus_connection("SYSTEM") as bus:
        for destination, path, interface, member in json.load(sys.stdin):
            address = jeepney.DBusAddress(path, destination, interface or None)
            reply = bus.send_and_get_reply(jeepney.new_method_call(address, member, *NONSENSE))
            print(json.dumps(reply.header.fields[jeepney.HeaderFields.error_name]))  # noqa: T201 -- its output


if __name__ == "__main__":
    main()
