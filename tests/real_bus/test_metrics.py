"""The metrics as a Prometheus scrapes them from the real service, and what other clients cannot do to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from gpuswitch import __version__
from gpuswitch.api import metrics
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.record import Drift
from tests.harness.service.peers import PeerError
from tests.harness.service.services import ANY_PORT, GPU, ROOT, Service, write_config
from tests.real_bus.conftest import Start

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
ADDRESS = "0000:01:00.0"
NAMED = f'{ANY_PORT}[[gpu]]\naddress = "{ADDRESS}"\nname = "geforce"\n'

LARGE = 20_000_000
"""Bytes; more than the sockets in between hold."""

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def port_of(service: Service) -> int:
    """Where it listens, as its log says it."""
    ports: list[str] = re.findall(r"^metrics on 127\.0\.0\.1 port (\d+)$", service.log, re.MULTILINE)
    return int(ports[-1])


async def ask(port: int, request: bytes) -> str:
    """All that the answer to these bytes holds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return (await reader.read()).decode()
    except ConnectionResetError:
        return ""
    finally:
        writer.close()


async def scrape(service: Service) -> str:
    head, _, body = (await ask(port_of(service), b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    return body


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(all_samples: Samples, name: str, /, **labels: str) -> float:
    return all_samples[f"gpuswitch_{name}", frozenset(labels.items())]


def states(all_samples: Samples, gpu: str) -> set[str]:
    """The states that a GPU is in: one, one hopes."""
    return {
        dict(labels)["state"]
        for (name, labels), value in all_samples.items()
        if name == "gpuswitch_gpu_state" and ("gpu", gpu) in labels and value == 1
    }


async def test_a_scrape_tells_of_every_gpu_and_switch(start: Start) -> None:
    service = await start("laptop", "unbind@0000:01:00.1#3=EIO", config=NAMED)
    before = samples(await scrape(service))
    assert states(before, ADDRESS) == states(before, "0000:00:02.0") == {"host"}
    assert value(before, "build_info", version=__version__) == 1
    assert value(before, "gpu_info", gpu=ADDRESS, name="geforce", host_driver="nvidia") == 1

    for target in ("vfio", "host", "vfio"):
        await service.wait(DISCRETE, await service.move(DISCRETE, target))
    after = samples(await scrape(service))
    assert states(after, ADDRESS) == {"host"}
    assert value(after, "switches_total", gpu=ADDRESS, target="vfio", result="done") == 1
    assert value(after, "switches_total", gpu=ADDRESS, target="host", result="done") == 1
    assert value(after, "switches_total", gpu=ADDRESS, target="vfio", result="reverted") == 1
    for target in ("vfio", "host"):
        assert value(after, "switch_duration_seconds_count", target=target) == 1
        assert value(after, "switch_duration_seconds_bucket", target=target, le="+Inf") == 1
    assert value(after, "step_duration_seconds_count", step="unbind") == 7
    shown = await service.properties(DISCRETE)
    assert value(after, "state_since_seconds", gpu=ADDRESS) == pytest.approx(shown["StateSince"], abs=1e-3)


async def test_a_switch_under_way_is_seen_and_stops_no_scrape(start: Start) -> None:
    service = await start("laptop", "unbind=hang", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    await service.move(DISCRETE, "vfio")
    assert states(samples(await scrape(service)), ADDRESS) <= {"detaching", "wedged"}
    await service.until_state(DISCRETE, "wedged")
    assert states(samples(await scrape(service)), ADDRESS) == {"wedged"}


async def test_what_is_refused_is_counted_by_reason(start: Start) -> None:
    service = await start("single", config=ANY_PORT)
    for options in ({}, {}, {"busy": ("s", "sometimes")}):
        with pytest.raises(PeerError):
            await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", options)
    counted = samples(await scrape(service))
    assert value(counted, "refusals_total", gpu=ADDRESS, reason="busy") == 2
    assert value(counted, "refusals_total", gpu=ADDRESS, reason="invalid_argument") == 1


async def test_what_is_refused_to_a_virtual_machine_is_counted_too(start: Start) -> None:
    service = await start("single", config=NAMED)
    with pytest.raises(PeerError):
        await service.ask("AcquireForVm", "ssas", "win11", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d", [ADDRESS])
    assert value(samples(await scrape(service)), "refusals_total", gpu=ADDRESS, reason="busy") == 1


async def test_holders_are_those_of_the_last_look_and_no_scrape_looks(start: Start) -> None:
    service = await start("laptop", f"scan@{ADDRESS}#2=hang")
    unknown = samples(await scrape(service))
    assert not [name for name, _ in unknown if name == "gpuswitch_holders"]
    holders = await service.call(DISCRETE, f"{GPU}.Holders")
    seen = samples(await scrape(service))
    assert value(seen, "holders", gpu=ADDRESS) == len(holders) > 0
    assert ("gpuswitch_holders", frozenset({("gpu", "0000:00:02.0")})) not in seen


async def test_what_somebody_else_moved_is_counted() -> None:
    """A simulated machine has nobody else, so the observer is told by itself."""
    observer = metrics.MetricsObserver()
    record = cast("GpuRecord", SimpleNamespace(gpu=SimpleNamespace(address=PciAddress.parse(ADDRESS))))
    observer.drifted(record, Drift(State.HOST, State.UNKNOWN, "one function is on vfio-pci", 0.0))
    assert observer.registry.get_sample_value("gpuswitch_drifts_total", {"gpu": ADDRESS}) == 1


async def test_promtool_finds_nothing_wrong(start: Start) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing; install it: apt-get install --no-install-recommends prometheus")
    service = await start("laptop")
    for target in ("vfio", "host"):
        await service.wait(DISCRETE, await service.move(DISCRETE, target))
    with pytest.raises(PeerError):
        await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"busy": ("s", "sometimes")})
    check = await asyncio.create_subprocess_exec(
        promtool, "check", "metrics",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip  # the command, then its channels
    said, _ = await check.communicate((await scrape(service)).encode())
    assert (check.returncode, said.decode()) == (0, "")


async def test_openmetrics_is_spoken_to_those_who_ask_for_it(start: Start) -> None:
    service = await start("laptop")
    accept = b"Accept: application/openmetrics-text;version=1.0.0\r\n"
    answer = await ask(port_of(service), b"GET /metrics HTTP/1.1\r\n" + accept + b"\r\n")
    assert "\r\nContent-Type: application/openmetrics-text; version=1.0.0" in answer
    assert answer.endswith("# EOF\n")


async def test_a_port_that_is_taken_stops_nothing_but_the_metrics(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = await start("laptop", config=f"[metrics]\nport = {port}\n")
        assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"
    assert f"no metrics: cannot listen on 127.0.0.1 port {port}: Address already in use" in service.log


async def test_a_reload_turns_the_metrics_off_and_on(start: Start) -> None:
    service = await start("laptop")
    port = port_of(service)
    write_config(service.config, "[metrics]\nenabled = false\n")
    await service.ask("Reload")
    with pytest.raises(ConnectionRefusedError):
        await ask(port, b"")
    write_config(service.config, f"[metrics]\nport = {port}\n")
    await service.ask("Reload")
    assert states(samples(await scrape(service)), ADDRESS) == {"host"}


# The endpoint alone: what clients cannot do to it


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[metrics.MetricsEndpoint]:
    """One with a large metric, for few clients."""
    monkeypatch.setattr(metrics, "CLIENTS", 2)
    registry = CollectorRegistry()
    Gauge("large", "x" * LARGE, registry=registry).set(1)
    endpoint = metrics.MetricsEndpoint(registry)
    await endpoint.start("127.0.0.1", 0)
    yield endpoint
    await endpoint.stop()


def endpoint_port(endpoint: metrics.MetricsEndpoint) -> int:
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
    endpoint: metrics.MetricsEndpoint, request_line: bytes, status: str
) -> None:
    answer = await ask(endpoint_port(endpoint), request_line + b"\r\n\r\n")
    assert answer.startswith(f"HTTP/1.1 {status}\r\n")


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=x", "text/plain;version=a.b"])
async def test_who_asks_for_a_version_that_is_no_number_gets_what_everybody_can_read(
    endpoint: metrics.MetricsEndpoint, accept: str
) -> None:
    request = f"HEAD /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode()
    assert "\r\nContent-Type: text/plain; version=0.0.4;" in await ask(endpoint_port(endpoint), request)


async def test_no_client_writes_into_the_head_of_the_answer(endpoint: metrics.MetricsEndpoint) -> None:
    accept = b"application/openmetrics-text;version=2.0\nX: y"
    answer = await ask(endpoint_port(endpoint), b"HEAD /metrics HTTP/1.1\r\nAccept: %b\r\n\r\n" % accept)
    assert [line.partition(":")[0] for line in answer.splitlines()][1:] == [
        *("Content-Type", "Content-Length", "Connection"),
        "",
    ]


async def test_head_is_get_without_the_body(endpoint: metrics.MetricsEndpoint) -> None:
    head = await ask(endpoint_port(endpoint), b"HEAD /metrics HTTP/1.1\r\n\r\n")
    got = await ask(endpoint_port(endpoint), b"GET /metrics HTTP/1.1\r\n\r\n")
    assert got.startswith(head)
    assert len(got) > LARGE


async def test_a_request_that_does_not_end_is_cut_off(
    endpoint: metrics.MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REQUEST_SECONDS", 0.1)
    assert await ask(endpoint_port(endpoint), b"GET /metrics HTT") == ""


async def test_a_request_that_is_too_long_is_cut_off(endpoint: metrics.MetricsEndpoint) -> None:
    for request in (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000, b"x" * 100_000 + b"\r\n\r\n"):
        assert await ask(endpoint_port(endpoint), request) == ""
    assert await ask(endpoint_port(endpoint), b"GET /metrics HTTP/1.1\r\n\r\n") != ""


async def test_a_client_that_does_not_read_is_let_go(
    endpoint: metrics.MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REQUEST_SECONDS", 1.0)
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", endpoint_port(endpoint))) as client:
        client.setblocking(False)
        await loop.sock_sendall(client, b"GET /metrics HTTP/1.1\r\n\r\n")
        await loop.sock_recv(client, 1)
        await asyncio.wait(asyncio.all_tasks() - {cast("asyncio.Task[None]", asyncio.current_task())})
        assert endpoint._clients == 0
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(client, 1 << 20):
                received += len(data)
    assert received < LARGE


async def test_too_many_clients_are_told_so_until_others_have_gone(endpoint: metrics.MetricsEndpoint) -> None:
    port = endpoint_port(endpoint)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(metrics.CLIENTS)]
    assert (await ask(port, b"")).startswith("HTTP/1.1 503 Service Unavailable\r\n")
    for reader, writer in idle:
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
    assert (await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 200 OK\r\n")
