"""Of gpuswitch itself: its service, who may use it, what it was told."""

from __future__ import annotations

from collections.abc import Iterator

from gpuswitch import __version__
from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Said, ok, problem, warning
from gpuswitch.doctor.looks.units import BUS, OURS, POLKIT, PROMETHEUS
from gpuswitch.doctor.seen import Seen
from gpuswitch.sentence import Sentence

_RELOAD = f"systemctl reload {OURS}"


def service(seen: Seen) -> Iterator[Said]:
    unit, said = seen.unit(OURS), seen.service
    if said.running:
        if said.version != __version__:
            yield warning(
                Sentence(
                    "the service is of version {theirs}, and this command of {ours}",
                    theirs=said.version,
                    ours=__version__,
                ),
                Sentence("start it anew; GPUs stay where they are"),
                (f"systemctl restart {OURS}",),
            )
        else:
            yield ok(Sentence("the service runs, version {version}", version=said.version))
        if unit.found and not unit.enabled:
            yield warning(
                Sentence("the service is not started when the machine starts"),
                Sentence("enable it"),
                (f"systemctl enable {OURS}",),
            )
    elif seen.units is not None and not unit.found:
        yield problem(
            Sentence("the service is not installed: there is no {unit}", unit=OURS),
            *_again(seen),
        )
    elif said.why:
        yield problem(
            Sentence("the service does not answer: {why}", why=said.why),
            Sentence("see what it says, then start it"),
            (f"journalctl -u {OURS} -b -n 50", f"systemctl restart {OURS}"),
        )
    else:
        yield warning(
            Sentence("the service does not run: no virtual machine gets a GPU by itself"),
            Sentence("start it, now and with the machine"),
            (f"systemctl enable --now {OURS}",),
        )


def _again(seen: Seen) -> tuple[Sentence, tuple[str, ...]]:
    return remedies.install_again(seen.system, packaged=seen.installation.packaged)


def broker(seen: Seen) -> Iterator[Said]:
    """Either will do."""
    if seen.units is None:
        return
    bus = seen.unit(BUS)
    name = bus.id.removesuffix(".service").replace("dbus-daemon", "dbus")
    if not bus.active:
        yield problem(Sentence("the system bus does not run"), Sentence("start it"), ("systemctl start dbus.socket",))
    elif not seen.installation.bus_policy:
        yield problem(
            Sentence("the policy of the bus knows nothing of gpuswitch: org.gpuswitch1.conf is missing"),
            *_again(seen),
        )
    else:
        yield ok(Sentence("the system bus is {name}", name="dbus-broker" if name == "dbus-broker" else "dbus-daemon"))


def polkit(seen: Seen) -> Iterator[Said]:
    if seen.units is None:
        return
    if not seen.unit(POLKIT).found:
        yield warning(
            Sentence("polkit is not installed: only root may switch"),
            Sentence("install it"),
            remedies.install(seen.system, "polkit"),
        )
    elif not seen.installation.actions:
        yield warning(
            Sentence("polkit knows nothing of gpuswitch: org.gpuswitch1.policy is missing"),
            *_again(seen),
        )
    else:
        yield ok(Sentence("polkit says who may switch"))


def configuration(seen: Seen) -> Iterator[Said]:
    found = seen.configuration
    edit = ("gpuswitchctl config edit",)
    for fault in found.faults:
        yield problem(Sentence.of(fault), Sentence("correct it"), edit)
    told = [*found.config.warnings, *(misfit.sentence for misfit in seen.misfits), *seen.missing_drivers]
    for sentence in told:
        yield warning(Sentence.of(sentence), Sentence("correct it"), edit)
    if found.faults:
        return
    written = {setting.key: setting.value for setting in found.config.settings}
    in_force = seen.service.settings
    files = {*written, *in_force} - seen.service.by_variables if in_force else set[str]()
    changed = sorted(key for key in files if written.get(key) != in_force.get(key))
    if changed:
        yield warning(
            Sentence("the service still has what the configuration said before: {keys}", keys=", ".join(changed[:5])),
            Sentence("have it read again"),
            (_RELOAD,),
        )
    elif not told:
        managed = ", ".join(str(gpu.address) for gpu in seen.config.gpus)
        if managed:
            yield ok(Sentence("the configuration can be used; it is about {gpus}", gpus=managed))
        elif seen.config.sought:  # by `match`, and the host could not be looked at
            yield ok(Sentence("the configuration can be used"))
        else:
            yield ok(Sentence("the configuration names no GPU: virtual machines get none by themselves"))


def prometheus(seen: Seen) -> Iterator[Said]:
    """One that runs here is there to watch: that it does not know of us is most likely forgotten.

    By way of node_exporter there is no job of ours to look for.
    """
    metrics = seen.config.metrics
    served = metrics.enabled and metrics.address and not metrics.textfile_directory
    if not (served and seen.prometheus.there and seen.unit(PROMETHEUS).active):
        return
    mend = ("gpuswitchctl setup prometheus",)
    if not seen.prometheus.scrapes:
        yield warning(
            Sentence("Prometheus runs on this machine, and has no job gpuswitch: it does not ask for the metrics"),
            Sentence("have it ask, and give it the alerts"),
            mend,
        )
    elif not seen.prometheus.alerts:
        yield warning(
            Sentence("Prometheus asks for the metrics, and has none of the alerts"),
            Sentence("give it the alerts"),
            mend,
        )
    else:
        yield ok(Sentence("Prometheus asks for the metrics, and has the alerts"))
