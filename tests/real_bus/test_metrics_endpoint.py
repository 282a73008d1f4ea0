"""The endpoint of the metrics alone, over HTTP and HTTPS: what clients get, and what they cannot do to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gpuswitch.api import metrics_endpoint
from gpuswitch.api.tls import server_context
from gpuswitch.config.schema import Metrics
from tests.harness.certificates import Authority, Signed
from tests.real_bus.test_metrics import ask

LARGE = 20_000_000
"""Bytes; more than the sockets in between hold."""

REQUEST = b"GET /metrics HTTP/1.1\r\n\r\n"
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def rest_of(client: Client) -> bytes:
    """What it still gets, up to the end."""
    reader, writer = client
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def idle(endpoint: metrics_endpoint.MetricsEndpoint) -> Client:
    """A client that says nothing. The endpoint hears of clients in the order in which they come."""
    return await asyncio.open_connection("127.0.0.1", endpoint_port(endpoint))


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[metrics_endpoint.MetricsEndpoint]:
    """One with a large metric, for few clients."""
    monkeypatch.setattr(metrics_endpoint, "CLIENTS", 2)
    registry = CollectorRegistry()
    Gauge("large", "x" * LARGE, registry=registry).set(1)
    endpoint = metrics_endpoint.MetricsEndpoint(registry)
    await endpoint.serve("127.0.0.1", 0)
    yield endpoint
    await endpoint.stop()


def endpoint_port(endpoint: metrics_endpoint.MetricsEndpoint) -> int:
    assert endpoint._server is not None
    port: int = endpoint._server.sockets[0].getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics?name[]=x HTTP/1.1", "200 OK"),
        (b"GET / HTTP/1.0", "200 OK"),
        (b"GET /etc/passwd HTTP/1.1", "404 Not Found"),
        (b"GET http://127.0.0.1/metrics HTTP/1.1", "404 Not Found"),
        (b"POST /metrics HTTP/1.1", "405 Method Not Allowed"),
        (b"DELETE /metrics HTTP/1.1", "405 Method Not Allowed"),
        (b"\xff\x00\x1b[2J", "404 Not Found"),
        (b"", "404 Not Found"),
    ],
)
async def test_a_request_gets_the_answer_that_http_has_for_it(
    endpoint: metrics_endpoint.MetricsEndpoint, request_line: bytes, status: str
) -> None:
    answer = await ask(endpoint_port(endpoint), request_line + b"\r\n\r\n")
    assert answer.startswith(f"HTTP/1.1 {status}\r\n")


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=x", "text/plain;version=a.b"])
async def test_who_asks_for_a_version_that_is_no_number_gets_what_everybody_can_read(
    endpoint: metrics_endpoint.MetricsEndpoint, accept: str
) -> None:
    """Or, from the library before 0.22, which asks for no version, the oldest of the kind that was asked for."""
    request = f"HEAD /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode()
    kind = await ask(endpoint_port(endpoint), request)
    assert "\r\nContent-Type: text/plain; version=0.0.4;" in kind or (
        "openmetrics" in accept and "\r\nContent-Type: application/openmetrics-text; version=1.0.0;" in kind
    )


async def test_no_client_writes_into_the_head_of_the_answer(endpoint: metrics_endpoint.MetricsEndpoint) -> None:
    accept = b"application/openmetrics-text;version=2.0\nX: y"
    answer = await ask(endpoint_port(endpoint), b"HEAD /metrics HTTP/1.1\r\nAccept: %b\r\n\r\n" % accept)
    assert [line.partition(":")[0] for line in answer.splitlines()][1:] == [
        *("Content-Type", "Content-Length", "Connection"),
        "",
    ]


async def test_head_is_get_without_the_body(endpoint: metrics_endpoint.MetricsEndpoint) -> None:
    head = await ask(endpoint_port(endpoint), b"HEAD /metrics HTTP/1.1\r\n\r\n")
    got = await ask(endpoint_port(endpoint), b"GET /metrics HTTP/1.1\r\n\r\n")
    assert got.startswith(head)
    assert len(got) > LARGE


async def test_a_request_that_does_not_end_is_cut_off(
    endpoint: metrics_endpoint.MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "REQUEST_SECONDS", 0.1)
    assert await ask(endpoint_port(endpoint), b"GET /metrics HTT") == ""


async def test_a_request_that_is_too_long_is_cut_off(endpoint: metrics_endpoint.MetricsEndpoint) -> None:
    for request in (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000, b"x" * 100_000 + b"\r\n\r\n"):
        assert await ask(endpoint_port(endpoint), request) == ""
    assert await ask(endpoint_port(endpoint), b"GET /metrics HTTP/1.1\r\n\r\n") != ""


async def test_a_client_that_does_not_read_is_let_go(
    endpoint: metrics_endpoint.MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "REQUEST_SECONDS", 1.0)
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", endpoint_port(endpoint))) as client:
        client.setblocking(False)
        await loop.sock_sendall(client, b"GET /metrics HTTP/1.1\r\n\r\n")
        await loop.sock_recv(client, 1)
        # The same loop has the endpoint's timer, which began before this one.
        await asyncio.sleep(metrics_endpoint.REQUEST_SECONDS)
        assert endpoint._answered == set()
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(client, 1 << 20):
                received += len(data)
    assert received < LARGE


async def test_who_is_idle_keeps_nobody_out(endpoint: metrics_endpoint.MetricsEndpoint) -> None:
    """The one that has said nothing for longest makes room; all others may still ask."""
    port = endpoint_port(endpoint)
    first, *others = [await idle(endpoint) for _ in range(metrics_endpoint.CLIENTS)]
    assert await ask(port, REQUEST) != ""
    assert await rest_of(first) == b""
    for each in others:
        each[1].write(REQUEST)
        assert (await rest_of(each)).startswith(b"HTTP/1.1 200 OK")


async def test_who_comes_while_all_are_being_answered_is_told_so(endpoint: metrics_endpoint.MetricsEndpoint) -> None:
    port = endpoint_port(endpoint)
    reading = [await idle(endpoint) for _ in range(metrics_endpoint.CLIENTS)]
    for reader, writer in reading:
        writer.write(REQUEST)
        assert await reader.readexactly(8) == b"HTTP/1.1"
    assert (await ask(port, b"")).startswith("HTTP/1.1 503 Service Unavailable\r\n")
    for each in reading:
        assert len(await rest_of(each)) > LARGE
    assert (await ask(port, REQUEST)).startswith("HTTP/1.1 200 OK\r\n")


# Over HTTPS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


async def over_tls(port: int, tls: ssl.SSLContext) -> str:
    """The answer to a request over HTTPS; empty where there is none."""
    try:
        client = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        client[1].write(REQUEST)
        return (await rest_of(client)).decode()
    except (ssl.SSLError, ConnectionResetError):
        return ""


async def serve_tls(
    endpoint: metrics_endpoint.MetricsEndpoint, signed: Signed, clients: Authority | None = None
) -> int:
    """Serve with this certificate, where it has served before; the port."""
    settings = Metrics(
        certificate=str(signed.certificate),
        key=str(signed.key),
        client_ca=str(clients.certificate) if clients else "",
    )
    await endpoint.serve("127.0.0.1", 0, server_context(settings))
    return endpoint_port(endpoint)


async def test_https_is_spoken_where_a_certificate_is_configured(
    endpoint: metrics_endpoint.MetricsEndpoint, authority: Authority, stranger: Authority
) -> None:
    port = await serve_tls(endpoint, authority.signs("server"))
    answer = await over_tls(port, authority.client())
    assert answer.startswith("HTTP/1.1 200 OK\r\n")
    assert len(answer) > LARGE
    assert await over_tls(port, stranger.client()) == ""
    assert "HTTP" not in await ask(port, REQUEST)


async def test_only_those_with_a_certificate_of_the_right_authority_are_served(
    endpoint: metrics_endpoint.MetricsEndpoint, authority: Authority, stranger: Authority
) -> None:
    port = await serve_tls(endpoint, authority.signs("server"), clients=authority)
    assert await over_tls(port, authority.client()) == ""
    assert await over_tls(port, authority.client(shows=stranger.signs("impostor"))) == ""
    assert "HTTP/1.1 200 OK" in await over_tls(port, authority.client(shows=authority.signs("prometheus")))


async def test_a_new_certificate_is_shown_to_the_next_client_on_the_same_port(
    endpoint: metrics_endpoint.MetricsEndpoint, authority: Authority, stranger: Authority
) -> None:
    port = await serve_tls(endpoint, authority.signs("server"))
    assert await serve_tls(endpoint, stranger.signs("server")) == port
    assert await over_tls(port, stranger.client()) != ""
    assert await over_tls(port, authority.client()) == ""
    await endpoint.serve("127.0.0.1", 0)
    assert (await ask(port, REQUEST)).startswith("HTTP/1.1 200 OK\r\n")


async def test_who_never_begins_to_speak_tls_keeps_nobody_out(
    endpoint: metrics_endpoint.MetricsEndpoint, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    port = await serve_tls(endpoint, authority.signs("server"))
    silent = [await idle(endpoint) for _ in range(50)]
    assert (await over_tls(port, authority.client())).startswith("HTTP/1.1 200 OK\r\n")
    assert len(endpoint._asking) <= metrics_endpoint.CLIENTS
    for each in silent:
        assert await rest_of(each) == b""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_who_never_begins_to_speak_tls_is_cut_off(
    endpoint: metrics_endpoint.MetricsEndpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "REQUEST_SECONDS", 0.1)
    assert await ask(await serve_tls(endpoint, authority.signs("server")), b"") == ""
