"""An object for peers to call, which uses what they send as the service does."""

from gpuswitch.api.interface import Interface, dbus_constant, dbus_method, dbus_property
from gpuswitch.api.options import options_of
from gpuswitch.api.signatures import Int64, Str, StrArray, Values


class Example(Interface, name="org.example.Gpu"):
    """Methods of each sort: that answer at once or later, for everyone or not."""

    @dbus_constant
    def address(self) -> Str:
        return "0000:01:00.0"

    @dbus_property
    def since(self) -> Int64:
        return 1

    @dbus_method(returns="options")
    def plan(self, options: Values) -> Str:
        return str(options_of(options))

    @dbus_method(returns="id", action="switch", outlives=True)
    async def to_vfio(self, options: Values) -> Str:
        return str(options_of(options))

    @dbus_method(action="vm")
    def acquire_for_vm(self, name: Str, uuid: Str, functions: StrArray) -> None:
        """Takes it for granted that the signature is right."""
        "".join((name, uuid, *functions))
