"""The connection to the bus: what the rest of the project has of the D-Bus library.

The library knows the wire format and how to log in, and has the loop call `_message_reader`; `bus` answers method
calls itself and asks nothing more. Which library that is, and what one alone does wrong, stands in
`gpuswitch.api.library`. What both do wrong is put right here:

- an unknown message type, a message that cannot be read, or a socket that is full for a moment, ends the connection:
  `_file`, `_handle`, `_flush`
- a bus that refuses Hello counts as connected: `connect`
- many messages, or a huge one, keep the loop from all other work, and everybody else waiting: `_sort`, `_work`
- answers that the bus has no time for lie in front of everybody else's: `__init__`, `_work`, `send`
- a connection that ends twice takes from the loop what has its socket's number by then: `_finalize`
- a signal costs three times what it needs to: `emit`
"""

# The library says that it is typed; its private parts are not.
# mypy: allow-untyped-calls

import asyncio
import logging
import socket
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from functools import lru_cache
from struct import pack, unpack_from
from typing import Final

from typing_extensions import override

from gpuswitch.api.inbox import CALL, SIGNAL, Inbox, sender_of
from gpuswitch.api.library import library
from gpuswitch.runtime.seldom import Seldom

__all__ = [
    "DRIVER", "Connection", "Message", "MessageFlag", "MessageType", "NameFlag", "RequestNameReply", "SignatureTree",
    "SignatureType", "Variant",
]  # fmt: skip

Message = library.Message
MessageFlag = library.MessageFlag
MessageType = library.MessageType
NameFlag = library.NameFlag
RequestNameReply = library.RequestNameReply
SignatureTree = library.SignatureTree
SignatureType = library.SignatureType
Variant = library.Variant

logger = logging.getLogger(__name__)

WORK_SECONDS: Final = 0.005
"""For calls in one turn of the loop, before what has come meanwhile is looked at."""
CROWD_SECONDS: Final = 0.01
"""Between two calls of those who have many waiting in a crowd: the bus, which has more of it, needs a processor."""
MAX_UNASKED: Final = 64 * 1024
"""Bytes in a call or signal from a peer: ours have a few hundred. Replies, which we asked for, may be larger."""
DRIVER: Final = "org.freedesktop.DBus"
"""The message bus itself, as a sender. Signals of others were sent to us without being asked for."""
RECEIVE: Final = 64 * 1024
MOST_UNSENT: Final = 2 * 1024
"""Bytes of answers for one turn of the loop. Until the kernel has taken them no call is served: its answer would only
wait, and whose turn it is may be another's by then."""
MOST_REFUSED: Final = 1024
"""Bytes of it. Where as much waits, whoever is refused in a crowd is not told: that would be in the way of answers."""
MOST_OF_CROWD: Final = 2 * 1024
"""Bytes of an answer to a user who has many calls waiting in a crowd: all others would wait for a larger one."""
SEND_BUFFER: Final = 2 * 1024
"""Bytes that the kernel keeps of what the bus has not read; it makes about twice that of it (socket(7), SO_SNDBUF).

A bus that is busy takes little of each connection in a turn, dbus-daemon 2 KiB (dbus-transport-socket.c,
max_bytes_read_per_iteration). What is in here is on its way, whosever it is, and each answer comes behind all of it.
The 208 KiB that Linux gives by itself are a hundred turns.
"""

REMEMBERED: Final = 1024
"""Connections of which it is known how much they were answered."""

UNASKED: Final = (CALL, SIGNAL)
ANSWERS: Final = (MessageType.METHOD_RETURN, MessageType.ERROR)

PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SIGNATURE = 1, 2, 3, 4, 5, 6, 8
"""Codes of header fields (D-Bus specification, Header Fields)."""


class Connection(library.Link):
    """A connection to the message bus at `address`.

    File descriptors are never negotiated: a peer could make us hold as many as it likes.

    `owner_of` says in whose turn the calls of a connection are served (`gpuswitch.api.inbox`); at first, its own.
    """

    def __init__(self, address: str) -> None:
        self.owner_of: Callable[[str], Hashable] = str
        self._inbox = Inbox()
        self._working = False
        self._pause: asyncio.TimerHandle | None = None
        self._crowd_due = 0.0
        self._skipping = 0
        self._told: deque[str] = deque(maxlen=64)
        self._tells = Seldom()
        self._received = bytearray()
        self._unsent = bytearray()
        self._answered: OrderedDict[str, tuple[int, int]] = OrderedDict()
        super().__init__(address)

    @override
    async def connect(self) -> "Connection":
        """Log in and say Hello. Raises what the library's does, and leaves nothing open then."""
        await super().connect()
        # Not before: dbus-fast makes its socket when it connects.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        name = str(self.unique_name)
        if not name.startswith(":"):
            self._finalize()
            raise library.AuthError(name)  # the text of the bus' refusal, which the library took for our name
        return self

    # Receiving

    @override
    def _message_reader(self) -> None:
        """Read what is there. Called by the loop when the socket has something to read, and between calls.

        It is read however much waits to be served: what we left to the bus, others would wait behind.
        """
        try:
            data = self._sock.recv(RECEIVE)
            if not data:
                raise EOFError("the bus ended the connection")
        except BlockingIOError:
            return
        except (OSError, EOFError) as error:
            self._finalize(error)
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        skipped = min(self._skipping, len(data))
        self._skipping -= skipped
        self._received += data[skipped:] if skipped else data
        self._sort()

    def _sort(self) -> None:
        """Take apart what was received. What others want is served in turn; answers, and the bus itself, at once."""
        while not self._disconnected:
            try:
                size = message_size(self._received)
            except ValueError as error:
                self._finalize(error)
                return
            if size is None:
                return
            if size > MAX_UNASKED and self._received[1] in UNASKED:
                if not self._cut(size):
                    return
            elif size > len(self._received):
                return
            else:
                frame = bytes(self._received[:size])
                del self._received[:size]
                self._file(frame)

    def _cut(self, size: int) -> bool:
        """Refuse a message that is too large, without keeping it: its header is enough. False: too early to say."""
        header = header_size(self._received)
        if header <= MAX_UNASKED:
            if len(self._received) < header:
                return False
            self._refuse(without_body(bytes(self._received[:header])), size)
        self._skipping = max(0, size - len(self._received))
        del self._received[:size]
        return True

    def _file(self, frame: bytes) -> None:
        kind = frame[1]
        if kind not in MessageType._value2member_map_:  # "Unknown types must be ignored" (specification, Header)
            return
        if kind == CALL:
            sender = sender_of(frame)
            if not self._inbox.put(self.owner_of(sender), frame):
                self._refuse_more(frame, sender)
            else:
                self._resume()
        elif kind != SIGNAL or sender_of(frame) == DRIVER:
            self._handle(frame)

    def _resume(self) -> None:
        if self._pause is not None and not self._inbox.crowder_next:
            self._pause.cancel()
            self._pause = None
            self._loop.call_soon(self._work)
        elif not self._working and self._inbox and not self._unsent:
            self._working = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Serve the calls whose turn it is, some in each turn of the loop, while the bus takes the answers.

        In a crowd it is one: a call may have something to ask of the bus first, which is sent in the next turn.
        Where more wait, the socket is read between two of them: dbus-broker hands on 16 messages at a time, the next
        when those were read (src/dbus/socket.c, SOCKET_MMSG_MAX), and whose turn it would be may wait behind thousands.
        """
        until = self._loop.time() + WORK_SECONDS
        while not self._disconnected and len(self._unsent) < self._room and (frame := self._take_next()) is not None:
            self._handle(frame)
            if self.crowded or self._loop.time() >= until:
                self._loop.call_soon(self._work)
                return
            if self._inbox:
                self._message_reader()
        self._working = self._pause is not None

    def _take_next(self) -> bytes | None:
        """The next call. None: nothing waits, or only calls of those who crowd others, the next of which is not due."""
        if self._inbox.crowder_next:
            now = self._loop.time()
            if now < self._crowd_due:
                if (frame := self._inbox.take_from_others()) is not None:
                    return frame
                self._pause = self._loop.call_at(self._crowd_due, self._go_on)
                return None
            self._crowd_due = now + CROWD_SECONDS
        return self._inbox.take()

    def _go_on(self) -> None:
        self._pause = None
        self._work()

    @property
    def _room(self) -> int:
        return 1 if self.crowded else MOST_UNSENT

    @property
    def crowded(self) -> bool:
        """Whether so many calls wait that it matters whose is next."""
        return self._inbox.crowded

    def waiting(self, *owners: Hashable) -> Counter[str]:
        """How many calls of each connection of these owners, or of all, wait to be served. Reads the header of each."""
        return Counter(map(sender_of, self._inbox.waiting(*owners)))

    def answered(self, to: str) -> tuple[int, int]:
        """Answers that were sent to a connection, and their bytes; zeros where it is long ago that there was one."""
        return self._answered.get(to, (0, 0))

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken."""
        return len(self._unsent)

    def _handle(self, frame: bytes) -> None:
        try:
            message = library.unmarshal(frame)
        except Exception as error:  # noqa: BLE001 -- whatever the library stumbles over
            self._tell(sender_of(frame), f"cannot read a message from the bus: it is dropped ({error})")
            return
        self._on_message(message)

    def _refuse(self, header: bytes, size: int) -> None:
        try:
            message = library.unmarshal(header)
        except Exception as error:  # noqa: BLE001 -- as above
            self._tell(sender_of(header), f"cannot read a message from the bus: it is dropped ({error})")
            return
        self._tell(str(message.sender), f"a message of {size} bytes is refused")
        if message.message_type is MessageType.METHOD_CALL:
            text = f"cannot take a message of {size} bytes, only up to {MAX_UNASKED}"
            self.send(Message.new_error(message, "org.freedesktop.DBus.Error.LimitsExceeded", text))

    def _refuse_more(self, frame: bytes, sender: str) -> None:
        """Of what a user has waiting there is enough. It is told in few bytes, as there will be many such answers."""
        wanted = not frame[2] & MessageFlag.NO_REPLY_EXPECTED.value
        if wanted and len(self._unsent) < MOST_REFUSED and sender:
            serial: int = unpack_from(byte_order(frame) + "I", frame, 8)[0]
            self._answer(sender, crowded_error(sender, serial, self.next_serial()))

    def _tell(self, sender: str, text: str) -> None:
        """Log what somebody sent that we do not take, once for each connection, of which they can have many."""
        if sender not in self._told and self._tells():
            self._told.append(sender)
            logger.warning("%s, from %s", text, sender)

    # Sending

    @override
    def send(self, message: Message) -> None:
        """Send `message` as soon as the socket takes it. Once the bus is lost, nothing is sent.

        Instead of a large answer, whoever has many calls waiting in a crowd is told LimitsExceeded.
        """
        message.serial = message.serial or self.next_serial()
        data = library.marshal(message)
        if message.message_type not in ANSWERS:
            self._write(data)
            return
        to = str(message.destination)
        if len(data) > MOST_OF_CROWD and self._inbox.crowds(self.owner_of(to)):
            data = crowded_error(to, message.reply_serial, message.serial)
        self._answer(to, data)

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[object]) -> None:
        """Send a signal. Raises the library's SignatureBodyMismatchError where `body` does not fit `signature`.

        Everything but the body, its size and the serial is the same each time, so it is laid out once.
        """
        header = signal_header(path, interface, member, signature)
        content = library.marshal_body(signature, body)
        self._write(header[:4] + pack("<II", len(content), self.next_serial()) + header[12:] + content)

    def _answer(self, to: str, data: bytes) -> None:
        answers, size = self._answered.pop(to, (0, 0))
        self._answered[to] = answers + 1, size + len(data)
        if len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._disconnected:
            return
        if not self._unsent:
            # Once for all that this turn of the loop sends: each write wakes the bus, and whoever listens.
            self._loop.call_soon(self._flush)
        self._unsent += data

    def _flush(self) -> None:
        if self._disconnected or not self._unsent:
            return
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._finalize(error)
            return
        del self._unsent[:sent]
        self._resume()
        if self._unsent:
            self._loop.add_writer(self._fd, self._flush)
        else:
            self._loop.remove_writer(self._fd)

    # The end

    @override
    async def wait_for_disconnect(self) -> None:
        """Return when we hung up. Raises whatever else ended the connection: EOFError if it was the bus."""
        await super().wait_for_disconnect()

    @override
    def disconnect(self) -> None:
        """Hang up; `wait_for_disconnect` returns when that is done. Nothing happens the second time."""
        if self.connected:
            self._flush()
            super().disconnect()

    @override
    def _finalize(self, err: Exception | None = None) -> None:
        if not self._disconnected:  # else the socket's number may be another's by now
            super()._finalize(err)


def byte_order(message: bytes | bytearray) -> str:
    """What `struct` calls the byte order of a message. Raises ValueError if this is the start of no message."""
    orders = {ord("l"): "<", ord("B"): ">"}
    if message[0] not in orders:
        raise ValueError("the bus sent something that is not D-Bus")
    return orders[message[0]]


def message_size(received: bytes | bytearray) -> int | None:
    """How many bytes the first message in `received` has; None: too early to say. Raises ValueError if it is none.

    D-Bus specification, Message Format: the size of the body stands at byte 4, that of the header fields at 12; they
    start at 16, and the body on the next multiple of eight.
    """
    if len(received) < 16:
        return None
    body: int
    fields: int
    body, fields = unpack_from(byte_order(received) + "I4xI", received, 4)
    return 16 + (fields + 7) // 8 * 8 + body


def header_size(received: bytes | bytearray) -> int:
    """How many bytes the header has, of a message of which the first 16 are there."""
    fields: int = unpack_from(byte_order(received) + "I", received, 12)[0]
    return 16 + (fields + 7) // 8 * 8


def crowded_error(destination: str, reply_to: int, serial: int) -> bytes:
    """The answer LimitsExceeded, without a text, laid out by hand: there may be thousands in a second.

    D-Bus specification, Message Format: each field begins at a multiple of eight, and is its number, its signature, and
    its value.
    """
    name = destination.encode()
    fields = _LIMITS_EXCEEDED + pack("<B3sI", REPLY_SERIAL, b"\1u\0", reply_to)
    fields += pack("<B3sI", DESTINATION, b"\1s\0", len(name)) + name + b"\0"
    kind = MessageType.ERROR.value, MessageFlag.NO_REPLY_EXPECTED.value
    return pack("<4BIII", ord("l"), *kind, 1, 0, serial, len(fields)) + fields + bytes(-len(fields) % 8)


def _text_field(number: int, text: str) -> bytes:
    field = pack("<B3sI", number, b"\1s\0", len(text)) + text.encode() + b"\0"
    return field + bytes(-len(field) % 8)


_LIMITS_EXCEEDED: Final = _text_field(ERROR_NAME, "org.freedesktop.DBus.Error.LimitsExceeded")


def without_body(message: bytes) -> bytes:
    """The header of `message` as a message of its own."""
    return message[:4] + bytes(4) + message[8 : header_size(message)]


@lru_cache(maxsize=256)
def signal_header(path: str, interface: str, member: str, signature: str) -> bytes:
    """The header of a signal (D-Bus specification, Message Format): size of the body and serial are zero."""
    fields = [
        [PATH, Variant("o", path)],
        [INTERFACE, Variant("s", interface)],
        [MEMBER, Variant("s", member)],
    ]
    if signature:
        fields.append([SIGNATURE, Variant("g", signature)])
    start = [ord("l"), MessageType.SIGNAL.value, MessageFlag.NONE.value, 1, 0, 0]
    header = library.marshal_body("yyyyuua(yv)", [*start, fields])
    return header + bytes(-len(header) % 8)
