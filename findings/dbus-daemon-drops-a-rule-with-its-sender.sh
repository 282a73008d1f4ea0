#!/bin/sh
# dbus-daemon 1.14.10: a match rule that names a unique name goes with that peer, if the peer had match rules of its own.
#
# One would think that a rule stays until who has added it takes it back. The bus drops those about a unique name that
# has left, of which nothing can come any more (rule_list_remove_by_connection in bus/signals.c); but it looks for them
# only where the one that leaves had rules, too (bus_connection_disconnected in bus/connection.c). So whether RemoveMatch
# works or fails with MatchRuleNotFound is up to what somebody else has subscribed to.
#
# Needs python3 with venv, and dbus-daemon. Seen with dbus-daemon 1.14.10 and jeepney 0.9.0:
#   a rule for a peer that had none and has left: removed
#   a rule for a peer that had one and has left: org.freedesktop.DBus.Error.MatchRuleNotFound
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

from jeepney import HeaderFields, MatchRule, MessageType
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

listener = open_dbus_connection(sys.argv[1])


def removed(subscribes: bool) -> str:
    peer = open_dbus_connection(sys.argv[1])
    if subscribes:
        peer.send_and_get_reply(message_bus.AddMatch(MatchRule(type="signal", interface="com.example.Track")))
    rule = MatchRule(type="signal", sender=peer.unique_name)
    listener.send_and_get_reply(message_bus.AddMatch(rule))
    peer.close()
    while listener.send_and_get_reply(message_bus.NameHasOwner(peer.unique_name)).body[0]:
        pass
    reply = listener.send_and_get_reply(message_bus.RemoveMatch(rule))
    return reply.header.fields[HeaderFields.error_name] if reply.header.message_type is MessageType.error else "removed"


said = []
for subscribes, what in ((False, "none"), (True, "one")):
    said.append(removed(subscribes))
    print(f"a rule for a peer that had {what} and has left: {said[-1]}")
assert said == ["removed", "org.freedesktop.DBus.Error.MatchRuleNotFound"], "changed"
END
