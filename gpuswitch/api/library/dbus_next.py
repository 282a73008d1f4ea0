"""dbus-next 0.2.3, last released in 2021. As this reaches into private parts, the version is pinned.

What it does wrong by itself, and where that is put right:

- Python 3.15 cannot import it: `no_type_check_decorator`
- an unknown header field ends the connection: `HeaderField._missing_`
- every signature that a peer makes up is remembered for ever: `SignatureTree._get`
- a bus that hangs up during login makes the loop spin: `_auth_readline`
- sockets stay open until the garbage collector comes by: `__init__`, `connect`, `_finalize`
"""

# The library says that it is typed; its private parts are not.
# mypy: allow-untyped-calls

import contextlib
import typing
from functools import lru_cache
from io import BytesIO
from typing import Final

from typing_extensions import override

vars(typing).setdefault("no_type_check_decorator", lambda decorator: decorator)  # gone in 3.15, asked for on import

# ruff: noqa: E402 -- the line above has to come first
from dbus_next._private.constants import HeaderField
from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_next.errors import AuthError
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, SignatureType, Variant

__all__ = [
    "AuthError", "Link", "Message", "MessageFlag", "MessageType", "NameFlag", "RequestNameReply", "SignatureTree",
    "SignatureType", "Variant", "marshal", "marshal_body", "unmarshal",
]  # fmt: skip

MAX_LOGIN_LINE: Final = 16 * 1024

# "Implementations must ignore fields they do not understand" (D-Bus specification, Header Fields).
# An unknown field is taken for UNIX_FDS, the one that the library never looks at.
HeaderField._missing_ = classmethod(lambda cls, _: cls.UNIX_FDS)  # type: ignore[method-assign,assignment] # a repair
# Peers choose the signatures in their messages, so what is remembered of them needs a limit.
SignatureTree._get = staticmethod(lru_cache(maxsize=512)(SignatureTree))  # type: ignore[method-assign] # noqa: SLF001 -- a repair


class Link(MessageBus):
    """The library's connection. It asks for no file descriptors."""

    def __init__(self, address: str) -> None:
        """Connect the socket. Raises OSError, or the library's InvalidAddressError."""
        try:
            super().__init__(address, negotiate_unix_fd=False)
        except BaseException:
            self._close_socket()
            raise

    @override
    async def connect(self) -> "Link":
        """Raises OSError, EOFError or AuthError."""
        try:
            await super().connect()
        except BaseException:
            self._finalize()
            raise
        return self

    @override
    async def _auth_readline(self) -> str:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            byte = await self._loop.sock_recv(self._sock, 1)
            if not byte or len(line) > MAX_LOGIN_LINE:
                raise EOFError("the bus ended the connection during login")
            line += byte
        return line[:-2].decode()

    @override
    def _finalize(self, err: Exception | None = None) -> None:
        super()._finalize(err)
        self._close_socket()

    def _close_socket(self) -> None:
        for end in ("_stream", "_sock"):  # neither is there if the address was not understood
            with contextlib.suppress(AttributeError, OSError):
                getattr(self, end).close()


def unmarshal(frame: bytes) -> Message:
    message: Message | None = Unmarshaller(BytesIO(frame)).unmarshall()
    if message is None:  # the library would wait for the rest
        raise EOFError("the message says that it is longer than it is")
    return message


def marshal(message: Message) -> bytes:
    return bytes(message._marshall())  # noqa: SLF001 -- the library has no public name for it


def marshal_body(signature: str, body: list[object]) -> bytes:
    return bytes(Marshaller(signature, body).marshall())
