"""Metrics for Prometheus: what the fleet looks like now, and how its switches went. Reads memory only.

What there is, and what it means, stands in `gpuswitch/api/families.py`. Each series exists from the moment on that its
GPU is known, so that the first event is an increase and no new series: of that, Prometheus would see none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuswitch import __version__
from gpuswitch.api import families
from gpuswitch.api.authority import Action
from gpuswitch.api.encoders import model_of, vendor_of
from gpuswitch.api.families import BUCKETS, Family
from gpuswitch.config.schema import Deadlines, names_of
from gpuswitch.errors import KINDS, AuthenticationRequired, GpuswitchError, NotAuthorized
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.gpu.strategies import OUTCOMES
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import HolderQuery, Scan
from gpuswitch.model.states import State
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.record import Drift, Result, Switch

Refusals = Callable[[Iterable[PciAddress]], AbstractContextManager[None]]
"""Counts the requests to these GPUs that are refused while it is entered."""

_TARGETS = (State.HOST, State.VFIO)


class MetricsObserver:
    """Counts what happens. An `Observer` (`gpuswitch.gpu.observer`).

    `registry` has all of it. `heard` is called after each event, when something there is or will be different.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # the library leaves it untyped
        self.registry = CollectorRegistry()
        self.heard: Callable[[], None] = _nobody
        self._found: dict[PciAddress, int] = {}
        self._switches = self._counter(families.SWITCHES)
        self._switch_seconds = self._histogram(families.SWITCH_SECONDS)
        self._step_seconds = self._histogram(families.STEP_SECONDS)
        for kind in names_of(Deadlines):
            self._step_seconds.labels(kind)
        self._refusals = self._counter(families.REFUSALS)
        self._denials = self._counter(families.DENIALS)
        for action, error in product(Action, (NotAuthorized(), AuthenticationRequired())):
            self._denials.labels(str(action), error.kind)
        self._drifts = self._counter(families.DRIFTS)
        self._recoveries = self._counter(families.RECOVERIES)

    def _counter(self, family: Family) -> Counter:
        return Counter(family.name, family.help, family.labels, registry=self.registry)

    def _histogram(self, family: Family) -> Histogram:
        return Histogram(family.name, family.help, family.labels, registry=self.registry, buckets=BUCKETS)

    def show(self, fleet: Fleet) -> None:
        """Tell of this fleet's GPUs with every scrape."""
        self.registry.register(_FleetCollector(fleet, self._found))

    def noticed(self, query: HolderQuery, scan: Scan) -> None:
        """Somebody looked for holders (`Processes.noticed`): no scrape does."""
        self._found.update(dict.fromkeys(query.functions, len(scan.holders)))
        self.heard()

    @contextmanager
    def refusals(self, gpus: Iterable[PciAddress]) -> Iterator[None]:
        """Count what is refused to these GPUs in here, by the name of the error: `busy`, `not_viable`."""
        try:
            yield
        except GpuswitchError as error:
            reason = error.kind
            for gpu in gpus:
                self._refusals.labels(str(gpu), reason).inc()
            self.heard()
            raise

    def denied(self, action: str, error: NotAuthorized) -> None:
        """Somebody was not allowed this action: `not_authorized` or `interactive_authorization_required`.

        Anybody can bring that about as often as they like, so nothing of theirs is a label.
        """
        self._denials.labels(action, error.kind).inc()
        self.heard()

    def appeared(self, actor: Actor) -> None:
        """Each of its series is there from now on, at 0."""
        gpu = str(actor.gpu.address)
        for target in map(str, _TARGETS):
            self._switch_seconds.labels(gpu, target)
            for result in Result:
                self._switches.labels(gpu, target, str(result))
        for reason in KINDS:
            self._refusals.labels(gpu, reason)
        self._drifts.labels(gpu)
        for outcome in OUTCOMES:
            self._recoveries.labels(gpu, str(outcome))
        self.heard()

    def vanished(self, actor: Actor) -> None:  # noqa: ARG002 -- an Observer's
        self.heard()

    def changed(self, record: GpuRecord) -> None:  # noqa: ARG002 -- an Observer's
        """Nothing to count: the state is read with each scrape."""
        self.heard()

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:  # noqa: ARG002 -- an Observer's
        if event.status is Status.DONE:
            self._step_seconds.labels(event.step.kind).observe(event.seconds)
        self.heard()

    def waits(self, record: GpuRecord) -> None:  # noqa: ARG002 -- an Observer's
        """Nothing to count: what came of it is told when the step ends."""
        self.heard()

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        gpu, target = str(record.gpu.address), str(switch.target)
        self._switches.labels(gpu, target, str(switch.result)).inc()
        if switch.result is Result.DONE and switch.count:
            self._switch_seconds.labels(gpu, target).observe(switch.seconds)
        self.heard()

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        """Nothing to count: its switch was counted as wedged, and its state is what it is."""

    def drifted(self, record: GpuRecord, drift: Drift) -> None:  # noqa: ARG002 -- an Observer's
        self._drifts.labels(str(record.gpu.address)).inc()
        self.heard()

    def recovered(self, record: GpuRecord) -> None:
        self._recoveries.labels(str(record.gpu.address), str(record.state)).inc()
        self.heard()


def _nobody() -> None:
    """Nobody wants to hear of it."""


class _FleetCollector(Collector):
    """The fleet at the moment of a scrape, from memory."""

    def __init__(self, fleet: Fleet, found: Mapping[PciAddress, int]) -> None:
        self._fleet = fleet
        self._found = found

    def collect(self) -> Iterable[Metric]:
        state, since, info = _gauge(families.GPU_STATE), _gauge(families.STATE_SINCE), _info(families.GPU_INFO)
        owner, holders, trial = _gauge(families.GPU_OWNER), _gauge(families.HOLDERS), _gauge(families.TRIAL_ENDS)
        out, waiting = _gauge(families.STAYS_OUT), _gauge(families.WAITING)
        missed = _gauge(families.AT_BOOT_MISSED)
        stuck, stalled = _gauge(families.WORKERS_STUCK), _gauge(families.STALLED)
        build = _info(families.BUILD_INFO)
        for address, actor in sorted(self._fleet.actors.items()):
            gpu, record = str(address), actor.record
            for each in State:
                state.add_metric([gpu, str(each)], record.state is each)
            since.add_metric([gpu], record.since)
            info.add_metric([gpu], _known_of(record))
            if record.owner is not None:
                owner.add_metric([gpu, record.owner.name, record.owner.uuid], 1)
            if ends := record.trial_ends:
                trial.add_metric([gpu], ends)
            if address in self._found:
                holders.add_metric([gpu], self._found[address])
            out.add_metric([gpu], bool(record.stays_out))
            missed.add_metric([gpu], record.missed_at_boot)
            waiting.add_metric([gpu], record.switch is not None and bool(record.switch.waiting_for))
        stuck.add_metric([], sum(actor.state is State.WEDGED for actor in self._fleet.actors.values()))
        stalled.add_metric([], len(self._fleet.stalled()))
        build.add_metric([], {"version": __version__})
        return [state, since, info, owner, trial, holders, out, missed, waiting, stuck, stalled, build]


def _known_of(record: GpuRecord) -> dict[str, str]:
    config = record.own_config
    return {
        "name": config.name,
        "model": model_of(record),
        "vendor": vendor_of(record),
        "managed": "true" if config.managed else "false",
        "at_boot": str(config.at_boot),
        "on_release": str(config.rules.on_release),
        "host_driver": record.host_driver or "",
    }


def _gauge(family: Family) -> GaugeMetricFamily:
    return GaugeMetricFamily(family.name, family.help, labels=family.labels)


def _info(family: Family) -> InfoMetricFamily:
    """Its labels are given when a metric is added, but for the GPU."""
    own = [label for label in family.labels if label == "gpu"]
    return InfoMetricFamily(family.name.removesuffix("_info"), family.help, labels=own)
