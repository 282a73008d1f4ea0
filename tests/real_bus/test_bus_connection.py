"""The defects of the D-Bus library's connection, each shown at the far end of the socket."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import jeepney
import pytest

from gpuswitch.api import connection, inbox
from gpuswitch.api.bus import Bus, BusError, BusLostError
from gpuswitch.api.connection import Message
from gpuswitch.api.interface import Interface, dbus_method, dbus_signal
from gpuswitch.api.serving import Caller
from gpuswitch.api.signatures import Str, UInt32
from tests.harness.service.peers import ScriptedBus, scripted_bus, until

PING = jeepney.DBusAddress("/", ":1.1", "org.freedesktop.DBus.Peer")


class Counter(Interface, name="org.example.Counter"):
    def __init__(self) -> None:
        self.counted = 0

    @dbus_method()
    def count(self) -> None:
        self.counted += 1

    @dbus_signal
    def filled(self, index: UInt32, text: Str) -> None:
        """A large signal."""


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[Bus, ScriptedBus]]:
    async with scripted_bus(folder) as (address, connections):
        connecting = asyncio.create_task(Bus.connect(address))
        far_end = await connections.get()
        await far_end.log_in()
        bus = await connecting
        yield bus, far_end
        await bus.close()
        far_end.writer.close()


def ping(member: str = "Ping") -> jeepney.Message:
    return jeepney.new_method_call(PING, member)


def reply_serial(message: jeepney.Message) -> object:
    return message.header.fields[jeepney.HeaderFields.reply_serial]


async def test_a_message_with_an_unknown_header_field_is_answered(tmp_path: Path) -> None:
    destination, unknown = b"\x06\x01s\x00", b"\xc8\x01s\x00"
    async with connected(tmp_path) as (_, far_end):
        far_end.write(ping().serialise(7).replace(destination, unknown), ping().serialise(8))
        assert reply_serial(await far_end.receive()) == 7


async def test_a_message_of_an_unknown_type_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(tmp_path) as (_, far_end):
        unknown = bytearray(ping().serialise(7))
        unknown[1] = 9
        far_end.write(bytes(unknown), ping().serialise(8))
        assert reply_serial(await far_end.receive()) == 8
        assert not caplog.records


@pytest.mark.parametrize("length", [0, 100_000])
async def test_a_message_that_cannot_be_read_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    message = jeepney.new_method_call(PING, "Ping", "s", ("x" * length,)).serialise(7)
    unreadable = message.replace(b"Ping", b"\xff" * 4)
    async with connected(tmp_path) as (_, far_end):
        far_end.write(unreadable, ping().serialise(8))
        assert reply_serial(await far_end.receive()) == 8
    assert "cannot read a message from the bus: it is dropped" in caplog.text


async def test_a_message_that_is_longer_inside_than_outside_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = jeepney.new_method_call(PING, "Ping", "s", ("x" * 5,)).serialise(7)
    async with connected(tmp_path) as (_, far_end):
        far_end.write(message.replace(b"\5\0\0\0xxxxx", b"\6\0\0\0xxxxx"), ping().serialise(8))
        assert reply_serial(await far_end.receive()) == 8
    assert "cannot read a message from the bus: it is dropped" in caplog.text


async def test_a_message_that_comes_byte_by_byte_is_answered(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, far_end):
        for byte in ping().serialise(7):
            far_end.write(bytes([byte]))
            await far_end.writer.drain()
        assert reply_serial(await far_end.receive()) == 7


async def test_bytes_that_are_no_message_end_the_connection(tmp_path: Path) -> None:
    async with connected(tmp_path) as (bus, far_end):
        far_end.write(b"HTTP/1.1 400 Bad Request\r\n")
        await bus.lost()


async def test_a_huge_call_is_refused_unread(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, far_end):
        huge = jeepney.new_method_call(PING, "Ping", "au", ([0] * 100_000,))
        far_end.send(huge, ping(), first_serial=7)
        refusal, answer = await far_end.receive(), await far_end.receive()
    assert refusal.header.fields[jeepney.HeaderFields.error_name] == "org.freedesktop.DBus.Error.LimitsExceeded"
    assert refusal.body == (f"cannot take a message of {len(huge.serialise(7))} bytes, only up to 65536",)
    assert (reply_serial(refusal), reply_serial(answer)) == (7, 8)


async def test_a_flood_leaves_the_loop_turns_for_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WORK_SECONDS", 0.0)
    counter = Counter()
    turns: list[int] = []
    loop = asyncio.get_running_loop()

    def note_turn() -> None:
        turns.append(counter.counted)
        if counter.counted < 400:
            loop.call_soon(note_turn)

    async with connected(tmp_path) as (bus, far_end):
        bus.export("/counter", counter)
        call = jeepney.new_method_call(jeepney.DBusAddress("/counter", ":1.1", "org.example.Counter"), "Count")
        call.header.flags |= jeepney.MessageFlag.no_reply_expected
        far_end.send(*[call] * 400, ping())
        note_turn()
        await far_end.receive()
    assert counter.counted == 400
    assert max(after - before for before, after in pairwise(turns)) == 1


async def test_what_comes_meanwhile_is_read_between_two_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So whoever had nothing waiting is before the next of those who had, in the same turn of the loop."""
    monkeypatch.setattr(connection, "WORK_SECONDS", 60.0)
    served: list[str] = []

    def note(who: str, sender: str) -> jeepney.Message:
        message = jeepney.new_method_call(jeepney.DBusAddress("/note", ":1.1", "org.example.Note"), "Note", "s", (who,))
        message.header.fields[jeepney.HeaderFields.sender] = sender
        return message

    class Note(Interface, name="org.example.Note"):
        @dbus_method()
        def note(self, who: Str) -> None:
            if not served:
                far_end.send(note("other", ":1.3"))
            served.append(who)

    async with connected(tmp_path) as (bus, far_end):
        bus.export("/note", Note())
        far_end.send(*[note("flood", ":1.2")] * 3)
        for _ in range(4):
            await far_end.receive()
    assert served == ["flood", "other", "flood", "flood"]


async def test_who_crowds_others_is_served_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the bus, which has more of it, gets a processor; everybody else is served at once."""
    monkeypatch.setattr(connection, "CROWD_SECONDS", 3600.0)
    monkeypatch.setattr(inbox, "MANY", 20)
    monkeypatch.setattr(inbox, "MOST_OF_ONE", 10)
    counter = Counter()
    call = jeepney.new_method_call(jeepney.DBusAddress("/counter", ":1.1", "org.example.Counter"), "Count")
    call.header.flags |= jeepney.MessageFlag.no_reply_expected
    async with connected(tmp_path) as (bus, far_end):
        bus.export("/counter", counter)
        flood = []
        for sender in (":1.2", ":1.3"):
            call.header.fields[jeepney.HeaderFields.sender] = sender
            flood += [call.serialise(serial) for serial in range(1, 13)]
        far_end.write(*flood)
        other = ping()
        other.header.fields[jeepney.HeaderFields.sender] = ":1.4"
        for serial in (100, 101):
            far_end.send(other, first_serial=serial)
            while (await far_end.receive()).header.fields.get(jeepney.HeaderFields.reply_serial) != serial:
                pass
        assert counter.counted == 1
        # Nor does a second call of theirs wait for the turns of those who crowd them.
        far_end.send(other, other, first_serial=102)
        while (await far_end.receive()).header.fields.get(jeepney.HeaderFields.reply_serial) != 103:
            pass
        assert counter.counted == 1


class Slow(Interface, name="org.example.Slow"):
    """A switch that ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.end = asyncio.Event(), asyncio.Event()

    @dbus_method(action="switch", outlives=True)
    async def switch(self) -> None:
        self.begun.set()
        await self.end.wait()


class Anybody:
    async def permit(self, _caller: Caller, _action: str, _about: Mapping[str, str]) -> None:
        """Everybody may."""


async def test_who_calls_is_asked_over_a_connection_that_nobody_calls(tmp_path: Path) -> None:
    """So answers are not behind all that waits for us, and that somebody has left may be heard before their call."""
    slow = Slow()
    switch = jeepney.new_method_call(jeepney.DBusAddress("/slow", ":1.1", "org.example.Slow"), "Switch")
    switch.header.fields[jeepney.HeaderFields.sender] = ":1.9"
    driver = jeepney.DBusAddress("/org/freedesktop/DBus", interface="org.freedesktop.DBus")
    left = jeepney.new_signal(driver, "NameOwnerChanged", "sss", (":1.9", ":1.9", ""))
    left.header.fields[jeepney.HeaderFields.sender] = "org.freedesktop.DBus"
    async with scripted_bus(tmp_path) as (address, connections):
        connecting = asyncio.create_task(Bus.connect(address))
        far_end = await connections.get()
        await far_end.log_in()
        bus = await connecting
        parting = asyncio.create_task(bus.ask_apart())
        apart = await connections.get()
        await apart.log_in()
        await parting
        bus.export("/slow", slow)
        bus.authorize_by(Anybody())
        far_end.send(switch, first_serial=7)
        await until(apart, "AddMatch")
        asked = await until(apart, "GetConnectionUnixUser")
        apart.answer(asked, "u", 1000)
        await slow.begun.wait()
        apart.send(left)
        await until(apart, "GetConnectionUnixProcessID")
        far_end.send(switch, first_serial=8)
        refused = await far_end.receive()
        slow.end.set()
        answered = await far_end.receive()
        assert (reply_serial(refused), reply_serial(answered)) == (8, 7)
        assert refused.body == ("cannot serve Switch: you have left the bus",)
        await apart.close()
        await bus.lost()
        await bus.close()
        await far_end.close()


class Teller(Interface, name="org.example.Teller"):
    def __init__(self) -> None:
        self.told = 0

    @dbus_method()
    def tell(self, size: UInt32) -> Str:
        self.told += 1
        return "x" * size


TELLER = jeepney.DBusAddress("/teller", ":1.1", "org.example.Teller")


def tell(size: int, sender: str) -> jeepney.Message:
    message = jeepney.new_method_call(TELLER, "Tell", "u", (size,))
    message.header.fields[jeepney.HeaderFields.sender] = sender
    return message


async def test_a_bus_that_reads_nothing_has_few_answers_in_front_of_the_next(tmp_path: Path) -> None:
    """Whoever asks while it is busy waits for these."""
    teller = Teller()
    async with connected(tmp_path) as (bus, far_end):
        bus.export("/teller", teller)
        far_end.writer.transport.pause_reading()  # type: ignore[attr-defined] # of this transport it is also a reader's
        far_end.send(*[tell(1000, ":1.2")] * 200)
        told = -1
        while told < teller.told:
            told = teller.told
            for _ in range(20):
                await asyncio.sleep(0)
        assert told < 12
        far_end.send(tell(1, ":1.3"), first_serial=1000)
        far_end.writer.transport.resume_reading()  # type: ignore[attr-defined] # as above
        answered = [reply_serial(await far_end.receive()) for _ in range(201)]
    assert answered.index(1000) < 16
    assert len(set(answered)) == 201


async def test_large_answers_are_for_those_who_do_not_crowd_others(tmp_path: Path) -> None:
    crowd = [tell(4000, f":1.{number}") for number in range(2, 22) for _ in range(inbox.MOST_OF_ONE)]
    last_of_crowd, quiet = len(crowd) - inbox.MOST_OF_ONE + 1, len(crowd) + 1
    async with connected(tmp_path) as (bus, far_end):
        bus.export("/teller", Teller())
        far_end.send(*crowd, tell(4000, ":1.99"))
        answers: dict[object, tuple[object, ...]] = {}
        while not answers.keys() >= {last_of_crowd, quiet}:
            message = await far_end.receive()
            if message.header.message_type is not jeepney.MessageType.method_call:  # else it asks whose calls these are
                answers[reply_serial(message)] = message.body
    assert answers[quiet] == ("x" * 4000,)
    assert answers[last_of_crowd] == ()


async def test_more_signals_than_the_socket_takes_arrive_in_order(tmp_path: Path) -> None:
    counter = Counter()
    async with connected(tmp_path) as (bus, far_end):
        bus.export("/counter", counter)
        for index in range(1000):
            counter.filled(index, "x" * 4000)
        assert [(await far_end.receive()).body[0] for _ in range(1000)] == list(range(1000))


async def test_a_bus_that_hangs_up_during_login_is_an_error(tmp_path: Path) -> None:
    async with scripted_bus(tmp_path) as (address, connections):
        connecting = asyncio.create_task(Bus.connect(address))
        far_end = await connections.get()
        await far_end.reader.readuntil(b"\r\n")
        far_end.writer.close()
        with pytest.raises(BusError, match=r"cannot connect .*: .* during (login|authentication)"):
            await connecting


async def test_a_bus_that_refuses_hello_is_an_error(tmp_path: Path) -> None:
    async with scripted_bus(tmp_path) as (address, connections):
        connecting = asyncio.create_task(Bus.connect(address))
        far_end = await connections.get()
        hello = await far_end.receive_hello()
        far_end.send(jeepney.new_error(hello, "org.freedesktop.DBus.Error.LimitsExceeded", "s", ("too many of you",)))
        with pytest.raises(BusError, match=r"cannot connect to the bus at .*: too many of you"):
            await connecting
        far_end.writer.close()


async def test_no_bus_at_an_address_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BusError, match=r"cannot connect to the bus at unix:path=.*/nothing: .*No such file"):
        await Bus.connect(f"unix:path={tmp_path}/nothing")


async def test_an_address_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(BusError, match="cannot connect to the bus at nonsense: "):
        await Bus.connect("nonsense")


async def test_the_loss_of_the_bus_is_told_and_ends_calls(tmp_path: Path) -> None:
    message = Message(destination="org.example", path="/", interface="org.example.A", member="B")
    async with connected(tmp_path) as (bus, far_end):
        calling = asyncio.create_task(bus.call(message, within=30))
        await far_end.receive()
        far_end.writer.close()
        await bus.lost()
        with pytest.raises(BusLostError, match="the connection to the bus was lost before the answer came"):
            await calling
        with pytest.raises(BusLostError, match="cannot call B: the connection to the bus is lost"):
            await bus.call(message, within=30)


async def test_a_lost_bus_takes_signals_and_closing_without_complaint(tmp_path: Path) -> None:
    counter = Counter()
    async with connected(tmp_path) as (bus, far_end):
        bus.export("/counter", counter)
        far_end.writer.close()
        await bus.lost()
        counter.filled(1, "nobody hears it")
        bus.unexport("/counter")


async def log_in_and_close(address: str, connections: "asyncio.Queue[ScriptedBus]") -> object:
    connecting = asyncio.create_task(Bus.connect(address))
    far_end = await connections.get()
    await far_end.log_in()
    bus = await connecting
    await bus.close()
    await far_end.close()
    return bus


async def log_in_and_lose(address: str, connections: "asyncio.Queue[ScriptedBus]") -> object:
    connecting = asyncio.create_task(Bus.connect(address))
    far_end = await connections.get()
    await far_end.log_in()
    bus = await connecting
    await far_end.close()
    await bus.lost()
    return bus


async def fail_to_log_in(address: str, connections: "asyncio.Queue[ScriptedBus]") -> object:
    connecting = asyncio.create_task(Bus.connect(address))
    far_end = await connections.get()
    await far_end.reader.readuntil(b"\r\n")
    far_end.writer.write(b"REJECTED EXTERNAL\r\n")
    with pytest.raises(BusError) as error:
        await connecting
    await far_end.close()
    return error


async def find_no_bus(address: str, _: "asyncio.Queue[ScriptedBus]") -> object:
    with pytest.raises(BusError) as error:
        await Bus.connect(address + "-not-there")
    return error


@pytest.mark.parametrize("ending", [log_in_and_close, log_in_and_lose, fail_to_log_in, find_no_bus])
async def test_sockets_are_closed_without_the_garbage_collector(
    tmp_path: Path, ending: Callable[[str, "asyncio.Queue[ScriptedBus]"], Awaitable[object]]
) -> None:
    gc.disable()
    try:
        async with scripted_bus(tmp_path) as (address, connections):
            kept = [await ending(address, connections)]
            before = open_descriptors()
            kept += [await ending(address, connections) for _ in range(5)]
            assert open_descriptors() == before
    finally:
        gc.enable()


def open_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())
