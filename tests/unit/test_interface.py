"""How an interface is declared."""

import pytest

from gpuswitch.api.interface import Interface, dbus_method, dbus_property, dbus_signal, wire_name
from gpuswitch.api.signatures import Str, UInt32, Values


class Lamp(Interface, name="org.example1.Lamp"):
    @dbus_property
    def light_colour(self) -> Str:
        """Red."""
        return "red"

    @dbus_method()
    def turn_on(self, seconds: UInt32, options: Values) -> Str:
        """Turn the lamp on."""
        return f"{seconds} {options}"

    @dbus_method()
    async def turn_off(self) -> Str:
        """Turn it off."""
        return "off"

    @dbus_signal
    def turned_on(self, by: Str, seconds: UInt32) -> None:
        """It is on."""


def test_members_have_the_names_and_types_of_their_declaration() -> None:
    assert {name: (each.signature, each.result) for name, each in Lamp.methods.items()} == {
        "TurnOn": ("ua{sv}", "s"),
        "TurnOff": ("", "s"),
    }
    assert {name: dict(each.arguments) for name, each in Lamp.signals.items()} == {
        "TurnedOn": {"by": "s", "seconds": "u"}
    }
    assert {name: each.signature for name, each in Lamp.properties.items()} == {"LightColour": "s"}


async def test_methods_and_properties_work_from_python() -> None:
    lamp = Lamp()
    assert lamp.turn_on(5, {}) == "5 {}"
    assert await lamp.turn_off() == "off"
    assert lamp.light_colour == "red"


def test_before_export_nobody_hears_a_signal() -> None:
    lamp = Lamp()
    lamp.turned_on("me", seconds=5)
    lamp.emit_properties_changed("LightColour")


def test_a_change_of_a_property_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError, match="LightColor"):
        Lamp().emit_properties_changed("LightColor")


def test_an_argument_needs_a_type() -> None:
    with pytest.raises(TypeError, match=r"dim: each argument needs a type of gpuswitch\.api\.signatures"):

        @dbus_method()
        def dim(self: Interface, percent) -> None:  # type: ignore[no-untyped-def] # this is what is tested
            """Dim the lamp."""


def test_a_plain_python_type_is_not_enough() -> None:
    with pytest.raises(TypeError, match="<class 'int'> has no D-Bus signature"):

        @dbus_signal
        def dimmed(self: Interface, percent: int) -> None:
            """It is darker."""


def test_python_names_become_bus_names() -> None:
    assert wire_name(Lamp.turn_on) == "TurnOn"
