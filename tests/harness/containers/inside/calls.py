"""Call methods on the system bus and say what came of each: `calls.py < CALLS`.

CALLS is a JSON list of calls, each a list of path, interface (may be empty: the call names none), member, signature,
arguments, and whether a person may be asked. Says a line of JSON for each: the name of the error, "" for none.
"""

from __future__ import annotations

import json
import sys

import jeepney
from jeepney.io.blocking import open_dbus_connection


def main() -> None:
    with open_dbus_connection("SYSTEM") as bus:
        for path, interface, member, signature, arguments, interactive in json.load(sys.stdin):
            address = jeepney.DBusAddress(path, "org.gpuswitch1", interface or None)
            call = jeepney.new_method_call(address, member, signature or None, _body(arguments))
            if interactive:
                call.header.flags |= jeepney.MessageFlag.allow_interactive_authorization
            reply = bus.send_and_get_reply(call)
            name = reply.header.fields.get(jeepney.HeaderFields.error_name, "")
            print(json.dumps(name), flush=True)  # noqa: T201 -- its output


def _body(arguments: list[object]) -> tuple[object, ...]:
    """JSON has no variants: the values of an `a{sv}` are pairs of signature and value."""
    return tuple(
        {key: tuple(pair) for key, pair in each.items()} if isinstance(each, dict) else each for each in arguments
    )


if __name__ == "__main__":
    main()
