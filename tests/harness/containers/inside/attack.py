"""An unprivileged peer that means ill: `attack.py WHAT COUNT SEED [STOP]`, on the system bus.

    messages      COUNT messages: malformed, truncated, oversized, random, and legal but odd
    flood         calls without a pause, whose answers nobody reads, on COUNT connections, some hundred on each
    one_by_one    the next call of each of COUNT connections when the last is answered, until the file STOP is there
    deaf          COUNT connections that subscribe to everything and never read, until the file STOP is there
    half_open     COUNT connections that have not said who they are, until the file STOP is there
    names         COUNT times: ask for a name and give it up, ours among them
    leave         COUNT times: call a method and leave the bus before the answer

Says a line of JSON when it is at work, and one with what it did when it ends. The bus may end a connection at any time:
it is made anew.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jeepney
from jeepney import message_bus
from jeepney.wrappers import new_method_call

NAME, ROOT = "org.gpuswitch1", "/org/gpuswitch1"
GPU = f"{ROOT}/gpu/0000_01_00_0"
BUS = "/run/dbus/system_bus_socket"
PROPERTIES = jeepney.DBusAddress(GPU, NAME, "org.freedesktop.DBus.Properties")
OBJECTS = jeepney.DBusAddress(ROOT, NAME, "org.freedesktop.DBus.ObjectManager")
MANAGER = jeepney.DBusAddress(ROOT, NAME, f"{NAME}.Manager")
GPU_METHODS = jeepney.DBusAddress(GPU, NAME, f"{NAME}.Gpu")

ROUNDS = 300
"""Of a flood: the bus itself is busy with that for a while, and answers nobody else."""
PATHS = ["/", "/" + "/".join("a" * 200), f"{GPU}/deeper", f"{ROOT}/gpu"]
METHODS: list[tuple[jeepney.DBusAddress, str, str, tuple[Any, ...]]] = [
    (PROPERTIES, "GetAll", "s", (f"{NAME}.Gpu",)),
    (PROPERTIES, "Get", "ss", (f"{NAME}.Gpu", "State")),
    (PROPERTIES, "Set", "ssv", (f"{NAME}.Gpu", "State", ("s", "vfio"))),
    (OBJECTS, "GetManagedObjects", "", ()),
    (MANAGER, "GetGpu", "s", ("01:00.0",)),
    (MANAGER, "History", "u", (0,)),
    (MANAGER, "Groups", "", ()),
    (MANAGER, "Reload", "", ()),
    (GPU_METHODS, "Holders", "", ()),
    (GPU_METHODS, "Plan", "sa{sv}", ("vfio", {})),
    (GPU_METHODS, "ToVfio", "a{sv}", ({},)),
    (GPU_METHODS, "ToVfio", "a{sv}", ({"busy": ("s", "kill")},)),
    (GPU_METHODS, "Wait", "s", ("00000000",)),
    (GPU_METHODS, "Cancel", "s", ("00000000",)),
]


class Connection:
    """On the bus, with a name of its own."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(BUS)
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
        self.serial = 0
        if not self.socket.recv(4096).startswith(b"OK"):
            raise ConnectionError("not let in")
        self.send(message_bus.Hello())
        self.socket.recv(4096)

    def send(self, message: jeepney.Message) -> None:
        self.serial += 1
        self.socket.sendall(message.serialise(self.serial))

    def close(self) -> None:
        self.socket.close()


def call(dice: random.Random, *, answered: bool = True) -> jeepney.Message:
    address, member, signature, body = dice.choice(METHODS)
    message = new_method_call(address, member, signature or None, body)
    if not answered:
        message.header.flags |= jeepney.MessageFlag.no_reply_expected
    return message


# Messages


def odd(dice: random.Random) -> bytes:
    """A message that the bus may well pass on."""
    message = call(dice)
    fields = message.header.fields
    match dice.randrange(9):
        case 0:
            message.header.flags |= dice.randrange(256)
        case 1:
            fields[jeepney.HeaderFields.member] = dice.choice(["a" * 255, "_", "ToVfio", "X1"])
        case 2:
            fields.pop(jeepney.HeaderFields.interface, None)
        case 3:
            fields[jeepney.HeaderFields.path] = dice.choice(PATHS)
        case 4:
            signature, value = any_value(dice)
            address, member, _, _ = dice.choice(METHODS)
            message = new_method_call(address, member, signature, (value,))
        case 5:
            address, member, _, _ = dice.choice(METHODS)
            message = new_method_call(address, member, "s", ("\U0010ffff" * dice.randrange(1, 40000),))
        case 6:
            message = jeepney.new_signal(GPU_METHODS, "SwitchFinished", "s", ("x",))
            message.header.fields[jeepney.HeaderFields.destination] = NAME
        case 7:
            message = new_method_call(GPU_METHODS, "ToVfio", "a{sv}", ({"x" * 200: any_value(dice)},))
        case _:
            pass
    return with_unknown_field(message.serialise(dice.randrange(1, 1 << 32)), dice)


def any_value(dice: random.Random, depth: int = 0) -> tuple[str, Any]:
    """A value of any type, with its signature."""
    match dice.randrange(9 if depth < 12 else 5):
        case 0:
            return "x", dice.randrange(-(1 << 63), 1 << 63)
        case 1:
            return "d", dice.choice([float("nan"), float("inf"), -0.0, 1e308])
        case 2:
            return "s", dice.choice(["", "\x01\x02", "../../etc", "\u202eevil", "a" * 4000])
        case 3:
            return "as", ["x"] * dice.randrange(500)
        case 4:
            return "b", True
        case 5:
            return "v", any_value(dice, depth + 1)
        case 6:
            signature, value = any_value(dice, depth + 1)
            return f"({signature})", (value,)
        case 7:
            signature, value = any_value(dice, depth + 1)
            return f"a{signature}", [value] * dice.randrange(3)
        case _:
            signature, value = any_value(dice, depth + 1)
            return f"a{{s{signature}}}", {"key": value}


def with_unknown_field(data: bytes, dice: random.Random) -> bytes:
    """At times, with a header field that nobody knows."""
    if dice.randrange(4):
        return data
    size = int.from_bytes(data[12:16], "little")
    fields, body = data[16 : 16 + size], data[16 + (size + 7) // 8 * 8 :]
    new = bytes([dice.randrange(10, 256)]) + b"\x01s\x00" + (3).to_bytes(4, "little") + b"odd\x00"
    new += bytes(-len(new) % 8)
    header = data[:12] + (len(new) + size).to_bytes(4, "little") + new + fields
    return header + bytes(-len(header) % 8) + body


def broken(dice: random.Random) -> bytes:
    """One that the bus should not pass on, or that has no end."""
    data = bytearray(odd(dice))
    match dice.randrange(5):
        case 0:
            for _ in range(dice.randrange(1, 8)):
                data[dice.randrange(len(data))] = dice.randrange(256)
        case 1:
            del data[dice.randrange(len(data)) :]
        case 2:
            data[4:8] = dice.randrange(1 << 32).to_bytes(4, "little")
        case 3:
            data[12:16] = dice.randrange(1 << 32).to_bytes(4, "little")
        case _:
            data = bytearray(dice.randbytes(dice.randrange(1, 600)))
    return bytes(data)


def large(dice: random.Random) -> bytes:
    """Megabytes, in the body or in a name."""
    size = dice.randrange(1 << 20, 1 << 22)
    return bytes(new_method_call(GPU_METHODS, "Plan", "sa{sv}", ("x" * size, {})).serialise(1))


def messages(count: int, dice: random.Random) -> Iterator[str]:
    connection = Connection()
    for number in range(count):
        kind = "large" if number % 2000 == 1999 else dice.choice(["odd", "odd", "odd", "broken"])
        data = {"odd": odd, "broken": broken, "large": large}[kind](dice)
        try:
            connection.socket.sendall(data)
            drain(connection)
        except OSError:
            connection.close()
            connection = Connection()
            yield "hung up on"
        yield kind


def drain(connection: Connection) -> None:
    """Read what is there; OSError where the bus has hung up."""
    while select.select([connection.socket], [], [], 0)[0]:
        if not connection.socket.recv(1 << 16):
            raise ConnectionError


# Connections


def on_many(count: int, begin: Callable[[], Connection]) -> list[Connection]:
    made = []
    for _ in range(count):
        with suppress(OSError):
            made.append(begin())
    print(json.dumps({"connections": len(made)}), flush=True)  # noqa: T201 -- its output
    return made


def begin() -> None:
    """Wait until the others are there, too."""
    while not Path(sys.argv[4]).with_suffix(".go").exists():
        select.select([], [], [], 0.05)


def ended() -> bool:
    return Path(sys.argv[4]).exists()


def until_ended() -> None:
    while not ended():
        select.select([], [], [], 0.05)


def flood(count: int, dice: random.Random) -> Iterator[str]:
    connections = on_many(count, Connection)
    begin()
    for each in connections:
        each.socket.setblocking(False)
    for _ in range(ROUNDS):
        for number, each in enumerate(connections):
            try:
                each.socket.send(call(dice, answered=bool(dice.randrange(2))).serialise(1 + dice.randrange(1 << 30)))
                yield "sent"
            except BlockingIOError:
                continue
            except OSError:
                yield "hung up on"
                with suppress(OSError):
                    connections[number] = Connection()
                    connections[number].socket.setblocking(False)


def one_by_one(count: int, dice: random.Random) -> Iterator[str]:
    connections = {each.socket: each for each in on_many(count, Connection)}
    begin()
    for each in connections.values():
        each.send(call(dice))
    while not ended():
        for readable in select.select(list(connections), [], [], 0.1)[0]:
            with suppress(OSError):
                if readable.recv(1 << 16):
                    connections[readable].send(call(dice))
                    yield "answered"
                    continue
            yield "hung up on"
            del connections[readable]


def deaf(count: int, _: random.Random) -> Iterator[str]:
    def subscribe() -> Connection:
        connection = Connection()
        for rule in ("type='signal'", f"type='signal',sender='{NAME}'"):
            connection.send(
                new_method_call(
                    jeepney.DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus"),
                    "AddMatch",
                    "s",
                    (rule,),
                )
            )
        return connection

    kept = on_many(count, subscribe)
    until_ended()
    yield from ("subscribed" for _ in kept)


def half_open(count: int, dice: random.Random) -> Iterator[str]:
    kept = []
    for number in range(count):
        with suppress(OSError):
            one = socket.socket(socket.AF_UNIX)
            one.settimeout(5)
            one.connect(BUS)
            one.sendall([b"", b"\0", b"\0AUTH", b"\0AUTH EXTERNAL\r\n"][number % 4])
            kept.append(one)
    print(json.dumps({"connections": len(kept)}), flush=True)  # noqa: T201 -- its output
    until_ended()
    yield from ("open" for _ in kept)


def names(count: int, dice: random.Random) -> Iterator[str]:
    connection = Connection()
    for number in range(count):
        name = dice.choice([NAME, "org.freedesktop.PolicyKit1", f"org.example{number % 7}.A"])
        connection.send(message_bus.RequestName(name))
        connection.send(message_bus.ReleaseName(name))
        connection.send(call(dice))
        drain(connection)
        yield "asked for"


def leave(count: int, dice: random.Random) -> Iterator[str]:
    for number in range(count):
        address, member, signature, body = METHODS[number % len(METHODS)]
        with suppress(OSError):
            connection = Connection()
            message = new_method_call(address, member, signature or None, body)
            message.header.flags |= jeepney.MessageFlag.allow_interactive_authorization
            connection.send(message)
            if dice.randrange(2):
                connection.socket.settimeout(dice.random() / 50)
                with suppress(OSError):
                    connection.socket.recv(1)
            connection.close()
            yield "left"


ATTACKS = {each.__name__: each for each in (messages, flood, one_by_one, deaf, half_open, names, leave)}


def main() -> None:
    what, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    done = Counter(ATTACKS[what](count, random.Random(seed)))  # noqa: S311 -- the same each time is what is wanted
    print(json.dumps(done), flush=True)  # noqa: T201 -- its output


if __name__ == "__main__":
    main()
