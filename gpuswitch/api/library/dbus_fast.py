"""dbus-fast 5.2.0, the maintained descendant of dbus-next. Its private parts change, so its version is pinned too.

What it does wrong by itself, and where that is put right:

- its connection has a reader of its own, which cannot be overridden: `build_message_reader`
- a body that does not fit its signature is sent all the same, unless it cannot be laid out at all; the bus then hangs
  up on us: `marshal`, `marshal_body`

What is left: its compiled reader trusts the bus, which passes on none but valid messages. One that is invalid may end
the process instead of being dropped. To connect never blocks, and fails where the bus has too many newcomers waiting.
An unknown header field is ignored where its type is a simple one; else the message counts as one that cannot be read.

It closes its sockets, hears of a bus that hangs up during login, and remembers 4096 signatures at most.
"""

import logging
from io import BytesIO
from typing import Any

from dbus_fast._private.marshaller import Marshaller
from dbus_fast._private.unmarshaller import Unmarshaller
from dbus_fast.aio import message_bus
from dbus_fast.constants import MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_fast.errors import AuthError
from dbus_fast.message import Message
from dbus_fast.signature import SignatureTree, SignatureType, Variant, get_signature_tree

__all__ = [
    "AuthError", "Link", "Message", "MessageFlag", "MessageType", "NameFlag", "RequestNameReply", "SignatureTree",
    "SignatureType", "Variant", "marshal", "marshal_body", "unmarshal",
]  # fmt: skip

logger = logging.getLogger(__name__)


class Link(message_bus.MessageBus):
    """The library's connection. It asks for no file descriptors.

    `connect` raises OSError, or the library's InvalidAddressError or AuthError.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)

    def _on_message(self, message: Message) -> None:
        try:
            self._process_message(message)
        except Exception:
            logger.exception("cannot work off a message from the bus")


def _reader(_socket: object, _process: object, finalize: Any, _descriptors: object) -> object:
    """Instead of the library's: what the loop calls when the socket has something to read."""
    return finalize.__self__._message_reader  # noqa: SLF001 -- it is that of a Link


message_bus.build_message_reader = _reader


def unmarshal(frame: bytes) -> Message:
    return Unmarshaller(BytesIO(frame)).unmarshall()


def marshal(message: Message) -> bytes:
    message.signature_tree.verify(message.body)
    return bytes(message._marshall(negotiate_unix_fd=False))  # noqa: SLF001 -- the library has no public name for it


def marshal_body(signature: str, body: list[object]) -> bytes:
    get_signature_tree(signature).verify(body)
    return bytes(Marshaller(signature, body).marshall())
