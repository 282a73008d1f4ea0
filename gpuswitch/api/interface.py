"""D-Bus interfaces as Python classes.

    class Gpu(Interface, name="org.gpuswitch1.Gpu"):
        @dbus_property
        def state(self) -> Str:
            return self._gpu.state

        @dbus_method(returns="id", action="switch", outlives=True)
        async def to_vfio(self, options: Values) -> Str:
            "Start a switch; gives its id."

        @dbus_signal
        def step_changed(self, switch: Str, index: UInt32) -> None:
            "A step has begun or ended."

On the bus, `to_vfio` is `ToVfio`. A method may be `async`. A property is read only, and its getter must not ask who
is calling, since it is also read for signals. To call a signal is to send it; the body of its declaration never runs.
What the docstrings say is what introspection tells (`gpuswitch.api.introspection`).
The annotations are needed at run time: such a module has no `from __future__ import annotations`, nor imports them for
type checkers only.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Self, TypeVar, get_type_hints, overload

from gpuswitch.api.connection import Connection, Variant
from gpuswitch.api.signatures import pack, signature_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])
AnyInterface = TypeVar("AnyInterface", bound="Interface")


@dataclass(frozen=True)
class Member:
    """A method or a signal: the signature of each argument by its name, and of the result ("": none).

    `returns` names the result. `action` is what its caller has to be allowed to do ("": nothing, it is for everyone).
    `outlives`: once allowed, the call goes on also where its caller has left the bus.
    """

    name: str
    arguments: Mapping[str, str]
    result: str
    function: Callable[..., Any]
    returns: str = ""
    action: str = ""
    outlives: bool = False

    @property
    def documentation(self) -> str:
        return documentation(self.function)

    @property
    def waits(self) -> bool:
        """Whether its answer may take a while."""
        return inspect.iscoroutinefunction(self.function)

    @property
    def signature(self) -> str:
        return "".join(self.arguments.values())


class Property(Generic[T]):
    """A property: on the class this object, on an instance the value. `constant`: it never changes."""

    def __init__(self, getter: Callable[[Any], T], *, constant: bool = False) -> None:
        self.name = wire_name(getter)
        self.constant = constant
        self.signature = signature_of(get_type_hints(getter, include_extras=True)["return"])
        self.__doc__ = getter.__doc__
        self._getter = getter

    @overload
    def __get__(self, interface: None, owner: type) -> Self: ...
    @overload
    def __get__(self, interface: "Interface", owner: type) -> T: ...
    def __get__(self, interface: "Interface | None", owner: type) -> Self | T:
        return self if interface is None else self._getter(interface)

    def read(self, interface: "Interface") -> Variant:
        """The value on `interface` as it goes to the bus. Raises what the getter raises."""
        return Variant(self.signature, pack(self.signature, self._getter(interface)))

    @property
    def documentation(self) -> str:
        return documentation(self._getter)


def dbus_property(getter: Callable[[Any], T]) -> Property[T]:
    """Make `getter` a read-only D-Bus property of the type that it is annotated with."""
    return Property(getter)


def dbus_constant(getter: Callable[[Any], T]) -> Property[T]:
    """The same, of a value that never changes."""
    return Property(getter, constant=True)


def dbus_method(*, returns: str = "", action: str = "", outlives: bool = False) -> Callable[[Function], Function]:
    """Make a function a D-Bus method; see `Member`. From Python it stays the function that it is."""

    def declare(function: Function) -> Function:
        vars(function)["dbus_method"] = _member(function, returns=returns, action=action, outlives=outlives)
        return function

    return declare


def dbus_signal(
    declaration: Callable[Concatenate[AnyInterface, P], None],
) -> Callable[Concatenate[AnyInterface, P], None]:
    """Make `declaration` a D-Bus signal: calling it sends the arguments. Before export there is nobody to hear it."""
    member = _member(declaration)
    names = tuple(member.arguments)

    @wraps(declaration)
    def send(interface: AnyInterface, /, *args: P.args, **kwargs: P.kwargs) -> None:
        named = (kwargs[name] for name in names[len(args) :])
        interface.emit(member, [*args, *named])

    vars(send)["dbus_signal"] = member
    return send


def wire_name(function: Callable[..., Any]) -> str:
    """`to_vfio` → `ToVfio`."""
    return "".join(word.capitalize() for word in function.__name__.split("_"))


def documentation(function: Callable[..., Any]) -> str:
    """Its docstring, each paragraph on a line."""
    text = inspect.getdoc(function) or ""
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _member(function: Callable[..., Any], *, returns: str = "", action: str = "", outlives: bool = False) -> Member:
    hints = get_type_hints(function, include_extras=True)
    result = signature_of(hints.pop("return", None))
    arguments = {name: signature_of(hints.get(name)) for name in list(inspect.signature(function).parameters)[1:]}
    if "" in arguments.values():
        raise TypeError(f"{function.__qualname__}: each argument needs a type of gpuswitch.api.signatures")
    return Member(wire_name(function), arguments, result, function, returns, action, outlives)


class Interface:
    """One interface of one object. It belongs to no object until `Bus.export` attaches it."""

    dbus_name: ClassVar[str]
    methods: ClassVar[Mapping[str, Member]]
    signals: ClassVar[Mapping[str, Member]]
    properties: ClassVar[Mapping[str, Property[Any]]]

    _connection: Connection | None = None
    _path: str = ""

    def __init_subclass__(cls, *, name: str) -> None:
        members = list(vars(cls).values())
        cls.dbus_name = name
        cls.methods = _marked(members, "dbus_method")
        cls.signals = _marked(members, "dbus_signal")
        cls.properties = {m.name: m for m in members if isinstance(m, Property)}

    def actions(self, method: Member, arguments: Sequence[object]) -> Sequence[str]:  # noqa: ARG002 -- for who overrides it
        """What a caller of this method, with these arguments, has to be allowed to do. Raises as the method does."""
        return [method.action] if method.action else []

    def about(self, method: Member, arguments: Sequence[object]) -> Mapping[str, str]:  # noqa: ARG002 -- as above
        """What whoever allows it should know, by name (`$(gpu)` in the messages of the policy)."""
        return {}

    def attach(self, connection: Connection, path: str) -> None:
        """Called on export. Raises ValueError if it already belongs to an object."""
        if self._connection is not None:
            raise ValueError(f"cannot export {self.dbus_name} at {path}: it is exported at {self._path}")
        self._connection, self._path = connection, path

    def detach(self) -> None:
        self._connection = None

    def emit(self, signal: Member, body: list[object]) -> None:
        """Send `signal`. Raises TypeError or ValueError if `body` does not fit it; nothing once the bus is lost."""
        if self._connection is not None:
            packed = [pack(type_, value) for type_, value in zip(signal.arguments.values(), body, strict=True)]
            self._connection.emit(self._path, self.dbus_name, signal.name, signal.signature, packed)

    def emit_properties_changed(self, *names: str) -> None:
        """Send PropertiesChanged with what the getters say now. Raises KeyError for a name that is no property."""
        values, unreadable = self.read_properties(names)
        if self._connection is not None:
            self._connection.emit(
                self._path, "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as",
                [self.dbus_name, values, unreadable],
            )  # fmt: skip

    def read_properties(self, names: Iterable[str]) -> tuple[dict[str, Variant], list[str]]:
        """Values by name, and the names of those whose getter failed. Raises KeyError for a name that is no property.

        D-Bus cannot say "this one failed" among many values: such a property is logged and left out, so that the
        others can still be told.
        """
        values: dict[str, Variant] = {}
        unreadable: list[str] = []
        for property_ in [self.properties[name] for name in names]:
            try:
                values[property_.name] = property_.read(self)
            except Exception:
                logger.exception("cannot read %s.%s of %s", self.dbus_name, property_.name, self._path)
                unreadable.append(property_.name)
        return values, unreadable


def _marked(members: Iterable[object], mark: str) -> dict[str, Member]:
    marks: list[Member] = [vars(each)[mark] for each in members if mark in getattr(each, "__dict__", ())]
    return {member.name: member for member in marks}
