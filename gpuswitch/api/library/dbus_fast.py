"""dbus-fast 5.2.0, the maintained descendant of dbus-next. Its private parts change, so its version is pinned too.

What it does wrong by itself, and where that is put right:

- its connection has a reader of its own, which cannot be overridden: `build_message_reader`
- a body that does not fit its signature is sent all the same, unless it cannot be laid out at all; the bus then hangs
  up on us: `marshal`, `marshal_body`
- its reader takes for granted that a message is valid, as all are that a bus passes on. Where it is compiled, one that
  is not may end the process: `_InPython`, `unmarshal`

What is left: to connect never blocks, and fails where the bus has too many newcomers waiting.
An unknown header field is ignored where its type is a simple one; else the message counts as one that cannot be read.

It closes its sockets, hears of a bus that hangs up during login, and remembers 4096 signatures at most.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from io import BytesIO
from typing import Any


class _InPython:
    """Finds the modules of the library as Python: what they are compiled to stands beside each, and comes first else.

    It is all or none, since compiled ones call each other past Python.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        if path is None or not name.startswith("dbus_fast."):
            return None
        found = (FileFinder(folder, (SourceFileLoader, [".py"])).find_spec(name) for folder in path)
        return next(filter(None, found), None)


sys.meta_path.insert(0, _InPython)

# ruff: noqa: E402 -- the line above has to come first
from dbus_fast._private.marshaller import Marshaller
from dbus_fast._private.unmarshaller import Unmarshaller
from dbus_fast.aio import message_bus
from dbus_fast.constants import MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_fast.errors import AuthError
from dbus_fast.message import REQUIRED_FIELDS, Message
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
    reader = Unmarshaller(BytesIO(frame))
    message = reader.unmarshall()
    if message is None or reader._pos > len(frame):  # noqa: SLF001 -- the library does not look, nor has a name for it
        raise EOFError("the message says that it is longer than it is")
    for field in ("serial", *REQUIRED_FIELDS[message.message_type.value]):
        if not getattr(message, field):
            raise ValueError(f"the message has no {field}")
    return message


def marshal(message: Message) -> bytes:
    message.signature_tree.verify(message.body)
    return bytes(message._marshall(negotiate_unix_fd=False))  # noqa: SLF001 -- the library has no public name for it


def marshal_body(signature: str, body: list[object]) -> bytes:
    get_signature_tree(signature).verify(body)
    return bytes(Marshaller(signature, body).marshall())
