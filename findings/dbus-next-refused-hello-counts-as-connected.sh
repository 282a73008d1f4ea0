#!/bin/sh
# dbus-next 0.2.3 and dbus-fast 5.2.0: a connection that the bus refuses counts as connected, by the text of the refusal.
#
# A bus that has no room for one more connection of a user says so when that one says Hello. Both libraries take the
# first value of whatever answers Hello for the connection's unique name, also where the answer is an error. connect()
# returns, `connected` is true, and `unique_name` is a sentence; the first call then ends in a lost connection, or waits.
# The limit is 256 on a system bus: on a busy machine a service would start, seem well, and be on no bus.
#
# Needs python3 (3.11 or later) with venv, and dbus-daemon. Seen with dbus-daemon 1.14.10:
#   dbus_next, first: connected, ':1.0'
#   dbus_next, second: connected, 'The maximum number of active connections for UID ... has been reached'
#   dbus_fast, first: connected, ':1.1'
#   dbus_fast, second: connected, 'The maximum number of active connections for UID ... has been reached'
set -eu
folder=$(mktemp -d)
trap 'kill $bus 2>/dev/null || :; rm -rf "$folder"' EXIT
bus=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check dbus-next==0.2.3 dbus-fast==5.2.0
dbus-daemon --version | head -n 1
cat >"$folder/bus.conf" <<END
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=$folder/bus</listen>
  <policy context="default">
    <allow send_destination="*"/><allow eavesdrop="false"/><allow own="*"/><allow user="*"/>
  </policy>
  <limit name="max_connections_per_user">1</limit>
</busconfig>
END
dbus-daemon --config-file="$folder/bus.conf" --nofork --nopidfile --print-address >"$folder/address" &
bus=$!
while [ ! -s "$folder/address" ]; do kill -0 "$bus"; done
"$folder/venv/bin/python" - "unix:path=$folder/bus" <<'END'
import asyncio
import importlib
import re
import sys


async def main(library: str) -> None:
    message_bus = importlib.import_module(f"{library}.aio").MessageBus
    first = await message_bus(bus_address=sys.argv[1]).connect()
    second = await message_bus(bus_address=sys.argv[1]).connect()
    for which, each in (("first", first), ("second", second)):
        name = re.sub(r"UID \d+", "UID ...", each.unique_name)
        print(f"{library}, {which}: {'connected' if each.connected else 'not connected'}, {name!r}")
    assert second.connected, "changed: a refused connection is none"
    assert "maximum number" in second.unique_name, "changed: the refusal is no name"
    second.disconnect()
    first.disconnect()
    await first.wait_for_disconnect()


for library in ("dbus_next", "dbus_fast"):
    asyncio.run(main(library))
END
