"""The name that the daemon takes on a real bus, and the calls that it makes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import jeepney
import pytest
from jeepney.io import blocking

from gpuswitch.api.bus import Bus, BusError, CallError
from gpuswitch.api.connection import Message, Variant
from gpuswitch.api.interface import Interface, dbus_method
from gpuswitch.api.signatures import Values
from gpuswitch.errors import Timeout
from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import Peer

OBJECT = "/org/example1"
INTERFACE = "org.example1.Called"


class Called(Interface, name=INTERFACE):
    @dbus_method()
    def show(self) -> Values:
        return {"pairs": Variant("a(ss)", [["a", "b"]]), "deep": {"number": 7}}

    @dbus_method()
    async def never_answer(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
async def other(private_bus: PrivateBus) -> AsyncIterator[Bus]:
    """Somebody to call."""
    other = await Bus.connect(private_bus.address)
    other.export(OBJECT, Called())
    yield other
    await other.close()


async def test_a_name_has_one_owner_and_no_queue(bus: Bus, other: Bus, peer: Peer) -> None:
    await bus.own("org.example1")
    with pytest.raises(BusError, match=r"cannot own org\.example1: another gpuswitchd owns it"):
        await other.own("org.example1")
    owners = await peer.call("org.freedesktop.DBus", "/", "org.freedesktop.DBus.ListQueuedOwners", "s", "org.example1")
    assert owners == [bus.name]


async def test_a_name_that_the_bus_refuses_is_an_error(bus: Bus) -> None:
    with pytest.raises(BusError, match=r"cannot own org\.freedesktop\.DBus: ."):
        await bus.own("org.freedesktop.DBus")


async def test_a_call_returns_plain_values(bus: Bus, other: Bus) -> None:
    [values] = await bus.call(Message(other.name, OBJECT, INTERFACE, "Show"), within=10)
    assert values == {"pairs": [["a", "b"]], "deep": {"number": 7}}


async def test_an_error_answer_is_raised_with_its_name(bus: Bus) -> None:
    with pytest.raises(CallError) as error:
        await bus.call(Message("org.example.Nobody", "/", "org.example.A", "B"), within=10)
    assert error.value.remote_name == "org.freedesktop.DBus.Error.ServiceUnknown"


async def test_a_call_without_an_answer_ends_and_leaves_nothing(bus: Bus, other: Bus) -> None:
    message = Message(other.name, OBJECT, INTERFACE, "NeverAnswer")
    with pytest.raises(Timeout, match=f"{other.name} did not answer NeverAnswer within 0.01 s"):
        await bus.call(message, within=0.01)
    cancelled = asyncio.create_task(bus.call(message, within=30))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert bus._calls == {}
    assert bus._connection._method_return_handlers == {}


async def test_nothing_is_remembered_of_whom_we_called(bus: Bus, private_bus: PrivateBus) -> None:
    for _ in range(3):
        short_lived = await Bus.connect(private_bus.address)
        await bus.call(Message(short_lived.name, "/", "org.freedesktop.DBus.Peer", "Ping"), within=10)
        await short_lived.close()
    assert bus._connection._name_owners == {}


async def test_descriptors_that_a_peer_sends_do_not_reach_us(bus: Bus, private_bus: PrivateBus) -> None:
    before = open_descriptors()
    await asyncio.to_thread(send_descriptors, private_bus.address, bus.name)
    assert open_descriptors() == before


async def test_the_loss_of_a_real_bus_is_told(bus: Bus, private_bus: PrivateBus) -> None:
    private_bus.stop()
    await bus.lost()


def send_descriptors(address: str, name: str) -> None:
    """Send calls with a descriptor each, then wait until all have been looked at."""
    to = jeepney.DBusAddress("/", name, "org.freedesktop.DBus.Peer")
    with blocking.open_dbus_connection(address, enable_fds=True) as sender, Path("/dev/null").open() as file:
        for _ in range(10):
            call = jeepney.new_method_call(to, "Ping", "h", (file,))
            call.header.flags |= jeepney.MessageFlag.no_reply_expected
            sender.send(call)
        sender.send_and_get_reply(jeepney.new_method_call(to, "Ping"))


def open_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())
