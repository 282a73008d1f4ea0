"""Of one GPU. What a switch is refused for, its own guards tell; here are words for where all is well."""

from __future__ import annotations

import json
from collections.abc import Iterator

from gpuswitch.doctor.findings import Said, ok, problem, warning
from gpuswitch.doctor.looks.units import PERSISTENCED
from gpuswitch.doctor.seen import Patient, Seen, Told
from gpuswitch.model.drivers import NVIDIA, profile_of, vfio_drivers, waits_for_ever
from gpuswitch.model.facts import VFIO_DRIVER, HostFacts, PciFunction
from gpuswitch.model.holders import Unit
from gpuswitch.model.policy import Busy
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import sentences
from gpuswitch.switch.planning import requirements as rules
from gpuswitch.switch.planning.guards import describe
from gpuswitch.switch.planning.remedies import to_set

NEIGHBOURS = frozenset({"neighbour", "no_iommu"})
RESERVED = frozenset({"reserved_region"})
BOOT_DISPLAY = frozenset({"boot_display"})
SHARED_OUT = frozenset({"virtual_functions", "mediated_devices"})
MEMBERS = frozenset({"missing_function", "member"})
DRIVER = frozenset({"driver_too_old", "no_unload", "no_modules", "module_users", "no_autoprobe"})
VFIO = frozenset({"no_vfio", "no_vfio_groups"})
STATE = frozenset({"wedged", "in_progress"})
HOLDERS = frozenset({"busy"})
UNITS = frozenset({"unknown_unit"})
_ONCE_MORE = frozenset({"recover", "to_host"})
"""Kinds of the service's remedies that are nothing else than what was tried."""

_AMD = 0x1002
_RESETS_BADLY = (
    *range(0x67C0, 0x6800), 0x6FDF, *range(0x6980, 0x69A0), *range(0x6860, 0x6880),
    *range(0x66A0, 0x66B0), *range(0x7310, 0x7320), *range(0x7340, 0x7350), *range(0x7360, 0x7363), 0x738C,
)  # fmt: skip
"""Polaris, Vega, Navi 1x, Arcturus: by their ranges, those that vendor-reset can reset (its src/device-db.h)."""
_ORDINARY_WINDOW = 1 << 28
"""256 MiB: as much of a card's memory as it shows without resizable BARs."""


def _blocked(patient: Patient, guards: frozenset[str], *, ever: bool = False) -> Iterator[Said]:
    """What the guards say. `ever`: it counts for a GPU that nobody has asked for, too."""
    say = problem if patient.counts or ever else warning
    for blocker in patient.blockers:
        if blocker.kind in guards:
            yield say(blocker.sentence)


def groups(seen: Seen, patient: Patient) -> Iterator[Said]:
    facts = seen.facts
    if facts is None or not facts.iommu:
        return  # told of the machine
    found = [*_blocked(patient, NEIGHBOURS)]
    yield from found
    if found:
        return
    numbers = ", ".join(map(str, patient.gpu.groups(facts)))
    others = patient.gpu.neighbours(facts)
    if others:
        yield ok(
            Sentence(
                "IOMMU group {groups}, shared with what is in nobody's way: {others}",
                groups=numbers,
                others=Sentence.joined(", ", map(describe, others)),
            )
        )
    else:
        yield ok(Sentence("alone in IOMMU group {groups}", groups=numbers))


def reserved(seen: Seen, patient: Patient) -> Iterator[Said]:
    found = [*_blocked(patient, RESERVED)]
    yield from found
    if not found and seen.facts is not None and seen.facts.iommu:
        yield ok(Sentence("the firmware claims no memory of its group"))


def boot_display(seen: Seen, patient: Patient) -> Iterator[Said]:
    found = [*_blocked(patient, BOOT_DISPLAY)]
    yield from found
    if not found and seen.facts is not None:
        booted = any(f.boot_display for f in patient.gpu.present(seen.facts))
        yield ok(
            Sentence("the machine booted on it, and it may be switched all the same (allow_boot_display)")
            if booted
            else Sentence("the machine did not boot on it")
        )


def shared_out(_: Seen, patient: Patient) -> Iterator[Said]:
    yield from _blocked(patient, SHARED_OUT)


def members(_: Seen, patient: Patient) -> Iterator[Said]:
    yield from _blocked(patient, MEMBERS)


def vfio_driver(seen: Seen, patient: Patient) -> Iterator[Said]:
    facts = seen.facts
    if facts is None or not facts.vfio_available or facts.vfio_without_groups:
        return  # told of the machine
    found = [*_blocked(patient, VFIO)]
    yield from found
    named = seen.config.gpu(patient.address).rules.vfio_driver
    names = [driver.name for driver in vfio_drivers(patient.gpu, facts, named).values()]
    if not found and set(names) != {VFIO_DRIVER}:
        yield ok(Sentence("goes to {drivers}", drivers=", ".join(dict.fromkeys(names))))


def state(seen: Seen, patient: Patient) -> Iterator[Said]:
    told = seen.service.gpus.get(str(patient.address))
    recover = (f"gpuswitchctl recover {patient.address}",)
    now = patient.state
    if now is State.WEDGED:
        yield from _blocked(patient, STATE, ever=True)
    elif now is State.FAILED:
        reason = Sentence("it is failed: {reason}", reason="; ".join(told.reason.splitlines()) if told else "")
        yield problem(reason, *_next(told, Sentence("put right what is named here, then bring it home"), recover))
    elif now is State.UNKNOWN:
        where = [f"{f.address}: {f.driver_name or '-'}" for f in patient.gpu.present(seen.facts)] if seen.facts else []
        reason = Sentence("it is neither on the host nor on vfio: {functions}", functions=", ".join(where))
        yield problem(reason, Sentence("bring it home"), recover)
    elif told is not None and told.stays_out:
        to_host = (f"gpuswitchctl to-host {patient.address}",)
        yield warning(
            Sentence(
                "it stays on vfio, since it did not come home: {reason}", reason="; ".join(told.reason.splitlines())
            ),
            *_next(told, Sentence("put right what is named here, then try again"), to_host),
        )
    elif told is not None and told.owner:
        yield ok(Sentence("on {state}, and it belongs to {owner}", state=now.value, owner=told.owner))
    else:
        yield ok(Sentence("on {state}", state=now.value))


def _next(told: Told | None, once_more: Sentence, commands: tuple[str, ...]) -> tuple[Sentence, tuple[str, ...]]:
    """What to do, with its commands: to try `once_more`, unless the service says that this alone does not help."""
    remedies = told.remedies if told is not None else {}
    others = Sentence.joined("; ", (remedy for kind, remedy in remedies.items() if kind not in _ONCE_MORE))
    if not others:
        return once_more, commands
    if _ONCE_MORE & remedies.keys():
        return Sentence("{first}; if that does not help: {others}", first=once_more, others=others), commands
    return Sentence(
        "it has failed again at the same step, and once more alone does not help: {others}", others=others
    ), ()


def managed(seen: Seen, patient: Patient) -> Iterator[Said]:
    own = seen.config.gpu(patient.address)
    if not own.managed:
        yield ok(
            Sentence(
                "not managed: virtual machines do not get it by themselves; to change that: {command}",
                command="gpuswitchctl config edit",
            )
        )
    elif own.name:
        yield ok(Sentence("managed, by the name of {name}", name=own.name))
    else:
        yield ok(Sentence("managed"))


def driver(seen: Seen, patient: Patient) -> Iterator[Said]:
    facts = seen.facts
    if facts is None:
        return
    yield from _blocked(patient, DRIVER)
    for function in patient.gpu.present(facts):
        if not function.makes_gpu:
            continue
        if function.driver is None:
            yield warning(
                Sentence("{function} has no driver", function=function.address),
                Sentence("install the driver of its maker, or load it"),
                _load(function),
            )
        elif not function.on_vfio:
            yield from _host_driver(facts, function)


def _load(function: PciFunction) -> tuple[str, ...]:
    """By what it says that it is: whatever module is for it."""
    return (f"modprobe --use-blacklist {function.modalias}",) if function.modalias else ()


def _host_driver(facts: HostFacts, function: PciFunction) -> Iterator[Said]:
    assert function.driver is not None  # noqa: S101 -- the caller has seen it
    profile = profile_of(function.driver)
    module = facts.modules.get(profile.module)
    version = module.version if module else ""
    named = {"driver": function.driver.name, "version": version}
    if waits_for_ever(profile, version):
        since = ".".join(f"{number:02}" for number in profile.forgets_from)
        yield warning(
            Sentence(
                "{driver} {version} waits for ever for a program that opens the GPU in the midst of a switch; only a "
                "restart of the machine ends that",
                **named,
            ),
            Sentence("install a driver before {since}; until then end what uses the GPU before a switch", since=since),
        )
    elif version:
        yield ok(Sentence("on {driver} {version}", **named))
    else:
        yield ok(Sentence("on {driver}", driver=function.driver.name))


def persistence(seen: Seen, patient: Patient) -> Iterator[Said]:
    facts = seen.facts
    if facts is None or not any(f.driver_name == NVIDIA.driver for f in patient.gpu.present(facts)):
        return
    if seen.unit(PERSISTENCED).active:
        yield ok(Sentence("{unit} runs; a switch stops it, and starts it again", unit=PERSISTENCED))
    modeset = facts.modules.get(NVIDIA.modeset)
    if modeset is not None and modeset.modeset:
        yield ok(Sentence("{module} has modeset on: consoles and desktops draw on it", module=NVIDIA.modeset))


def holders(seen: Seen, patient: Patient) -> Iterator[Said]:
    """As `survey.py` judges them, as far as that can be told without asking systemd for each unit."""
    facts = seen.facts
    if facts is None or patient.holders is None or patient.state is not State.HOST:
        return
    own = seen.config.gpu(patient.address).rules
    leaving = rules.leaving_as_configured(patient.gpu, facts, seen.config, patient.holders)
    staying = [holder for holder in patient.holders if not leaving.takes(holder)]
    if not patient.holders:
        yield ok(Sentence("nobody has it open"))
    elif not staying:
        yield ok(Sentence("who has it open goes by itself, or is stopped by the switch"))
    elif own.busy is not Busy.REFUSE:
        yield ok(Sentence("programs have it open: {busy} is what becomes of them", busy=own.busy.value))
    else:
        for sentence in sentences(patient.address, staying):
            yield warning(sentence)
        display = next((h for h in staying if h.unit == Unit("systemd-logind.service") or h.session), None)
        if display is not None:
            wanted = json.dumps([*map(str, own.stop_units), "display-manager.service"])
            lines = to_set(seen.config, patient.gpu, "stop_units", wanted)
            yield warning(
                Sentence(
                    "a desktop draws on it; to have it stopped for a switch, and started after it: {set}", set=lines
                )
            )


def units(seen: Seen, patient: Patient) -> Iterator[Said]:
    """Those that a switch is to stop: systemd has to know them."""
    if seen.units is None:
        return
    for name in seen.config.gpu(patient.address).rules.stop_units:
        if not seen.unit(str(name)).found:
            yield problem(rules.no_such_unit(patient.gpu, seen.config, Unit(str(name))))


def reset(seen: Seen, patient: Patient) -> Iterator[Said]:
    facts = seen.facts
    if facts is None:
        return
    for function in patient.gpu.present(facts):
        if function.vendor == _AMD and function.makes_gpu and function.device in _RESETS_BADLY:
            if seen.vendor_reset:
                yield ok(Sentence("vendor-reset is loaded, which knows how to reset this card"))
            else:
                yield warning(
                    Sentence("cards of this kind often do not come back from a reset without the module vendor-reset"),
                    Sentence("build it (github.com/gnif/vendor-reset), then load it"),
                    ("modprobe vendor-reset",),
                )


def rebar(_: Seen, patient: Patient) -> Iterator[Said]:
    """No setting of ours. Some guests stay black with a large window, which is for who wonders about that."""
    if patient.memory > _ORDINARY_WINDOW:
        size = f"{patient.memory >> 20} MiB" if patient.memory < 1 << 30 else f"{patient.memory >> 30} GiB"
        yield ok(
            Sentence(
                "it shows {size} of its memory at once (resizable BAR); where a guest stays black, try without, in the "
                "firmware's setup",
                size=size,
            )
        )
