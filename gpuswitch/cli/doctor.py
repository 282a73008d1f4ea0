"""`doctor`: what keeps this machine from giving its GPUs away, with what to do about it.

The one verb that looks at the machine by itself, in this process: it has to work where there is no service to ask. What
the service knows better (states, holders) it is asked for, where it runs; it is not started for this.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from gpuswitch.cli.client import Gpu
from gpuswitch.cli.client import Service as Bus
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.layout import hung
from gpuswitch.cli.output import as_json, cells, clean, in_colour, line, write
from gpuswitch.cli.simulated import tell_of_this_machine
from gpuswitch.cli.translate import _, is_english, mark, reworded
from gpuswitch.doctor.examination import Examination, examine
from gpuswitch.doctor.findings import Area, Finding, Severity
from gpuswitch.doctor.machine import Machine
from gpuswitch.doctor.seen import Service, Told
from gpuswitch.errors import NoSuchGpu
from gpuswitch.model.holders import Holder, Process, Unit, doubt
from gpuswitch.sentence import Sentence

_BUS_SECONDS = 5.0
_WORDS = {Severity.OK: mark("ok"), Severity.WARNING: mark("warning"), Severity.PROBLEM: mark("problem")}
_COLOURS = {Severity.OK: "32", Severity.WARNING: "33", Severity.PROBLEM: "1;31"}
_HEADINGS = {
    Area.MACHINE: mark("Machine"),
    Area.SERVICE: mark("gpuswitch"),
    Area.GPU: mark("GPU {gpu}"),
    Area.LIBVIRT: mark("libvirt"),
    Area.OTHER_TOOLS: mark("Other tools"),
}


def doctor(args: Namespace, machine: Machine | None = None) -> int:
    """Examine this machine, and return how bad it is: 0 well, 1 warnings, 2 problems."""
    seen = service_seen(args.bus)
    if machine is None and tell_of_this_machine(args.bus):
        seen = replace(seen, gpus={})  # they are not those of this machine, whatever their addresses
    try:
        found = examine(machine or Machine(), seen, args.gpus)
    except NoSuchGpu as error:
        raise CtlError.of(NoSuchGpu, in_their_language(Sentence.of(error))) from None
    if args.json:
        as_json(_record(found))
    else:
        _show(found, short=args.short)
    return int(found.severity)


# What the service says ----------------------------------------------------------------------------------------------


def service_seen(address: str | None) -> Service:
    """What it says of itself. That the bus has nobody of that name is no fault."""
    try:
        with closing(Bus.connect(address)) as bus:
            return _asked(bus, address) if bus.runs(_BUS_SECONDS) else Service()
    except CtlError as error:
        return Service(why=str(error))


def _asked(bus: Bus, address: str | None) -> Service:
    # One on another bus was started by hand, and has another configuration than the one in /etc.
    settings = bus.config() if address is None else []
    return Service(
        running=True,
        version=bus.version(_BUS_SECONDS),
        settings={each["key"]: each["value"] for each in settings},
        by_variables=frozenset(each["key"] for each in settings if str(each["origin"]).startswith("the variable ")),
        gpus={gpu.address: _told(gpu) for gpu in bus.gpus()},
    )


def _told(gpu: Gpu) -> Told:
    known = gpu.properties
    try:
        holders: tuple[Holder, ...] | None = tuple(map(_holder, gpu.holders())) if known["State"] == "host" else None
    except CtlError:  # a look of its own takes its place, where one may
        holders = None
    name, uuid = known["Owner"]
    remedies = {str(each["kind"]): _sentence(each) for each in known.get("Remedies", ())}
    return Told(known["State"], known["Reason"], name or uuid, known["StaysOut"], holders, remedies)


def _sentence(values: Mapping[str, Any]) -> Sentence:
    """As the service has made it of its `template` and `data`."""
    data = {name: _sentence(value) if isinstance(value, Mapping) else value for name, value in values["data"].items()}
    return Sentence(values["template"], **data)


def _holder(values: Mapping[str, Any]) -> Holder:
    user = values["uid"] if values["user_unit"] else None
    return Holder(
        process=Process(values["pid"], 0) if values["pid"] else None,
        command=values["command"],
        uid=values["uid"],
        user=values["user"],
        unit=Unit(values["unit"], user) if values["unit"] else None,
        session=values["session"],
        nodes=tuple(values["nodes"]),
        doubt=doubt(values["doubt"]),
        machine=values["machine"],
    )


# Told ---------------------------------------------------------------------------------------------------------------


def _record(found: Examination) -> dict[str, Any]:
    return {
        "severity": found.severity.word,
        "as_root": found.as_root,
        "gpus": list(found.gpus),
        "not_judged": list(found.passed_over),
        "system": {
            "name": found.system.name,
            "kernel": found.system.kernel,
            "boot_loader": found.system.loader,
            "initramfs": found.system.initramfs,
        },
        "findings": [finding_record(each) for each in found.findings],
        "unseen": [{"what": each.what, "why": each.why, "for_root": each.for_root} for each in found.unseen],
    }


def finding_record(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "area": str(finding.area),
        "gpu": finding.subject or None,
        "severity": finding.severity.word,
        "reason": finding.reason,
        "remedy": finding.remedy or "",
        "commands": list(finding.commands),
    }


def _show(found: Examination, *, short: bool) -> None:
    told = [each for each in found.findings if not (short and each.severity is Severity.OK)]
    headings = dict.fromkeys((each.area, each.subject) for each in told)
    for area, subject in headings:
        write(_bold(_(_HEADINGS[area], gpu=subject)))
        here = [each for each in told if (each.area, each.subject) == (area, subject)]
        for finding in sorted(here, key=lambda each: -each.severity):
            show_finding(finding)
        write("")
    if found.passed_over:
        gpus = ", ".join(found.passed_over)
        line(
            _(
                "not judged, since they are not managed: {gpus}; to have one judged: {command}",
                gpus=gpus,
                command="gpuswitchctl doctor GPU",
            )
        )
    if found.host_seen and not found.gpus:
        line(_("there is no GPU on this host"))
    _show_unseen(found)
    counted = {severity: sum(each.severity is severity for each in found.findings) for severity in Severity}
    write(
        _(
            "problems: {problems}; warnings: {warnings}; ok: {ok}",
            problems=counted[Severity.PROBLEM],
            warnings=counted[Severity.WARNING],
            ok=counted[Severity.OK],
        )
    )


def show_finding(finding: Finding) -> None:
    word = _(_WORDS[finding.severity])
    wide = max(cells(_(each)) for each in _WORDS.values())
    lead = f"  {word}{' ' * (wide - cells(word))}  "
    paint = _COLOURS[finding.severity]
    for number, text in enumerate(in_their_language(finding.reason).split("\n")):
        hung(lead if not number else " " * cells(lead), text, paint=paint if not number else "")
    indent = " " * cells(lead)
    if finding.remedy is not None:
        hung(indent, _("to do: {remedy}", remedy=in_their_language(finding.remedy)))
    for command in finding.commands:
        # Whole, whatever the width: they are copied.
        write(f"{indent}  {clean(command)}")


def _show_unseen(found: Examination) -> None:
    for each in found.unseen:
        line(_("not seen: {what}: {why}", what=each.what, why=in_their_language(each.why)))
    if any(each.for_root for each in found.unseen):
        line(_("to see all of it: {command}", command="sudo gpuswitchctl doctor"))


def _bold(text: str) -> str:
    return f"\x1b[1m{clean(text)}\x1b[0m" if in_colour(sys.stdout) else clean(text)


def in_their_language(text: str) -> str:
    """In the language of whoever reads it."""
    return text if is_english() else reworded(str(text), [{"text": str(text), **_values(text)}])


def _values(text: str) -> dict[str, Any]:
    sentence = Sentence.of(text)
    data = {key: _values(each) if isinstance(each, Sentence) else each for key, each in sentence.data.items()}
    return {"template": sentence.template, "data": data}
