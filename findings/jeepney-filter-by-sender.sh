#!/bin/sh
# jeepney 0.9.0: a filter made of the rule that the bus was given hears nothing, where the rule names its sender.
#
# One MatchRule serves for both, AddMatch at the bus and filter() at the connection. The bus takes `sender` for whoever
# owns that name; the connection compares it to the header of the message, where the bus has written the unique name.
# So the signal arrives, and is not put into the queue: recv_until_filtered() waits for ever. Without `sender`, or with
# the unique name, it works.
#
# Needs python3 with venv, and dbus-daemon. Seen with dbus-daemon 1.14.10:
#   filter with sender 'com.example.Player': nothing within 2 s, though 1 signal arrived
#   filter without sender: 1 signal, whose sender is ':1.0'
set -eu
folder=$(mktemp -d)
trap 'kill "$bus" 2>/dev/null || :; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jeepney==0.9.0
dbus-daemon --version | head -n 1
dbus-daemon --session --nofork --nopidfile --address="unix:path=$folder/bus" --print-address >"$folder/address" &
bus=$!
while [ ! -s "$folder/address" ]; do kill -0 "$bus"; done
"$folder/venv/bin/python" - "unix:path=$folder/bus" <<'END'
import sys
from copy import copy

from jeepney import DBusAddress, MatchRule, new_signal
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

NAME = "com.example.Player"
player, listener = open_dbus_connection(sys.argv[1]), open_dbus_connection(sys.argv[1])
player.send_and_get_reply(message_bus.RequestName(NAME))
rule = MatchRule(type="signal", sender=NAME, interface="com.example.Track", member="Changed")
listener.send_and_get_reply(message_bus.AddMatch(rule))
play = lambda: player.send(new_signal(DBusAddress("/", interface="com.example.Track"), "Changed"))

with listener.filter(rule) as heard:
    arrived = []
    with listener.filter(MatchRule(type="signal", interface="com.example.Track"), queue=arrived):
        play()
        try:
            listener.recv_until_filtered(heard, timeout=2)
            sys.exit("changed: the filter with the well-known name has heard it")
        except TimeoutError:
            print(f"filter with sender {NAME!r}: nothing within 2 s, though {len(arrived)} signal arrived")
assert len(arrived) == 1

other = copy(rule)
other.header_fields = {key: value for key, value in rule.header_fields.items() if key != "sender"}
with listener.filter(other) as heard:
    play()
    signal = listener.recv_until_filtered(heard, timeout=2)
    sender = next(value for key, value in signal.header.fields.items() if key.name == "sender")
    print(f"filter without sender: 1 signal, whose sender is {sender!r}")
    assert sender == player.unique_name
END
