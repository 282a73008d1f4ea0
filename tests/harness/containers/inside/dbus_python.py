"""What a program on dbus-python sees of the service: `dbus_python.py PATH`, by the client of python-dbusmock.

PATH is the object of a GPU. Says a line of JSON for each thing: its state; the interfaces that introspection shows; of
the GPU and of the manager what could not be read as it is described, property by property, and what the methods without
arguments are; that a switch to vfio has ended, as a signal says, and the state that PropertiesChanged has told last;
and the error of a call that is refused.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from xml.etree import ElementTree as ET

import dbus
import dbus.lowlevel
import dbus.mainloop.glib
from dbusmock import DBusTestCase
from gi.repository import GLib

NAME = "org.gpuswitch1"
ROOT = "/org/gpuswitch1"
GPU = f"{NAME}.Gpu"


def say(thing: object) -> None:
    print(json.dumps(thing), flush=True)  # noqa: T201 -- its output


def read(thing: Any) -> tuple[list[str], list[str]]:
    """What is not as it is described, and the methods that were called."""
    odd: list[str] = []
    called: list[str] = []
    described = ET.fromstring(thing.Introspect(dbus_interface=dbus.INTROSPECTABLE_IFACE))  # noqa: S314 -- as above
    for interface in described.findall("interface"):
        name = interface.attrib["name"]
        types = {each.attrib["name"]: each.attrib["type"] for each in interface.findall("property")}
        values = thing.GetAll(name, dbus_interface=dbus.PROPERTIES_IFACE) if types else {}
        odd += [f"{name}.{each}" for each in types.keys() ^ values.keys()]
        for each, type_ in types.items():
            value = thing.Get(name, each, dbus_interface=dbus.PROPERTIES_IFACE)
            # packed anew as the type that is described: what does not fit it raises
            dbus.lowlevel.SignalMessage("/", NAME, "Said").append(value, signature=type_)
            odd += [] if value == values[each] else [f"{name}.{each}: {value} and {values[each]}"]
        for method in interface.findall("method"):
            if not method.findall("arg[@direction='in']"):
                thing.get_dbus_method(method.attrib["name"], name)()
                called.append(method.attrib["name"])
    return sorted(odd), sorted(called)


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
    say(read(gpu))
    say(read(DBusTestCase.get_dbus(system_bus=True).get_object(NAME, ROOT)))
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
