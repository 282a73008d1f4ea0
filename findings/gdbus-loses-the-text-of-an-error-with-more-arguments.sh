#!/bin/sh
# GLib 2.74.6: the text of a D-Bus error is thrown away where the error has another argument beside it.
#
# "If the first argument exists and is a string, it is an error message" (D-Bus specification, Message Types). libdbus and
# sd-bus read it like that, whatever follows. GDBus takes the text only of a body that is exactly "(s)"
# (g_dbus_message_to_gerror in gdbusmessage.c), and says of which type the body is instead. So data for programs that a
# service adds to its errors costs every GLib client the sentence for people.
#
# Needs python3 with venv, dbus-daemon, and the packages libglib2.0-bin, systemd and dbus-bin. Seen with gdbus 2.74.6:
#   gdbus, (s): GDBus.Error:com.example.Full: the disk is full
#   gdbus, (sas): GDBus.Error:com.example.Full: Error return with body of type “(sas)”
#   busctl, (sas): Call failed: the disk is full
#   dbus-send, (sas): Error com.example.Full: the disk is full
set -eu
folder=$(mktemp -d)
trap 'kill $service $bus 2>/dev/null || :; rm -rf "$folder"' EXIT
service= bus=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jeepney==0.9.0
printf 'gdbus '
dpkg-query -W -f '${Version}\n' libglib2.0-bin
dbus-daemon --session --nofork --nopidfile --address="unix:path=$folder/bus" --print-address >"$folder/address" &
bus=$!
while [ ! -s "$folder/address" ]; do kill -0 "$bus"; done
export DBUS_SESSION_BUS_ADDRESS="unix:path=$folder/bus" LC_ALL=C.UTF-8
"$folder/venv/bin/python" - "$DBUS_SESSION_BUS_ADDRESS" "$folder/ready" <<'END' &
import sys
from pathlib import Path

from jeepney import HeaderFields, MessageType, new_error
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

connection = open_dbus_connection(sys.argv[1])
connection.send_and_get_reply(message_bus.RequestName("com.example"))
Path(sys.argv[2]).touch()
while True:
    call = connection.receive()
    if call.header.message_type is MessageType.method_call:
        more = call.header.fields[HeaderFields.member] == "More"
        body = ("the disk is full", ["sda1"]) if more else ("the disk is full",)
        connection.send(new_error(call, "com.example.Full", "sas" if more else "s", body))
END
service=$!
while [ ! -e "$folder/ready" ]; do kill -0 "$service"; done

# call PROGRAM MEMBER: the last line that it says of the error
call() {
    case $1 in
    gdbus) gdbus call --session --dest com.example --object-path / --method com.example.Disk."$2" ;;
    busctl) busctl --user call com.example / com.example.Disk "$2" ;;
    dbus-send) dbus-send --session --print-reply --dest=com.example / com.example.Disk."$2" ;;
    esac 2>&1 | sed 's/^Error: //; s/: $//' | tail -n 1
}

# expect PROGRAM MEMBER TYPES TEXT
expect() {
    said=$(call "$1" "$2")
    echo "$1, $3: $said"
    case $said in
    *"$4"*) ;;
    *) echo "changed: it does not say '$4'" >&2 && exit 1 ;;
    esac
}

expect gdbus One '(s)' 'the disk is full'
expect gdbus More '(sas)' 'Error return with body of type'
expect busctl More '(sas)' 'the disk is full'
expect dbus-send More '(sas)' 'the disk is full'
