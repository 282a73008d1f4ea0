#!/bin/sh
# cockpit-bridge 287 (in C) and 337 (in Python): what a page watches is not read anew when its service was started anew.
#
# Cockpit's guide says of a service that exits and is restarted that "clients continue to talk to it", and of a proxy that its
# properties "update their values as the DBus property values change" (cockpit-dbus.adoc). Calls go on, and so do signals. But of
# what it has told of the properties the bridge takes nothing back when the service goes, and tells nothing when it returns:
# there is an "owner" message, and a proxy keeps the values of a service that is gone until the new one changes each of them.
# So a page subscribes to "owner", and reads all anew at each one.
#
# Three things that the guide leaves open, the same with both:
# - A value in a variant is {"t": type, "v": value} in signals and answers. In a `notify`, on which proxies live, that is taken off
#   once: in an a{sv} it is there still. Who reads both takes it off himself.
# - A number of 64 bits is written whole. JSON.parse rounds it in the browser, beyond 2^53.
# - A property that is announced without its value (invalidated) is read by the bridge, and told with those that had one.
#
# Needs dbus-daemon, and the packages cockpit-bridge, python3-dbus, python3-gi and dbus-bin. Seen with 287.1 and 337:
#   watched: {"Label": "first", "More": {"depth": {"t": "i", "v": 3}}, "Size": 9007199254740993}
#   a signal: [{"depth": {"t": "i", "v": 3}}]
#   changed, one of them without its value: {"Label": "changed", "Size": 9007199254740995}
#   an answer: [{"t": "x", "v": 9007199254740995}]
#   it is gone: owner
#   it is back, with other values: owner
set -eu
folder=$(mktemp -d)
trap 'kill $service $bus 2>/dev/null || :; rm -rf "$folder"' EXIT
service= bus=
dpkg-query -W -f 'cockpit-bridge ${Version}\n' cockpit-bridge
dbus-daemon --session --nofork --nopidfile --address="unix:path=$folder/bus" --print-address >"$folder/address" &
bus=$!
while [ ! -s "$folder/address" ]; do kill -0 "$bus"; done
export DBUS_SESSION_BUS_ADDRESS="unix:path=$folder/bus" HOME="$folder" XDG_RUNTIME_DIR="$folder"
cat >"$folder/service.py" <<'END'
import sys

import dbus
import dbus.service
from dbus.mainloop.glib import DBusGMainLoop
from gi.repository import GLib

DISK, PROPERTIES = "com.example.Disk", "org.freedesktop.DBus.Properties"
XML = """<node><interface name="com.example.Disk"><method name="Change"/><signal name="Told"><arg type="a{sv}"/></signal>
<property name="Size" type="x" access="read"/><property name="Label" type="s" access="read"/>
<property name="More" type="a{sv}" access="read"/></interface></node>"""


class Disk(dbus.service.Object):
    values = {
        "Size": dbus.Int64(2**53 + 1, variant_level=1),
        "Label": sys.argv[1],
        "More": dbus.Dictionary({"depth": dbus.Int32(3, variant_level=1)}, signature="sv", variant_level=1),
    }

    @dbus.service.method("org.freedesktop.DBus.Introspectable", out_signature="s")
    def Introspect(self):
        return XML

    @dbus.service.method(PROPERTIES, in_signature="s", out_signature="a{sv}")
    def GetAll(self, interface):
        return self.values

    @dbus.service.method(PROPERTIES, in_signature="ss", out_signature="v")
    def Get(self, interface, name):
        return self.values[name]

    @dbus.service.method(DISK)
    def Change(self):
        self.values["Size"] = dbus.Int64(2**53 + 3, variant_level=1)
        self.Told(self.values["More"])
        self.PropertiesChanged(DISK, {"Label": "changed"}, ["Size"])

    @dbus.service.signal(DISK, signature="a{sv}")
    def Told(self, more):
        pass

    @dbus.service.signal(PROPERTIES, signature="sa{sv}as")
    def PropertiesChanged(self, interface, changed, invalidated):
        pass


DBusGMainLoop(set_as_default=True)
bus = dbus.SessionBus()
disk = Disk(bus, "/disk")
name = dbus.service.BusName("com.example", bus)
GLib.MainLoop().run()
END
cat >"$folder/page.py" <<'END'
import json
import subprocess
import sys

folder = sys.argv[1]
DISK, PROPERTIES = "com.example.Disk", "org.freedesktop.DBus.Properties"
DEPTH = {"t": "i", "v": 3}


def service(label):
    process = subprocess.Popen([sys.executable, f"{folder}/service.py", label])
    ask = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/", "org.freedesktop.DBus.NameHasOwner"]
    while b"true" not in subprocess.run([*ask, "string:com.example"], capture_output=True).stdout:
        if process.poll() is not None:
            sys.exit("the service has ended: it needs python3-dbus and python3-gi")
    return process


def send(channel, message):
    data = f"{channel}\n{json.dumps(message)}".encode()
    bridge.stdin.write(f"{len(data)}\n".encode() + data)
    bridge.stdin.flush()


def until(key):
    """All messages of the channel up to the one with this key."""
    seen = []
    while True:
        size = int(bridge.stdout.readline())
        channel, _, text = bridge.stdout.read(size).decode().partition("\n")
        message = json.loads(text)
        if channel == "page" and "command" not in message:
            seen.append(message)
            if key in message or message.get("id") == key:
                return seen


def settled(name):
    """All messages until the bridge has had more than enough turns to say what it has to."""
    seen = []
    for turn in range(100):
        send("page", {"call": ["/disk", PROPERTIES, "Get", ["com.example.Disk", name]], "type": "ss", "id": f"turn {turn}"})
        seen += until(f"turn {turn}")
    return seen


def disks(messages):
    """What they tell of the properties."""
    return [each["notify"]["/disk"][DISK] for each in messages if "notify" in each]


def kinds(messages):
    return " ".join(kind for each in messages for kind in ("notify", "signal", "owner") if kind in each)


def expect(what, seen, wanted):
    print(f"{what}:", seen if isinstance(seen, str) else json.dumps(seen, sort_keys=True))
    if seen != wanted:
        sys.exit(f"changed: it was {wanted}")


bridge = subprocess.Popen(["cockpit-bridge"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
first = service("first")
send("", {"command": "init", "version": 1, "host": "localhost"})
send("", {"command": "open", "channel": "page", "payload": "dbus-json3", "bus": "session", "name": "com.example"})
send("page", {"add-match": {"path": "/disk", "interface": "com.example.Disk"}})
send("page", {"watch": {"path": "/disk", "interface": "com.example.Disk"}, "id": "watched"})
[values] = [each for each in disks(until("watched")) if each]
expect("watched", values, {"Label": "first", "More": {"depth": DEPTH}, "Size": 2**53 + 1})
send("page", {"call": ["/disk", DISK, "Change", []], "type": "", "id": "called"})
seen = until("called") + settled("Size")
[signal] = [each["signal"] for each in seen if "signal" in each]
expect("a signal", signal[3], [{"depth": DEPTH}])
[values] = disks(seen)
expect("changed, one of them without its value", values, {"Label": "changed", "Size": 2**53 + 3})
expect("an answer", seen[-1]["reply"][0], [{"t": "x", "v": 2**53 + 3}])
first.kill()
first.wait()
expect("it is gone", kinds(until("owner")), "owner")
second = service("second")
expect("it is back, with other values", kinds(until("owner") + settled("Label")), "owner")
second.kill()
bridge.kill()
END
python3 "$folder/page.py" "$folder"
