"""Metrics for Prometheus: what the fleet looks like now, and how its switches went. Reads memory only.

The endpoint is a small asyncio server with the client library's own encoders: the library's threaded server would
answer any path, without a limit on time or on the number of clients.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gpuswitch import __version__
from gpuswitch.errors import GpuswitchError, NotAuthorized
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import HolderQuery, Scan
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Drift, Switch

_log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0
REQUEST_BYTES = 16 * 1024
CLIENTS = 32
Refusals = Callable[[Iterable[PciAddress]], AbstractContextManager[None]]
"""Counts the requests to these GPUs that are refused while it is entered."""

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class MetricsObserver:
    """Counts what happens. An `Observer` (`gpuswitch.gpu.observer`)."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # the library leaves it untyped
        self.registry = CollectorRegistry()
        self._found: dict[PciAddress, int] = {}
        self._switches = Counter(
            "gpuswitch_switches", "Finished switches by result.", ["gpu", "target", "result"], registry=self.registry
        )
        self._switch_seconds = Histogram(
            "gpuswitch_switch_duration_seconds",
            "Duration of successful switches in seconds.",
            ["target"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "gpuswitch_step_duration_seconds",
            "Duration of completed steps in seconds.",
            ["step"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "gpuswitch_refusals", "Requests that were refused, by reason.", ["gpu", "reason"], registry=self.registry
        )
        self._denials = Counter(
            "gpuswitch_denials",
            "Calls that their caller was not allowed, by action and reason.",
            ["action", "reason"],
            registry=self.registry,
        )
        self._drifts = Counter(
            "gpuswitch_drifts", "Times that somebody else moved a GPU.", ["gpu"], registry=self.registry
        )
        self._recoveries = Counter(
            "gpuswitch_recoveries",
            "Recoveries by where they ended: home, vfio, failed.",
            ["gpu", "outcome"],
            registry=self.registry,
        )

    def show(self, fleet: Fleet) -> None:
        """Tell of this fleet's GPUs with every scrape."""
        self.registry.register(_FleetCollector(fleet, self._found))

    def noticed(self, query: HolderQuery, scan: Scan) -> None:
        """Somebody looked for holders (`Processes.noticed`): no scrape does."""
        self._found.update(dict.fromkeys(query.functions, len(scan.holders)))

    @contextmanager
    def refusals(self, gpus: Iterable[PciAddress]) -> Iterator[None]:
        """Count what is refused to these GPUs in here, by the name of the error: `busy`, `not_viable`."""
        try:
            yield
        except GpuswitchError as error:
            reason = error.kind
            for gpu in gpus:
                self._refusals.labels(str(gpu), reason).inc()
            raise

    def denied(self, action: str, error: NotAuthorized) -> None:
        """Somebody was not allowed this action: `not_authorized` or `interactive_authorization_required`.

        Anybody can bring that about as often as they like, so nothing of theirs is a label.
        """
        self._denials.labels(action, error.kind).inc()

    def appeared(self, actor: Actor) -> None:
        """Nothing to count."""

    def vanished(self, actor: Actor) -> None:
        """Nothing to count."""

    def changed(self, record: GpuRecord) -> None:
        """Nothing to count: the state is read with each scrape."""

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:  # noqa: ARG002 -- an Observer's
        if event.status is Status.DONE:
            self._step_seconds.labels(event.step.kind).observe(event.seconds)

    def waits(self, record: GpuRecord) -> None:
        """Nothing to count: what came of it is told when the step ends."""

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        self._switches.labels(str(record.gpu.address), str(switch.target), str(switch.result)).inc()
        if switch.result == "done" and switch.count:
            self._switch_seconds.labels(str(switch.target)).observe(switch.seconds)

    def drifted(self, record: GpuRecord, drift: Drift) -> None:  # noqa: ARG002 -- an Observer's
        self._drifts.labels(str(record.gpu.address)).inc()

    def recovered(self, record: GpuRecord, outcome: str) -> None:
        self._recoveries.labels(str(record.gpu.address), outcome).inc()


class _FleetCollector(Collector):
    """The fleet at the moment of a scrape, from memory."""

    def __init__(self, fleet: Fleet, found: Mapping[PciAddress, int]) -> None:
        self._fleet = fleet
        self._found = found

    def collect(self) -> Iterable[Metric]:
        state = GaugeMetricFamily(
            "gpuswitch_gpu_state", "1 for the current state of a GPU, 0 for the others.", labels=["gpu", "state"]
        )
        info = InfoMetricFamily("gpuswitch_gpu", "What is known of a GPU.", labels=["gpu"])
        since = GaugeMetricFamily(
            "gpuswitch_state_since_seconds", "When a GPU entered its state, seconds since the epoch.", labels=["gpu"]
        )
        holders = GaugeMetricFamily(
            "gpuswitch_holders", "How many had a GPU open when it was last looked for them.", labels=["gpu"]
        )
        out = GaugeMetricFamily(
            "gpuswitch_stays_out", "1 for a GPU whose last way home ended elsewhere, else 0.", labels=["gpu"]
        )
        trial = GaugeMetricFamily(
            "gpuswitch_trial_ends_timestamp_seconds",
            "When a GPU goes home by itself, since its trial is over, seconds since the epoch.",
            labels=["gpu"],
        )
        for address, actor in sorted(self._fleet.actors.items()):
            gpu = str(address)
            if ends := actor.record.trial_ends:
                trial.add_metric([gpu], ends)
            out.add_metric([gpu], 1.0 if actor.record.stays_out else 0.0)
            if address in self._found:
                holders.add_metric([gpu], self._found[address])
            for each in State:
                state.add_metric([gpu, str(each)], 1.0 if actor.state is each else 0.0)
            name = actor.record.own_config.name
            info.add_metric([gpu], {"name": name, "host_driver": actor.record.host_driver or ""})
            since.add_metric([gpu], actor.record.since)
        stuck = GaugeMetricFamily(
            "gpuswitch_workers_stuck",
            "Workers that the kernel has not returned to.",
            value=sum(actor.state is State.WEDGED for actor in self._fleet.actors.values()),
        )
        build = InfoMetricFamily("gpuswitch_build", "The version that runs.", value={"version": __version__})
        return [state, info, since, holders, out, trial, stuck, build]


class MetricsEndpoint:
    """Serves `registry` at /metrics over HTTP."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._server: asyncio.Server | None = None
        self._clients = 0

    async def start(self, address: str, port: int) -> None:
        """Listen. Where that cannot be done the service runs on without: a warning says why."""
        try:
            self._server = await asyncio.start_server(self._serve, address, port, limit=REQUEST_BYTES)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error
            _log.warning("no metrics: cannot listen on %s port %s: %s", address, port, why)
        else:
            _log.info("metrics on %s port %s", *self._server.sockets[0].getsockname()[:2])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                if self._clients > CLIENTS:
                    writer.write(_response("503 Service Unavailable", b"too many clients\n"))
                else:
                    writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("a metrics client was cut off: %r", error)
        finally:
            self._clients -= 1
            writer.transport.abort()  # close() alone would wait for ever for a client that does not read

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


def _response(
    status: str, body: bytes, content_type: str = "text/plain; charset=utf-8", *, head: bool = False
) -> bytes:
    header = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return header.encode() + (b"" if head else body)
