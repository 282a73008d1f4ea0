"""The verbs that look and change nothing: `list`, `status`, `holders`, `config`."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpuswitch.cli.client import Service, gpus_named, title_of, to_manage
from gpuswitch.cli.configuration import refused_on_disk
from gpuswitch.cli.layout import model_in_brief, pairs, table
from gpuswitch.cli.output import SINCE, as_json, clock, duration, line, lines_of, moment, on_terminal, warning, write
from gpuswitch.cli.records import came_back, gpu_record, naming, reasons, remedies_of, state_label
from gpuswitch.cli.translate import _, added_word, marks, recognized, reworded, state_word, step_title

Values = Mapping[str, Any]
_DID_NOT_WORK = re.compile(r"(?:cannot [^:]+: )*cannot (.+?): ")
"""How the error of one operation begins (KernelError in errors.py), and what was to be done by it."""
_ONCE_MORE = frozenset({"recover", "to_host"})
"""Kinds of remedies that are nothing else than what was tried."""


def list_gpus(service: Service, args: Namespace) -> int:
    there = service.gpus()
    gpus = [gpu.properties for gpu in there]
    warnings = service.warnings()
    if args.json:
        as_json({"gpus": [gpu_record(gpu) for gpu in gpus], "warnings": warnings})
        return 0
    if gpus:
        adding = marks("WITH") if any(gpu["Adds"] for gpu in gpus) else ()
        headings = (*marks("GPU", "NAME", "STATE", "OWNER", "MANAGED", "DRIVER", "GROUP"), *adding, *marks("MODEL"))
        rows = (_gpu_cells(gpu, adding=bool(adding)) for gpu in gpus)
        # Who has a GPU is what people look for, and STATE says most of DRIVER; a name is copied.
        nameless = () if any(gpu["Name"] for gpu in gpus) else ("NAME",)
        narrow = ("MODEL", "WITH", "DRIVER", "GROUP", "MANAGED", *nameless)
        table(headings, rows, elastic=("MODEL", "WITH"), left_out=narrow, brief={"MODEL": model_in_brief})
        if on_terminal(sys.stdout) and not any(gpu["Managed"] for gpu in gpus):
            line(_("no GPU is managed, so virtual machines do not get one by themselves"))
            line(to_manage(service, there))
    else:
        line(_("there is no GPU on this host"))
    _warn(warnings)
    return 0


def _warn(sentences: Iterable[str]) -> None:
    """Beside the answer, so that programs which read that do not meet it."""
    for sentence in sentences:
        warning(recognized(sentence))


def _gpu_cells(gpu: Values, *, adding: bool) -> tuple[str, ...]:
    return (
        gpu["Address"],
        gpu["Name"],
        state_label(gpu),
        _owner_words(gpu["Owner"]),
        _("yes") if gpu["Managed"] else _("no"),
        gpu["Driver"],
        " ".join(map(str, gpu["IommuGroups"])),
        *((", ".join(map(added_word, gpu["Adds"])),) if adding else ()),
        gpu["Model"],
    )


def _owner_words(owner: Sequence[str]) -> str:
    """The virtual machine by its name; by its uuid where it has none."""
    name, uuid = owner
    return name or uuid


def status(service: Service, args: Namespace) -> int:
    gpus = [gpu.properties for gpu in gpus_named(service, args.gpus)]
    if args.json:
        as_json({"gpus": [gpu_record(gpu) for gpu in gpus]})
    elif not gpus:
        line(_("there is no GPU on this host"))
    else:
        for number, gpu in enumerate(gpus):
            if number:
                write("")
            pairs(list(_status_lines(gpu)))
    return 0


def holders(service: Service, args: Namespace) -> int:
    gpus = gpus_named(service, args.gpus)
    found = [(gpu, holder) for gpu in gpus for holder in gpu.holders()]
    if args.json:
        as_json({"holders": [{**naming(gpu), **holder} for gpu, holder in found]})
    elif found:
        several = len(gpus) > 1
        headings = (
            *(("GPU",) if several else ()),
            *marks("PID", "COMMAND", "USER", "UNIT", "SESSION", "HAS OPEN", "TO FREE IT"),
        )
        rows = (((gpu.address,) if several else ()) + _holder_cells(holder) for gpu, holder in found)
        table(headings, rows, elastic=("HAS OPEN",))
    else:
        line(_("nobody has it open") if len(gpus) == 1 else _("nobody has any of them open"))
    return 0


def _holder_cells(holder: Values) -> tuple[str, ...]:
    return (
        str(holder["pid"] or _("kernel")),
        holder["command"],
        holder["user"],
        holder["unit"],
        holder["session"],
        " ".join(holder["nodes"]) or recognized(holder["doubt"]),
        # Of a service that is older, nobody can tell.
        _("nothing to do: a switch to vfio does it") if holder.get("goes_by_itself") else holder["remedy"],
    )


def config(service: Service, args: Namespace) -> int:
    settings = [each for each in service.config() if not args.changed or each["value"] != each["default"]]
    about = service.about()
    # The service of another bus may be one of another machine.
    on_disk = refused_on_disk(about) if not args.bus or about.get("Simulated") else []
    warnings = [*service.warnings(), *on_disk]
    if args.json:
        as_json({"settings": settings, "warnings": warnings})
        return 0
    if settings:
        table(marks("KEY", "VALUE", "SET BY"), map(_setting_cells, settings))
    else:
        line(_("everything is as by default"))
    _warn(warnings)
    return 0


def _setting_cells(setting: Values) -> tuple[str, ...]:
    origin = _("default") if setting["origin"] == "default" else setting["origin"]
    return setting["key"], setting["value"], origin


def _status_lines(gpu: Values) -> Iterable[tuple[str, str]]:
    yield "GPU", title_of(gpu)
    yield _("model"), gpu["Model"] or gpu["Vendor"]
    yield _("state"), _("{state} since {moment}", state=state_label(gpu), moment=moment(gpu["StateSince"]))
    # What an earlier switch met stands with that, at the end.
    now = reasons(gpu)[0]
    for number, sentence in enumerate(lines_of(now) if now else []):
        yield "" if number else _("reason"), sentence
    if gpu["State"] == "failed" or remedies_of(gpu):
        for number, sentence in enumerate(what_to_do(gpu)):
            yield "" if number else _("to do"), sentence
    if (gpu["State"] in {"failed", "wedged"} or gpu["StaysOut"]) and gpu["Switch"]:
        yield _("kernel"), _("what it said meanwhile: {command}", command=f"gpuswitchctl show {gpu['Switch']['id']}")
    for number, bound in enumerate(function_words(gpu)):
        yield "" if number else _("functions"), bound
    yield _("host driver"), gpu["HostDriver"] or "-"
    if gpu["TrialEnds"]:
        keep = f"gpuswitchctl to-vfio {gpu['Name'] or gpu['Address']}"
        ends = moment(gpu["TrialEnds"])
        if gpu["State"] in {"vfio", "detaching"}:
            ends = _("{moment}; to keep it on vfio: {command}", moment=ends, command=keep)
        yield _("trial ends"), ends
    # A service that is older does not say which.
    if stopped := gpu.get("StoppedUnits"):
        yield _("stopped units"), _("{units}, until it is home", units=", ".join(stopped))
    if gpu["StaysOut"]:
        yield (
            _("tried again"),
            _("when a program that had it open is gone, when its driver is loaded anew, when the service starts"),
        )
    if gpu["Adds"]:
        yield _("with"), ", ".join(map(added_word, gpu["Adds"]))
    yield _("IOMMU groups"), " ".join(map(str, gpu["IommuGroups"])) or "-"
    if gpu["Match"]:
        yield _("match"), _match_words(gpu["Match"])
        yield "", _("for a [[gpu]] table, instead of address")
    yield _("managed"), _("yes") if gpu["Managed"] else _("no")
    if gpu["AtBoot"] != "keep":
        yield _("at boot"), gpu["AtBoot"]
    name, uuid = gpu["Owner"]
    yield _("owner"), f"{name} ({uuid})" if name and uuid else name or uuid or "-"
    if gpu["Switch"]:
        first, *more = _switch_lines(gpu["Switch"], now)
        yield _("last switch") if gpu["Switch"]["result"] else _("switch"), first
        yield from (("", each) for each in more)


def _match_words(match: Mapping[str, str]) -> str:
    """As the configuration takes it."""
    said = ", ".join(f'{key} = "{value}"' for key, value in match.items())
    return f"{{ {said} }}"


def function_words(gpu: Values) -> list[str]:
    """Each of its functions, and the driver that has it now."""
    return [
        _("{function} {kind} on {driver}", function=address, kind=state_word(kind), driver=driver or _("no driver"))
        for address, kind, driver in gpu["Functions"]
    ]


def what_to_do(gpu: Values, *, switch: str = "") -> list[str]:
    """About a GPU that the service has remedies for, in sentences (`to_put_right`): about the last attempt, where that
    says what did not work.
    """
    word = gpu["Name"] or gpu["Address"]
    last = gpu["Reason"].rpartition(f"\n{SINCE}")[2]
    reason = last if _DID_NOT_WORK.match(last) else gpu["Reason"]
    verb = "to-host" if gpu["State"] == "vfio" else "recover"
    return to_put_right(reason, word, f"gpuswitchctl {verb} {word}", switch=switch, remedies=remedies_of(gpu))


def to_put_right(
    reason: str, word: str, command: str, *, switch: str = "", remedies: Sequence[Values] = ()
) -> list[str]:
    """What there is to do before `command` is typed, about a reason as the service tells it, in sentences; `word` is
    the GPU as it is typed. Where that says no more than what did not work, it is named once more, by the same name,
    and where the cause may be seen: nobody puts an `Invalid argument` right. With the id of its `switch`, that is
    shown, too. `remedies` are those of the service; where they are not to do the same once more, neither is `command`.
    """
    once_more = not remedies or any(remedy["kind"] in _ONCE_MORE for remedy in remedies)
    others = [reworded(each["text"], [each]) for each in remedies if each["kind"] not in _ONCE_MORE]
    if once_more:
        others = [_("if that does not help: {remedy}", remedy=each) for each in others]
    refused = _DID_NOT_WORK.match(reason)
    if not refused and once_more:
        return [_("put right what is named here, then: {command}", command=command), *others]
    kernel = [_("what the kernel said meanwhile: {command}", command=f"gpuswitchctl show {switch}")] if switch else []
    doctor = _("what may be wrong with this machine: {command}", command=f"gpuswitchctl doctor {word}")
    report = _("for a report of a fault, as root: {command}", command="gpuswitchctl report")
    if refused and once_more:
        what = step_title(refused[1])
        first, then = _("find out why '{what}' did not work:", what=what), _("then: {command}", command=command)
        return [first, *kernel, doctor, report, then, *others]
    if refused:
        what = step_title(refused[1])
        first = _("'{what}' has failed again, and this alone does not help: {command}", what=what, command=command)
    else:
        first = _("what is named here has failed again, and this alone does not help: {command}", command=command)
    return [first, *kernel, doctor, *others, report]


def _switch_lines(switch: Values, told: str) -> list[str]:
    """Of the switch under way, or the last; why that ended as it did only where that is not `told` of the GPU."""
    words, since = _switch_words(switch), came_back(switch)
    if not switch["result"] or not switch["reason"] or switch["reason"] in told:
        return [words, *since]
    first, *more = lines_of(switch["reason"])
    return [f"{words}: {first}", *more, *since]


def _switch_words(switch: Values) -> str:
    if not switch["result"]:
        words = _(
            "{id} to {target}: at step {index} of {count}, {title}",
            **{key: switch[key] for key in ("id", "target", "index", "count")},
            title=step_title(switch["title"]),
        )
        what = "; ".join(recognized(switch["waiting_for"]).splitlines())
        if what and switch["waiting_until"]:
            until = clock(switch["waiting_until"])
            return _("{words}; it waits until {time}: {what}", words=words, time=until, what=what)
        return _("{words}; it waits: {what}", words=words, what=what) if what else words
    return _(
        "{id} to {target}: {result} at {moment} after {duration}",
        **{key: switch[key] for key in ("id", "target")},
        result=state_word(switch["result"]),
        moment=moment(switch["finished"]),
        duration=duration(switch["finished"] - switch["started"]),
    )
