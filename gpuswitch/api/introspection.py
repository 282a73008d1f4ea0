"""What Introspect says of an object: its interfaces, with a sentence for each member, and the names of those below it.

The format is the specification's ("Introspection Data Format"); sentences stand in the annotation that GLib's tools
write and show, `org.gtk.GDBus.DocString`.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping

from gpuswitch.api.interface import Interface, Member, Property, documentation

_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_TEXT = "org.gtk.GDBus.DocString"
_ACTION = "org.gpuswitch1.Action"
"""What a caller has to be allowed to do, of polkit's actions below `org.gpuswitch1.`; none: it is for everyone."""
_EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"


def document(interfaces: Iterable[type[Interface]], children: Iterable[str] = (), name: str = "") -> str:
    """The whole answer: an object of this name (none is needed) with these interfaces, and the objects below it."""
    node = ET.Element("node", {"name": name} if name else {})
    node.extend(map(_interface, interfaces))
    for child in children:
        ET.SubElement(node, "node", {"name": child})
    ET.indent(node)
    return f"{_DOCTYPE}{ET.tostring(node, encoding='unicode')}\n"


def _interface(interface: type[Interface]) -> ET.Element:
    element = ET.Element("interface", {"name": interface.dbus_name})
    _annotate(element, _TEXT, documentation(interface))
    element.extend(_method(member) for member in interface.methods.values())
    element.extend(_signal(member) for member in interface.signals.values())
    element.extend(_property(each) for each in interface.properties.values())
    return element


def _method(member: Member) -> ET.Element:
    element = ET.Element("method", {"name": member.name})
    _annotate(element, _TEXT, member.documentation)
    _annotate(element, _ACTION, member.action)
    _arguments(element, member.arguments, "in")
    if member.result:
        _arguments(element, {member.returns: member.result}, "out")
    return element


def _signal(member: Member) -> ET.Element:
    element = ET.Element("signal", {"name": member.name})
    _annotate(element, _TEXT, member.documentation)
    _arguments(element, member.arguments)
    return element


def _property(each: Property[object]) -> ET.Element:
    element = ET.Element("property", {"name": each.name, "type": each.signature, "access": "read"})
    _annotate(element, _TEXT, each.documentation)
    _annotate(element, _EMITS, "const" if each.constant else "true")
    return element


def _arguments(element: ET.Element, arguments: Mapping[str, str], direction: str = "") -> None:
    for name, signature in arguments.items():
        about = {"name": name, "type": signature, "direction": direction}
        ET.SubElement(element, "arg", {key: value for key, value in about.items() if value})


def _annotate(element: ET.Element, name: str, value: str) -> None:
    if value:
        ET.SubElement(element, "annotation", {"name": name, "value": value})
