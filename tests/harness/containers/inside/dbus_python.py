"""What a program on dbus-python sees of the service: `dbus_python.py PATH`, by the client of python-dbusmock.

PATH is the object of a GPU. Says a line of JSON for each thing: its state; the interfaces that introspection shows;
that a switch to vfio has ended, as a signal says, and the state that PropertiesChanged has told last; and the error of
a call that is refused.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from xml.etree import ElementTree as ET

import dbus
import dbus.mainloop.glib
from dbusmock import DBusTestCase
from gi.repository import GLib

NAME = "org.gpuswitch1"
GPU = f"{NAME}.Gpu"


def say(thing: object) -> None:
    print(json.dumps(thing), flush=True)  # noqa: T201 -- its output


def main() -> None:
    dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
    loop = GLib.MainLoop()
    ended: list[tuple[str, str]] = []
    states: list[str] = []

    def changed(_: str, values: dict[str, Any], __: list[str]) -> None:
        states.extend(values[name] for name in values if name == "State")

    def finished(switch: str, result: str, _: str) -> None:
        ended.append((switch, result))
        loop.quit()

    gpu = DBusTestCase.get_dbus(system_bus=True).get_object(NAME, sys.argv[1])
    say(gpu.Get(GPU, "State", dbus_interface=dbus.PROPERTIES_IFACE))
    found = ET.fromstring(gpu.Introspect(dbus_interface=dbus.INTROSPECTABLE_IFACE))  # noqa: S314 -- of our service
    say(sorted(each.attrib["name"] for each in found.findall("interface")))
    gpu.connect_to_signal("PropertiesChanged", changed, dbus.PROPERTIES_IFACE)
    gpu.connect_to_signal("SwitchFinished", finished, GPU)
    switch = gpu.ToVfio({}, dbus_interface=GPU)
    loop.run()
    say([ended == [(switch, "done")], states[-1]])
    try:
        gpu.Plan("mars", {}, dbus_interface=GPU)
    except dbus.DBusException as error:
        say([error.get_dbus_name(), error.get_dbus_message()])


if __name__ == "__main__":
    main()
