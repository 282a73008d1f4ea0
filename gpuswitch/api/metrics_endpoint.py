"""Serves the metrics over HTTP, or HTTPS.

A small asyncio server with the client library's own encoders. The library's server has a thread for each client, which
would read the fleet while the event loop changes it, answers any path, and has no limit on time or on clients.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
from typing import cast

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0
REQUEST_BYTES = 16 * 1024
CLIENTS = 64


class MetricsEndpoint:
    """Serves `registry` at /metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._server: asyncio.Server | None = None
        self._where: tuple[str, int] | None = None
        self.tls: ssl.SSLContext | None = None
        """None: plain HTTP."""
        self._asking: dict[_Client, None] = {}
        """Clients whose request is not there yet, those that came first in front."""
        self._answered: set[_Client] = set()

    async def serve(self, address: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listen there from here on, and nowhere else; with `tls`, over HTTPS, from the next client on.

        Where that cannot be done the service runs on without: a warning says why.
        """
        self.tls = tls
        if self._server is not None and self._where == (address, port):
            return
        await self.stop()
        try:
            self._server = await asyncio.get_running_loop().create_server(lambda: _Client(self), address, port)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error
            _log.warning("no metrics: cannot listen on %s port %s: %s", address, port, why)
        else:
            self._where = (address, port)
            _log.info("metrics on %s port %s", *self._server.sockets[0].getsockname()[:2])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    # What its clients ask of it --------------------------------------------------------------------------------------

    def came(self, client: _Client) -> bool:
        """Whether there is room for one more. Who has said nothing for longest goes: idle ones keep nobody out."""
        if len(self._asking) + len(self._answered) >= CLIENTS:
            if not self._asking:
                return False
            idle = next(iter(self._asking))
            self.gone(idle)
            idle.cut_off()
        self._asking[client] = None
        return True

    def gone(self, client: _Client) -> None:
        self._asking.pop(client, None)
        self._answered.discard(client)

    def answer_to(self, client: _Client, request: bytes) -> bytes:
        """From here on it is being answered, and makes room for nobody."""
        self._asking.pop(client, None)
        self._answered.add(client)
        return self._answer(request)

    def _answer(self, request: bytes) -> bytes:
        # A lone CR or LF is none of ours (RFC 9112, 2.2), and parts of what is accepted are said again in the answer.
        lines = re.split("\r\n|\r|\n", request.decode("latin-1"))
        method, _, rest = lines[0].partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path not in ("/metrics", "/"):
            return _response("404 Not Found", b"the metrics are at /metrics\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", b"only GET\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        try:
            encode, content_type = choose_encoder(headers.get("accept", ""))
        except TypeError:  # the library compares a version that is no number with one that is
            encode, content_type = choose_encoder("")
        body: bytes = encode(self._registry)
        return _response("200 OK", body, content_type, head=method == "HEAD")


class _Client(asyncio.Protocol):
    """One client, from its connection to its end, which comes after `REQUEST_SECONDS` at the latest.

    TLS begins here and not in the server: that would not count who never begins with it.
    """

    def __init__(self, endpoint: MetricsEndpoint) -> None:
        self._endpoint = endpoint
        self._request = bytearray()
        self._raw: asyncio.Transport | None = None
        self._transport: asyncio.Transport | None = None
        """What it is answered over; None until TLS has begun."""
        self._end: asyncio.TimerHandle | None = None
        self._beginning: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = transport = cast("asyncio.Transport", transport)  # that of a stream
        if not self._endpoint.came(self):
            # All others are being answered. What cannot be sent at once is not waited for.
            if self._endpoint.tls is None:
                transport.write(_response("503 Service Unavailable", b"too many clients\n"))
            transport.close()
            return
        loop = asyncio.get_running_loop()
        self._end = loop.call_later(REQUEST_SECONDS, self.cut_off)
        if self._endpoint.tls is None:
            self._transport = transport
        else:
            transport.pause_reading()  # what comes next is TLS
            self._beginning = loop.create_task(self._begin_tls(transport, self._endpoint.tls))

    async def _begin_tls(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._transport = await loop.start_tls(
                transport, self, tls, server_side=True, ssl_handshake_timeout=REQUEST_SECONDS
            )
        except OSError as error:  # SSLError is one
            _log.debug("a metrics client was cut off: %r", error)
        if self._transport is None:
            # Nobody else says so of a connection that was lost before.
            self.connection_lost(None)
        else:
            self._answer_if_whole()

    def data_received(self, data: bytes) -> None:
        self._request += data
        if len(self._request) > REQUEST_BYTES:
            self.cut_off()
        else:
            self._answer_if_whole()

    def _answer_if_whole(self) -> None:
        head, end, _ = bytes(self._request).partition(b"\r\n\r\n")
        # It may have come with the end of the handshake, before we heard of that.
        if end and self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._endpoint.answer_to(self, head + end))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 -- the protocol's signature
        self._endpoint.gone(self)
        if self._end is not None:
            self._end.cancel()

    def cut_off(self) -> None:
        """End it now, whatever it has said and not yet read."""
        if self._raw is not None:
            self._raw.abort()


def _response(
    status: str, body: bytes, content_type: str = "text/plain; charset=utf-8", *, head: bool = False
) -> bytes:
    header = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return header.encode() + (b"" if head else body)
