"""The least that a receiver can do: `python -m tests.bench.least SOCKET NAME PEER`.

Owns NAME, reads all that comes, looks who sent it, and drops it, but for the calls of PEER, which it answers with
nothing in it. Says a line when it has the name, and ends with its standard input.

Whoever waits for that one waits for the bus.
"""

from __future__ import annotations

import select
import sys

from jeepney import Message, MessageType, Parser, new_method_return
from jeepney.bus_messages import message_bus

from gpuswitch.api.connection import message_size
from gpuswitch.api.inbox import CALL, sender_of
from tests.bench.attackers import log_in

RECEIVE = 64 * 1024


def main() -> None:
    bus, name, peer = sys.argv[1:]
    one = log_in(bus)
    one.setblocking(True)
    one.sendall(message_bus.RequestName(name).serialise(2))
    received = bytearray()
    serial = 2
    poll = select.poll()
    for each in (one.fileno(), sys.stdin.fileno()):
        poll.register(each, select.POLLIN)
    while all(number != sys.stdin.fileno() for number, _ in poll.poll()):
        received += one.recv(RECEIVE)
        while (size := message_size(received)) is not None and size <= len(received):
            frame = bytes(received[:size])
            del received[:size]
            if frame[1] == MessageType.method_return.value:  # of the one call that we make
                print("there", flush=True)
            elif frame[1] == CALL and sender_of(frame) == peer:
                serial += 1
                one.sendall(answer(frame).serialise(serial))


def answer(frame: bytes) -> Message:
    [call] = Parser().feed(frame)
    return new_method_return(call)


if __name__ == "__main__":
    main()
