"""A user without rights who attacks by many connections: `python -m tests.bench.attackers SOCKET USER KIND COUNT`.

    answered      calls without a pause, whose answers are never read
    unanswered    calls without a pause that want no answer
    broken        the same, but odd ones, and now and then what is no message: the bus hangs up, and they come back
    deaf          subscribe to everything and never read

What is sent is laid out before and goes out in large pieces, so this takes little of a processor: it waits until the
bus takes more. Says a line when all connections are there, begins at a byte on its standard input, and ends with that.
"""

from __future__ import annotations

import os
import pwd
import random
import select
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from jeepney import MatchRule, Message
from jeepney.bus_messages import message_bus

from tests.harness.containers.inside.attack import broken, call, odd

MESSAGES = 2000
"""In one round: until then no two open calls of a connection have one number, which the bus would refuse."""
BREAKS = 50
"""One of so many odd messages is broken."""
PIECE = 16 * 1024
TURN_SECONDS = 20
"""For the bus to let one in, which it is busy with others for."""


class Attacker:
    """A connection that sends `data` over and over."""

    def __init__(self, bus: str, data: memoryview) -> None:
        self.socket = log_in(bus)
        self._data = data
        self._at = 0

    def go_on(self) -> bool:
        """False: the bus has hung up."""
        try:
            self._at += self.socket.send(self._data[self._at : self._at + PIECE])
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._at %= len(self._data)
        return True


def log_in(bus: str) -> socket.socket:
    """A connection with a name. Raises OSError where the bus does not want it."""
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(TURN_SECONDS)
    one.connect(bus)
    one.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
    if not one.recv(4096).startswith(b"OK"):
        raise ConnectionError("the bus does not let us in")
    one.sendall(b"BEGIN\r\n" + message_bus.Hello().serialise(1))
    one.recv(4096)
    one.setblocking(False)
    return one


def laid_out(kind: str, dice: random.Random) -> memoryview:
    match kind:
        case "answered" | "unanswered":
            return joined([call(dice, answered=kind == "answered") for _ in range(MESSAGES)])
        case "broken":
            return memoryview(
                b"".join(broken(dice) if n % BREAKS == BREAKS - 1 else odd(dice) for n in range(MESSAGES))
            )
        case "deaf":
            return joined([message_bus.AddMatch(MatchRule(type="signal"))])
        case _:
            sys.exit(f"nobody attacks in the way {kind!r}")


def joined(messages: Sequence[Message]) -> memoryview:
    return memoryview(b"".join(each.serialise(serial) for serial, each in enumerate(messages, start=2)))


def attack(bus: str, kind: str, attackers: Sequence[Attacker], data: memoryview) -> None:
    """Until nobody wants it any more."""
    by_number = {each.socket.fileno(): each for each in attackers}
    poll = select.epoll()
    poll.register(sys.stdin.fileno(), select.EPOLLIN)
    for each in attackers:
        if kind == "deaf":
            each.go_on()
        else:
            poll.register(each.socket, select.EPOLLOUT)
    while True:
        for number, _ in poll.poll():
            if number == sys.stdin.fileno():
                return
            if not by_number[number].go_on():
                by_number.pop(number).socket.close()
                with suppress(OSError):  # it is one less then
                    new = Attacker(bus, data)
                    by_number[new.socket.fileno()] = new
                    poll.register(new.socket, select.EPOLLOUT)


def main() -> None:
    bus, user, kind, count = sys.argv[1], pwd.getpwnam(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    data = laid_out(kind, random.Random(kind))  # noqa: S311 -- the same each time is what is wanted
    attackers = [Attacker(bus, data) for _ in range(count)]
    print("there", flush=True)
    os.read(sys.stdin.fileno(), 1)
    attack(bus, kind, attackers, data)


if __name__ == "__main__":
    main()
