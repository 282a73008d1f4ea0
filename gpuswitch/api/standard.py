"""The interfaces that the D-Bus specification gives to every object: Peer, Introspectable, Properties, ObjectManager.

See "Standard Interfaces" there. They read the tree of objects that `Bus` keeps.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

from gpuswitch.api.connection import Variant
from gpuswitch.api.interface import Interface, dbus_method, dbus_signal
from gpuswitch.api.introspection import document
from gpuswitch.api.signatures import ObjectPath, Signature, Str, StrArray, Value, Values, plain

Interfaces = Mapping[str, Interface]
"""The interfaces of an object by name."""
Tree = Mapping[str, Interfaces]
"""The exported objects by path."""
InterfaceValues = Annotated[dict[str, dict[str, Variant]], Signature("a{sa{sv}}")]
ObjectValues = Annotated[dict[str, dict[str, dict[str, Variant]]], Signature("a{oa{sa{sv}}}")]


class StandardError(Exception):
    """An error that D-Bus has a name for: `org.freedesktop.DBus.Error.` and `name`."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.dbus_name = f"org.freedesktop.DBus.Error.{name}"


class Peer(Interface, name="org.freedesktop.DBus.Peer"):
    """Whether somebody is there."""

    def __init__(self, machine_id: Callable[[], Awaitable[str]]) -> None:
        self._machine_id = machine_id

    @dbus_method()
    def ping(self) -> None:
        """An answer is all that is asked for."""

    @dbus_method(returns="machine_uuid")
    async def get_machine_id(self) -> Str:
        """The id of the machine that the service runs on."""
        return await self._machine_id()


class Introspectable(Interface, name="org.freedesktop.DBus.Introspectable"):
    """What an object can do, and the names of those below it."""

    def __init__(self, tree: Tree, path: str) -> None:
        self._tree = tree
        self._object = path

    @dbus_method(returns="xml_data")
    def introspect(self) -> Str:
        """This text."""
        interfaces = self._tree.get(self._object, {})
        depth = len(self._object.rstrip("/")) + 1
        children = sorted({path[depth:].split("/")[0] for path in below(self._tree, self._object)})
        return document(map(type, interfaces.values()), children, self._object)


class Properties(Interface, name="org.freedesktop.DBus.Properties"):
    """The properties of all interfaces of one object."""

    def __init__(self, interfaces: Interfaces) -> None:
        self._interfaces = interfaces

    @dbus_method(returns="value")
    def get(self, interface: Str, name: Str) -> Value:
        """The value of one property."""
        found = self._find(interface)
        if name not in found.properties:
            raise StandardError("UnknownProperty", f"{interface} has no property {name}")
        return found.properties[name].read(found)

    @dbus_method(returns="properties")
    def get_all(self, interface: Str) -> Values:
        """The values of all properties of an interface."""
        found = self._find(interface)
        values, _ = found.read_properties(found.properties)
        return {**values}

    @dbus_method()
    def set(self, interface: Str, name: Str, value: Value) -> None:
        """Refused: all properties are read only."""
        now = plain(self.get(interface, name))
        raise StandardError("PropertyReadOnly", f"cannot set {interface}.{name} to {value}: it is {now} and read only")

    @dbus_signal
    def properties_changed(self, interface: Str, changed: Values, invalidated: StrArray) -> None:
        """Some properties have other values now."""

    def _find(self, interface: str) -> Interface:
        if interface not in self._interfaces:
            raise StandardError("UnknownInterface", f"there is no interface {interface} here")
        return self._interfaces[interface]


class ObjectManager(Interface, name="org.freedesktop.DBus.ObjectManager"):
    """Tells of all objects below its own."""

    def __init__(self, tree: Tree, path: str) -> None:
        self._tree = tree
        self._object = path

    @dbus_method(returns="objects")
    def get_managed_objects(self) -> ObjectValues:
        """All objects below this one, with their interfaces and properties."""
        return {path: interface_values(self._tree[path]) for path in below(self._tree, self._object)}

    @dbus_signal
    def interfaces_added(self, path: ObjectPath, interfaces: InterfaceValues) -> None:
        """An object has come."""

    @dbus_signal
    def interfaces_removed(self, path: ObjectPath, interfaces: StrArray) -> None:
        """An object has gone."""


def told(interfaces: Interfaces) -> dict[str, Interface]:
    """The interfaces that an ObjectManager speaks of: all but those that every object has."""
    return {name: each for name, each in interfaces.items() if not name.startswith("org.freedesktop.DBus.")}


def interface_values(interfaces: Interfaces) -> dict[str, dict[str, Variant]]:
    return {name: each.read_properties(each.properties)[0] for name, each in told(interfaces).items()}


def below(tree: Tree, root: str) -> list[str]:
    """The paths of all objects under `root`, itself not among them."""
    return [path for path in tree if is_below(path, root)]


def is_below(path: str, root: str) -> bool:
    return path != root and path.startswith(root.rstrip("/") + "/")
