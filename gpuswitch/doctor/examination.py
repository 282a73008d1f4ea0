"""An examination: look once, judge, and say what could not be seen.

Nothing is changed, and nothing is waited for beyond `gathering.LOOK_SECONDS` for each round of looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

from gpuswitch.config.settings import Config
from gpuswitch.doctor.findings import Area, Check, Finding, Said, Severity, Unseen
from gpuswitch.doctor.gathering import LookError, gathered
from gpuswitch.doctor.looks import configuration, early, host, incus, installed, prometheus, system, units
from gpuswitch.doctor.looks import libvirt as libvirt_look
from gpuswitch.doctor.looks import tools as tools_look
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.seen import (
    Configuration,
    Early,
    IncusDevice,
    Installation,
    Libvirt,
    OtherTools,
    Patient,
    Prometheus,
    Seen,
    Service,
    System,
    Unit,
)
from gpuswitch.doctor.table import CHECKS
from gpuswitch.errors import InvalidArgument, NoSuchGpu
from gpuswitch.fleet.fitting import fitted
from gpuswitch.fleet.matching import found
from gpuswitch.gpu.observe import observe
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.gpu import Gpu, discover
from gpuswitch.model.holders import Holder
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.planning import requirements as rules
from gpuswitch.switch.planning.guards import Blocker, blockers
from gpuswitch.switch.restore_state import RestoreState

_Look = TypeVar("_Look")
Gather = Callable[[Mapping[str, Callable[[], object]]], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found. `gpus` are those that were judged, `passed_over` those that were not, by address.

    `host_seen`: the host was looked at, and there are no others.
    """

    findings: tuple[Finding, ...]
    unseen: tuple[Unseen, ...]
    gpus: tuple[str, ...]
    passed_over: tuple[str, ...]
    system: System
    as_root: bool
    host_seen: bool = True

    @property
    def severity(self) -> Severity:
        """The worst there is. What could not be looked at without root is none; a look that hangs is a warning."""
        unknown = any(not each.for_root for each in self.unseen)
        return max([Severity.WARNING if unknown else Severity.OK, *(finding.severity for finding in self.findings)])


def examine(machine: Machine, service: Service, named: Sequence[str] = (), *, gather: Gather = gathered) -> Examination:
    """Look at a machine, and judge the GPUs that are `named`; else those that are managed; else all.

    `gather` is how looks are taken: by processes of their own, unless a test has another way.

    Raises:
        NoSuchGpu: one of them is none of this machine.
    """
    seen = look(machine, service, named, gather=gather)
    others = [str(each.address) for each in seen.gpus if each not in [patient.gpu for patient in seen.patients]]
    return Examination(
        tuple(findings(seen)),
        seen.unseen,
        tuple(str(patient.address) for patient in seen.patients),
        tuple(others),
        seen.system,
        seen.as_root,
        seen.facts is not None,
    )


def findings(seen: Seen) -> Iterator[Finding]:
    """All that the checks say, in the order of the table; of each GPU together."""
    for check in CHECKS:
        if check.run is not None and check.area in {Area.MACHINE, Area.SERVICE}:
            yield from _told(check, "", check.run(seen))
    for patient in seen.patients:
        for check in CHECKS:
            if check.of_gpu is not None:
                yield from _told(check, str(patient.address), check.of_gpu(seen, patient))
    for check in CHECKS:
        if check.run is not None and check.area not in {Area.MACHINE, Area.SERVICE}:
            yield from _told(check, "", check.run(seen))


def _told(check: Check, subject: str, said: Iterable[Said]) -> Iterator[Finding]:
    for it in said:
        yield Finding(check.kind, check.area, subject, it.severity, it.reason, it.remedy, it.commands)


def look(machine: Machine, service: Service, named: Sequence[str] = (), *, gather: Gather = gathered) -> Seen:
    """Everything that checks know. First the configuration, then all that it is about, then who has that open.

    Raises:
        NoSuchGpu: one of `named` is no GPU of this machine.
    """
    sight = _Sight(machine, gather)
    read = sight.of("configuration", configuration.look, Configuration())
    config = read.config
    rules_of_gpus = (*(each.rules for each in config.gpus), *(each.rules for each in config.sought))
    wanted = [str(unit) for gpu in (config.defaults, *rules_of_gpus) for unit in gpu.stop_units]
    names = tuple(dict.fromkeys([*units.ASKED, *wanted]))
    sight.take(
        {
            "host": lambda _: host.look(machine, config),
            "system": system.look,
            "units": partial(units.look, names=names),
            "installation": installed.look,
            "libvirt": libvirt_look.look,
            "other tools": tools_look.look,
            "Incus": incus.look,
            "initrd": early.look,
            "Prometheus": prometheus.look,
        }
    )
    seen = Seen(
        system=sight.found("system", System()),
        units=sight.found("units", cast("Mapping[str, Unit] | None", None)),
        installation=sight.found("installation", Installation()),
        libvirt=sight.found("libvirt", Libvirt()),
        tools=sight.found("other tools", OtherTools()),
        incus=sight.found("Incus", cast("tuple[IncusDevice, ...]", ())),
        early=sight.found("initrd", Early()),
        prometheus=sight.found("Prometheus", Prometheus()),
        service=service,
        configuration=read,
        config=config,
        vendor_reset=Files(machine).there("/sys/module/vendor_reset"),
        as_root=machine.as_root,
    )
    looked = sight.found("host", cast("host.Host | None", None))
    if looked is not None:
        seen = _with_gpus(seen, looked, named, sight)
    elif named:
        why = next(each.why for each in sight.unseen if each.what == "host")
        raise NoSuchGpu(Sentence("the host could not be looked at: {why}", why=why))
    return replace(seen, unseen=tuple(dict.fromkeys(sight.unseen)))


def _with_gpus(seen: Seen, looked: host.Host, named: Sequence[str], sight: _Sight) -> Seen:
    facts = looked.facts
    config, _, nowhere = found(seen.config, facts)
    config, misfits = fitted(config, discover(facts, config.members), facts)
    gpus = discover(facts, config.members)
    chosen = _chosen(gpus, config, named)
    counts = bool(named) or any(config.gpu(gpu.address).managed for gpu in chosen)
    patients = tuple(_patient(gpu, facts, config, seen.service, looked, counts=counts) for gpu in chosen)
    return replace(
        seen,
        facts=facts,
        gpus=gpus,
        patients=_with_holders(patients, facts, config, seen, sight),
        config=config,
        misfits=(*nowhere, *misfits),
        missing_drivers=looked.missing_drivers,
    )


def _chosen(gpus: Sequence[Gpu], config: Config, named: Sequence[str]) -> list[Gpu]:
    if named:
        return list(dict.fromkeys(_named(gpus, config, name) for name in named))
    return [gpu for gpu in gpus if config.gpu(gpu.address).managed] or list(gpus)


def _named(gpus: Sequence[Gpu], config: Config, name: str) -> Gpu:
    """By its name in the configuration in any case, or by the address of any of its functions.

    Raises:
        NoSuchGpu: with those that there are.
    """
    wanted: Collection[PciAddress] = [each.address for each in config.gpus if each.name.casefold() == name.casefold()]
    if not wanted:
        try:
            wanted = [PciAddress.parse(name)]
        except InvalidArgument:
            wanted = []
    for gpu in gpus:
        if set(wanted).intersection(gpu.functions):
            return gpu
    known = ", ".join(str(gpu.address) for gpu in gpus)
    if known:
        raise NoSuchGpu(Sentence("no GPU is named {name}; this host has {gpus}", name=repr(name[:80]), gpus=known))
    raise NoSuchGpu(Sentence("there is no GPU on this host"))


def _patient(
    gpu: Gpu, facts: HostFacts, config: Config, service: Service, looked: host.Host, *, counts: bool
) -> Patient:
    told = service.gpus.get(str(gpu.address))
    state = told.at if told is not None else observe(gpu, facts, RestoreState())
    found = list(blockers(gpu, State.VFIO, state, facts, config))
    if state is State.HOST:
        found += _requirements(gpu, facts, config)
    memory = max((looked.memory.get(function, 0) for function in gpu.functions), default=0)
    return Patient(gpu, state, counts, tuple(found), memory)


def _requirements(gpu: Gpu, facts: HostFacts, config: Config) -> Iterator[Blocker]:
    """As `DetachSurvey.run` has them, but for what needs a worker of the service."""
    bound = rules.bound_drivers(gpu, facts, config.gpu(gpu.address).rules.module_policy)
    yield from rules.cannot_let_go(gpu, facts, config, bound)
    yield from rules.cannot_unload(gpu, facts, config, bound)
    yield from rules.no_way_home(facts, bound)
    yield from rules.used_besides(gpu, facts, config, bound)


def _with_holders(
    patients: Sequence[Patient], facts: HostFacts, config: Config, seen: Seen, sight: _Sight
) -> tuple[Patient, ...]:
    """As the service says; else, as root, by a look of our own."""
    told = {p.address: seen.service.gpus.get(str(p.address)) for p in patients}
    known = {address: each.holders for address, each in told.items() if each is not None and each.holders is not None}
    queries = {
        patient.address: rules.query(
            patient.gpu, facts, rules.bound_drivers(patient.gpu, facts, config.gpu(patient.address).rules.module_policy)
        )
        for patient in patients
        if patient.address not in known and patient.state is State.HOST
    }
    if queries and not seen.as_root:
        why = Sentence("the service does not say it, and only root may look at what others have open")
        sight.unseen.append(Unseen("holders", why, for_root=True))
    elif queries:
        known |= sight.of(
            "holders", lambda _: host.holders(sight.machine, queries), dict[PciAddress, tuple[Holder, ...]]()
        )
    return tuple(replace(patient, holders=known.get(patient.address)) for patient in patients)


class _Sight:
    """Takes looks, and keeps what could not be seen."""

    def __init__(self, machine: Machine, gather: Gather) -> None:
        self.machine = machine
        self.unseen: list[Unseen] = []
        self._gather = gather
        self._found: dict[str, object] = {}

    def of(self, name: str, look: Callable[[Files], _Look], otherwise: _Look) -> _Look:
        """What one look sees."""
        self.take({name: look})
        return self.found(name, otherwise)

    def take(self, looks: Mapping[str, Callable[[Files], object]]) -> None:
        """Take these looks, all at once."""
        for name, said in self._gather(
            {name: partial(_seen, self.machine, each) for name, each in looks.items()}
        ).items():
            if isinstance(said, LookError):
                why = Sentence("the look at it does not return") if str(said) == "late" else Sentence.of(said)
                self.unseen.append(Unseen(name, why))
            else:
                self._found[name], unseen = cast("tuple[object, list[Unseen]]", said)
                self.unseen += unseen

    def found(self, name: str, otherwise: _Look) -> _Look:
        """What a look has seen; `otherwise` where it has not come back."""
        return cast("_Look", self._found.get(name, otherwise))


def _seen(machine: Machine, look: Callable[[Files], object]) -> tuple[object, list[Unseen]]:
    files = Files(machine)
    return look(files), files.unseen
