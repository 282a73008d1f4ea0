"""`setup prometheus`: the Prometheus of this machine asks the service for its metrics, and has the alerts; and back.

It shows what would change in the configuration, asks, has promtool judge it, and puts it in place in one instant. There
its lines stand between two comments, so that they can be taken out again whatever somebody else has changed meanwhile.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from gpuswitch.cli.asking import agree, refuse_unasked
from gpuswitch.cli.changes import show_change
from gpuswitch.cli.client import Service
from gpuswitch.cli.draft import Draft
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.other_programs import run
from gpuswitch.cli.output import as_json, line
from gpuswitch.cli.prometheus_text import BEGIN, END, NoPlaceError, job, rule_file, with_items, without_ours
from gpuswitch.cli.reloading import by_key
from gpuswitch.cli.simulated import tell_of_another_machine
from gpuswitch.cli.translate import _
from gpuswitch.doctor.looks import system
from gpuswitch.doctor.looks.prometheus import CONFIGURATION, has_alerts, has_job, rules
from gpuswitch.doctor.looks.units import PROMETHEUS, look
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.remedies import install
from gpuswitch.errors import ConfigError, Failed, InvalidArgument, NotAuthorized

RELOAD = ("systemctl", "reload", PROMETHEUS)


class _Planned(NamedTuple):
    """What is to be written. `before` is what the file has now; `target` what is asked, as `127.0.0.1:9752`."""

    file: Path
    before: bytes
    text: str
    target: str
    rules: str

    @property
    def changes(self) -> bool:
        return self.before != self.text.encode()


def setup(args: Namespace, machine: Machine | None = None) -> int:
    """Ask, show, and do it.

    Raises:
        CtlError: nothing was changed; or it is written, and Prometheus could not be told.
    """
    if machine is None:
        tell_of_another_machine(args.bus, writes=not args.dry_run)
    machine = machine or Machine()
    files = Files(machine)
    _refuse_what_makes_no_sense(args, machine, files)
    with closing(Service.connect(args.bus)) as service:
        target = _target({key: each["value"] for key, each in by_key(service).items()})
    planned = _planned(files, target)
    if not args.json:
        _tell(planned)
    done: list[str] = []
    if planned.changes and not args.dry_run:
        if not args.yes:
            agree(_("Write this? [y/N]") + " ")
        _write(planned, files)
        done = _have_it_read(files, planned.file)
    if args.json:
        as_json(_record(args, planned, done))
    elif args.dry_run:
        line(_("nothing is written: this was a dry run"))
    elif planned.changes:
        line(_("{file} is written; to take it back: {command}", file=planned.file, command="gpuswitchctl setup undo"))
        _tell_of_reading(done)
    return 0


def to_take_back(machine: Machine) -> tuple[Path, bytes, str] | None:
    """The configuration with our lines in it, what it says, and what that is without them; None: it has none.

    Raises:
        CtlError: nobody can tell which lines are ours.
    """
    file = Path(machine.path(CONFIGURATION))
    try:
        before = file.read_bytes()
    except OSError:  # not there any more, or nothing that could be put back
        return None
    if not any(mark.encode() in before for mark in (BEGIN, END)):
        return None
    return file, before, _without(file, before)


def take_back(machine: Machine) -> tuple[list[Path], list[str]]:
    """Take our lines out: the files that had some, and the commands that were run.

    Raises:
        CtlError: nothing was changed; or it is written, and Prometheus could not be told.
    """
    if (found := to_take_back(machine)) is None:
        return [], []
    file, before, text = found
    files, draft = Files(machine), _draft(file, before, text)
    try:
        if files.program("promtool") and (fault := _fault(files, draft.path, file)) is not None:
            said = _("cannot take our lines out of {file}: {why}; take them out by hand", file=file, why=fault)
            raise CtlError.of(ConfigError, said)
        _replace(draft)
    finally:
        draft.drop()
    return [file], _have_it_read(files, file)


# What makes no sense -------------------------------------------------------------------------------------------------


def _refuse_what_makes_no_sense(args: Namespace, machine: Machine, files: Files) -> None:
    if not files.there(CONFIGURATION):
        commands = install(system.look(files), "prometheus")
        text = _("cannot set up Prometheus: there is no {file}", file=CONFIGURATION)
        if commands:
            text = _("{text}; to install it: {command}", text=text, command=" && ".join(commands))
        raise CtlError.of(InvalidArgument, text)
    if not args.dry_run and not files.program("promtool"):
        text = _(
            "cannot judge what would be written: {program} is not installed; it comes with Prometheus",
            program="promtool",
        )
        raise CtlError.of(InvalidArgument, text)
    if not args.dry_run and not machine.as_root:
        text = _(
            "cannot write {file}: it takes root: {command}",
            file=CONFIGURATION,
            command="sudo gpuswitchctl setup prometheus",
        )
        raise CtlError.of(NotAuthorized, text)
    refuse_unasked(args, "gpuswitchctl setup prometheus --help")


def _target(settings: Mapping[str, str]) -> str:
    """Where the service of this machine serves its metrics, as this machine reaches it.

    Raises:
        CtlError: it does not, or only to those who have a certificate.
    """
    metrics = {
        key: tomllib.loads(f"value = {settings[f'metrics.{key}']}")["value"]
        for key in ("enabled", "address", "port", "certificate")
    }
    address, port = metrics["address"], metrics["port"]
    edit = "gpuswitchctl config edit"
    if not metrics["enabled"] or not address:
        text = _(
            "cannot have the metrics asked for: metrics.enabled and metrics.address serve none; first: {command}",
            command=edit,
        )
        raise CtlError.of(ConfigError, text)
    if not port:
        text = _(
            "cannot have the metrics asked for: metrics.port is 0, another one each time; set one: {command}",
            command=edit,
        )
        raise CtlError.of(ConfigError, text)
    if metrics["certificate"]:
        text = _(
            "cannot have the metrics asked for: they are served over HTTPS (metrics.certificate), and nobody can tell "
            "which certificates Prometheus is to use; write the job by hand: docs/monitoring.md has it"
        )
        raise CtlError.of(ConfigError, text)
    where = ipaddress.ip_address(address)
    if where.is_unspecified:
        where = ipaddress.ip_address("127.0.0.1" if where.version == 4 else "::1")
    return f"[{where}]:{port}" if where.version == 6 else f"{where}:{port}"


# What is to be done --------------------------------------------------------------------------------------------------


def _planned(files: Files, target: str) -> _Planned:
    file = Path(files.machine.path(CONFIGURATION))
    alerts = rules(files)
    if not alerts:
        raise CtlError.of(Failed, _("cannot find {program}; install gpuswitch anew", program="gpuswitch.rules.yml"))
    try:
        before = file.read_bytes()
    except OSError as error:
        raise CtlError.of(Failed, _("cannot read {file}: {why}", file=file, why=error.strerror)) from error
    text = _without(file, before)
    for there, key, item in (
        (has_job(files, text), "scrape_configs", job(target, os.uname().nodename)),
        (has_alerts(files, text), "rule_files", rule_file(alerts)),
    ):
        if there:
            continue
        try:
            text = with_items(text, key, item)
        except NoPlaceError as error:
            told = _(
                "cannot put lines into {file}: it has '{line}'; write that list a line each, or put in by hand: {item}",
                file=file,
                line=error,
                item=f"{key}: [{_in_one_line(item)}]",
            )
            raise CtlError.of(Failed, told) from None
    return _Planned(file, before, text, target, alerts)


def _in_one_line(item: Sequence[str]) -> str:
    """The same in brackets, which YAML has, too."""
    if len(item) == 1:
        return item[0].removeprefix("- ")
    name, _key, targets, labels = (each.strip().removeprefix("- ") for each in item)
    return f"{{{name}, static_configs: [{{{targets}, {labels}}}]}}"


def _without(file: Path, content: bytes) -> str:
    try:
        return without_ours(content.decode())
    except UnicodeDecodeError:
        raise CtlError.of(
            Failed, _("cannot use {file}: it is no text in UTF-8; nothing is changed", file=file)
        ) from None
    except NoPlaceError as error:
        text = _(
            "cannot tell which lines of {file} are ours: it has '{line}' without its other end; take them out by hand",
            file=file,
            line=error,
        )
        raise CtlError.of(Failed, text) from None


# What is said and done -----------------------------------------------------------------------------------------------


def _tell(planned: _Planned) -> None:
    if not planned.changes:
        line(_("nothing is to be written: {file} says all of this already", file=planned.file))
        return
    show_change(str(planned.file), planned.before.decode(), planned.text)


def _write(planned: _Planned, files: Files) -> None:
    """Beside it, for promtool: what is named in there is relative to its folder."""
    draft = _draft(planned.file, planned.before, planned.text)
    try:
        fault = _fault(files, draft.path, planned.file)
        if fault is not None and (own := _fault(files, planned.file, planned.file)) is not None:
            text = _("cannot set up Prometheus: it has faults as it is: {why}; correct them first", why=own)
            raise CtlError.of(ConfigError, text)
        if fault is not None:
            text = _(
                "cannot use {file} with what setup would write: {why}; nothing is changed", file=planned.file, why=fault
            )
            raise CtlError.of(ConfigError, text)
        _replace(draft)
    finally:
        draft.drop()


def _draft(file: Path, before: bytes, text: str) -> Draft:
    try:
        return Draft(file, before, text.encode())
    except OSError as error:
        raise _cannot_write(file, error) from error


def _replace(draft: Draft) -> None:
    try:
        if not draft.replace():
            text = _(
                "cannot write {file}: somebody else changed it meanwhile; nothing is changed; do it again",
                file=draft.file,
            )
            raise CtlError.of(Failed, text)
    except OSError as error:
        raise _cannot_write(draft.file, error) from error


def _cannot_write(file: Path, error: OSError) -> CtlError:
    return CtlError.of(Failed, _("cannot write {file}: {why}; nothing is changed", file=file, why=error.strerror))


def _fault(files: Files, file: Path, name: Path) -> str | None:
    """What promtool has against it, by the name that it will have."""
    said = run(files, ("promtool", "check", "config", str(file)))
    return None if said is None else said.replace(str(file), str(name))


def _have_it_read(files: Files, file: Path) -> list[str]:
    """Have the running Prometheus read it: what was run. One that does not run reads it when it starts."""
    unit = (look(files, [PROMETHEUS]) or {}).get(PROMETHEUS)
    if unit is None or not unit.active:
        return []
    if (fault := run(files, RELOAD)) is not None:
        text = _(
            "{file} is written, and Prometheus was not told: {why}; once that is mended: {command}",
            file=file,
            why=fault,
            command=" ".join(RELOAD),
        )
        raise CtlError.of(Failed, text)
    return [" ".join(RELOAD)]


def _tell_of_reading(done: Sequence[str]) -> None:
    if not done:
        line(
            _(
                "Prometheus does not run, and reads it when it starts: {command}",
                command=f"systemctl enable --now {PROMETHEUS}",
            )
        )
    for each in done:
        line(_("this was run: {command}", command=each))


def _record(args: Namespace, planned: _Planned, done: Sequence[str]) -> dict[str, Any]:
    """docs/json.md has the form."""
    return {
        "path": str(planned.file),
        "text": planned.text,
        "before": planned.before.decode(),
        "changed": planned.changes and not args.dry_run,
        "dry_run": args.dry_run,
        "target": planned.target,
        "rules": planned.rules,
        "commands": list(done),
    }
