"""`setup`: from a machine as it is to one whose virtual machines get a GPU, by a few questions; and back.

It asks first, shows what it would write, and writes one file of its own, which `setup undo` puts back. What the machine
is like it sees as the doctor does, in this process; of GPUs it asks the service.
"""

from __future__ import annotations

import tempfile
import tomllib
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from gpuswitch.cli import machines, prometheus, proxmox
from gpuswitch.cli.asking import agrees, answer, can_ask, tell_answers
from gpuswitch.cli.changes import show_change
from gpuswitch.cli.client import Gpu, Service
from gpuswitch.cli.configuration import DIRECTORY, Verdict, in_their_words, judged, whole
from gpuswitch.cli.doctor import finding_record, in_their_language, service_seen, show_finding
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.kept_files import STATE, KeptFiles, changed_by_somebody
from gpuswitch.cli.output import as_json, clean, line, problem, warning, write
from gpuswitch.cli.proposal import Desk, Wanted, match_of, name_for, record_of, text_of
from gpuswitch.cli.reloading import Setting, by_key, reload
from gpuswitch.cli.setup_boot import STATE as EARLY
from gpuswitch.cli.setup_boot import UNDO as UNDO_EARLY
from gpuswitch.cli.simulated import serving, tell_of_another_machine, tell_of_this_machine
from gpuswitch.cli.translate import _, mark, recognized
from gpuswitch.config.schema import name_of
from gpuswitch.doctor.examination import findings, look
from gpuswitch.doctor.findings import Finding, Severity
from gpuswitch.doctor.gathering import gathered
from gpuswitch.doctor.looks import desktop
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.remedies import install
from gpuswitch.doctor.seen import Seen
from gpuswitch.errors import ConfigError, Failed, InvalidArgument, NoSuchGpu, NotAuthorized
from gpuswitch.sentence import Sentence

FILE = "conf.d/50-setup.toml"
"""Below the configuration: read after config.toml, so what was answered last counts."""
TRIAL_SECONDS = 60.0
_ANSWERED = frozenset({"boot_display", "managed"})
"""Findings about a GPU that its new table answers."""
_ANSWERED_BY_THE_DESK = _ANSWERED | {"holders"}
"""The same where the desktop ends first, which has it open."""
_ONE, _TWO = "one", "two"
_AT_BOOT = {"k": "keep", "v": "vfio", "h": "host"}
_NOTHING_TO_UNDO = mark("there is nothing to undo: setup has written nothing")
_WAS_SO_ALREADY = mark("{file} was as before already")
_NO_ANSWER = mark("cannot go on without an answer; nothing is changed")


class Places(NamedTuple):
    """Where the configuration is, and what is kept of it. `simulated`: the machine in memory that it is about, ""
    for this one.
    """

    configuration: Path = DIRECTORY
    state: Path = STATE
    simulated: str = ""

    @property
    def file(self) -> Path:
        return self.configuration / FILE


class _Sight(NamedTuple):
    """What was seen. `seen`: None where the machine could not be looked at, or is not the one that the service has;
    then there are no `findings` either, and `unseen` says why. `settings` are those in force that others than this
    command have set, by key; `with_tables`: by what each table in force is known, an address or what it matches.
    """

    gpus: Sequence[Gpu]
    settings: Mapping[str, Setting]
    with_tables: frozenset[str]
    seen: Seen | None
    unseen: str
    findings: Sequence[Finding]
    desk: desktop.Desktop
    files: Files


class _Decided(NamedTuple):
    """What is to be written, once all was told and agreed to. `before`: what the file says now, None without one.

    `commands` give the virtual machine `vm` ("" none) what it lacks.
    """

    sight: _Sight
    wanted: Sequence[Wanted]
    found: Sequence[Finding]
    warnings: Sequence[str]
    text: str
    before: str | None
    vm: str
    commands: Sequence[str]

    @property
    def changes(self) -> bool:
        return self.before != self.text


def setup(args: Namespace, machine: Machine | None = None, places: Places | None = None) -> int:
    """Ask, show, write, and offer a trial.

    Raises:
        CtlError: nothing was changed; or the file is written, and the text says what became of the rest.
    """
    if machine is None:
        tell_of_another_machine(args.bus, writes=not args.dry_run)
    machine, places = machine or Machine(), places or _places(args)
    kept = KeptFiles(places.state)
    _refuse_what_makes_no_sense(args, machine)
    if not args.dry_run and places.file in kept.changed_by_others():
        raise changed_by_somebody(places.file)
    asking = not args.yes and not args.dry_run
    try:
        decided = _decide(args, machine, places, asking=asking)
    except KeyboardInterrupt:
        raise CtlError.interrupted(_("interrupted; nothing is changed")) from None
    said: list[str] = []
    if decided.changes and not args.dry_run:
        try:
            kept.write({places.file: decided.text.encode()})
            said = _in_force(args, places.file)
        except KeyboardInterrupt:
            told = _("interrupted; to take back what was written: {command}", command="gpuswitchctl setup undo")
            raise CtlError.interrupted(told) from None
    hook = _hook(decided.sight, run=not args.dry_run)
    if args.json:
        as_json(_record(args, places, decided, said, hook))
        return 0
    if args.dry_run:
        line(_("nothing is written: this was a dry run"))
    elif decided.changes:
        line(_("{file} is written; to take it back: {command}", file=places.file, command="gpuswitchctl setup undo"))
        for each in said:
            line(each)
    line(hook)
    _tell_of_the_machine(decided.vm, decided.commands)
    if args.dry_run:
        return 0
    return _trial(args, decided.wanted, stands_in_the_way=_problems(decided.found), asking=asking)


def _places(args: Namespace) -> Places:
    """Those of the service.

    Raises:
        CtlError: it would not read what is written to the place that is ours.
    """
    found = serving(args.bus)
    directory = Path(found.directory or DIRECTORY)
    if not args.dry_run and directory.resolve() != DIRECTORY.resolve():
        text = _(
            "cannot write {file}: the service reads {folder}; {show} shows what would be written, and {edit} takes it",
            file=DIRECTORY / FILE,
            folder=directory,
            show="gpuswitchctl setup --dry-run",
            edit=f"gpuswitchctl config edit {quote(str(directory / FILE))}",
        )
        raise CtlError.of(InvalidArgument, text)
    return Places(directory, simulated=found.machine)


def _decide(args: Namespace, machine: Machine, places: Places, *, asking: bool) -> _Decided:
    """Look, ask, and show; nothing is changed.

    Raises:
        CtlError: it cannot be done, or a person says no.
        KeyboardInterrupt: ^C.
    """
    with closing(Service.connect(args.bus)) as service:
        sight = _look(service, machine, args.bus, places)
    found = _in_general(sight)
    if not args.json:
        _show(found)
    wanted, vm = _answers(args, sight, asking=asking)
    about = _about(sight, wanted)
    found += about
    text = text_of(wanted)
    verdict = _checked(places, text)
    commands = _of_the_machine(vm, wanted, sight)
    decided = _Decided(sight, wanted, found, verdict.warnings, text, _read(places.file), vm, commands)
    if not args.json:
        _show(about)
        if _problems(found):
            line(_("setup goes on all the same: what it writes waits until that is mended"))
        if any(each.desk for each in wanted):
            _tell_of_the_desk(sight.desk)
        verdict.tell()
        _propose(places.file, decided)
    if asking and decided.changes:
        _agree()
    return decided


def _record(args: Namespace, places: Places, decided: _Decided, said: Sequence[str], hook: str) -> dict[str, Any]:
    """docs/json.md has the form."""
    session = decided.sight.desk.session
    return {
        "path": str(places.file),
        "text": decided.text,
        "before": decided.before,
        "changed": decided.changes and not args.dry_run,
        "dry_run": args.dry_run,
        "gpus": [record_of(each) for each in decided.wanted],
        "session": session.type if session else "",
        "findings": [finding_record(each) for each in decided.found],
        "warnings": decided.warnings,
        "service": said,
        "hook": hook,
        "vm": decided.vm,
        "commands": decided.commands,
    }


def undo(args: Namespace, machine: Machine | None = None, places: Places | None = None) -> int:
    """Put back all that setup has written, or show what that would be.

    Raises:
        CtlError: nothing was changed, or the text says what was.
    """
    if machine is None:
        tell_of_this_machine(args.bus, writes=not args.dry_run)
    machine, places = machine or Machine(), places or Places(Path(serving(args.bus).directory or DIRECTORY))
    _refuse_strangers(machine, "sudo gpuswitchctl setup undo")
    kept = KeptFiles(places.state)
    if args.dry_run:
        return _show_undo(args, kept, machine)
    foreign = kept.changed_by_others()
    watched, told_prometheus, commands = list[Path](), list[str](), list[str]()
    if args.force or not foreign:  # else all of it is refused, right below
        # First: a Prometheus that cannot be told ends it, and says what was done.
        watched, told_prometheus = prometheus.take_back(machine)
        commands = proxmox.take_back(kept, machine)
    done = list(kept.undo(force=args.force))
    told = any(what != "unchanged" and file.is_relative_to(places.configuration) for file, what in done)
    said = reload(args.bus, places.file) if told else []
    saved = {file: str(kept.kept_text(file)) for file in foreign if kept.kept_text(file).exists()}
    if args.json:
        done += [(file, "restored") for file in watched]
        as_json(_undo_record(done, saved, said, [*commands, *told_prometheus], dry_run=False))
        return 0
    for each in commands:
        line(_("this was run: {command}", command=each))
    if not done and not watched:
        line(_(_NOTHING_TO_UNDO))
    words = {
        "removed": _("{file} is removed, as it was not there before"),
        "restored": _("{file} is as it was before"),
        "unchanged": _(_WAS_SO_ALREADY),
    }
    for file, what in done:
        line(words[what].format(file=file))
    for file in watched:
        line(_("{file} is without our lines", file=file))
    for each in told_prometheus:
        line(_("this was run: {command}", command=each))
    for each in saved.values():
        line(_("the text that was there is kept in {file}", file=each))
    for each in said:
        line(each)
    if Path(machine.path(str(EARLY))).exists():
        line(_("what the initrd does stays; to take it back: {command}", command=UNDO_EARLY))
    return 0


def _show_undo(args: Namespace, kept: KeptFiles, machine: Machine) -> int:
    """What undo would do. Nothing is changed, and the service is told nothing."""
    foreign = kept.changed_by_others()
    planned = kept.to_undo(force=args.force)
    commands = [" ".join(command) for command in proxmox.to_take_back(kept, machine).values()]
    saved = {file: str(kept.kept_text(file)) for file in foreign if file.exists()}
    watched = prometheus.to_take_back(machine)
    if args.json:
        files = [(file, what) for file, what, _before in planned] + ([(watched[0], "restored")] if watched else [])
        as_json(_undo_record(files, saved, [], commands, dry_run=True))
        return 0
    if not planned and not watched:
        line(_(_NOTHING_TO_UNDO))
        return 0
    words = {
        "removed": _("{file} would be removed, as it was not there before"),
        "restored": _("{file} would be as it was before"),
        "unchanged": _(_WAS_SO_ALREADY),
    }
    for each in commands:
        line(_("this would be run: {command}", command=each))
    for file, what, before in planned:
        line(words[what].format(file=file))
        show_change(str(file), _read(file), None if before is None else before.decode(errors="replace"))
    if watched:
        file, now, rest = watched
        line(_("{file} would be without our lines", file=file))
        show_change(str(file), now.decode(), rest)
    for each in saved.values():
        line(_("the text that is there would be kept in {file}", file=each))
    line(_("nothing is changed: this was a dry run"))
    return 0


def _undo_record(
    done: Iterable[tuple[Path, str]],
    saved: Mapping[Path, str],
    said: Sequence[str],
    commands: Sequence[str],
    *,
    dry_run: bool,
) -> dict[str, Any]:
    """docs/json.md has the form."""
    files = [{"path": str(file), "result": what, "kept": saved.get(file, "")} for file, what in done]
    return {"files": files, "commands": commands, "service": said, "dry_run": dry_run}


# What makes no sense -------------------------------------------------------------------------------------------------


def _refuse_strangers(machine: Machine, command: str) -> None:
    if not machine.as_root:
        raise CtlError.of(NotAuthorized, _("cannot write the configuration: it takes root: {command}", command=command))


def _refuse_what_makes_no_sense(args: Namespace, machine: Machine) -> None:
    """Before anything is looked at.

    Raises:
        CtlError: it does.
    """
    if not args.dry_run:
        _refuse_strangers(machine, "sudo gpuswitchctl setup")
    if not (args.yes or args.dry_run) and (args.json or not can_ask()):
        text = _(
            "cannot ask: this is no terminal; give the answers as options, and --yes, or --dry-run to see what "
            "would be written: gpuswitchctl setup --help"
        )
        raise CtlError.of(InvalidArgument, text)
    if args.name:
        _refuse_no_name(args.name)
    if args.name and len(args.gpus) > 1:
        raise CtlError.of(InvalidArgument, _("cannot give one name to several GPUs: leave --name out, or set up one"))
    _refuse_a_dark_start(args.screens, args.at_boot)


def _refuse_no_name(name: str) -> None:
    try:
        name_of(name)
    except ValueError as error:
        raise CtlError.of(InvalidArgument, recognized(str(error))) from None


def _refuse_a_dark_start(screens: str | None, at_boot: str | None) -> None:
    if screens == _ONE and at_boot == "vfio":
        text = _(
            "cannot have the only screen's GPU on vfio from boot on: the machine would start without a picture; leave "
            "--at-boot out"
        )
        raise CtlError.of(InvalidArgument, text)


# What is there -------------------------------------------------------------------------------------------------------


def _look(service: Service, machine: Machine, address: str | None, places: Places) -> _Sight:
    gpus = service.gpus()
    if not gpus:
        raise CtlError.of(NoSuchGpu, _("there is no GPU on this host"))
    settings = by_key(service)
    ours = str(places.file)
    named = [gpu.address for gpu in gpus]
    seen: Seen | None
    try:
        seen, why = look(machine, service_seen(address), named), ""
    except NoSuchGpu as error:
        seen, why = None, in_their_language(Sentence.of(error))
    found = gathered({"desktop": lambda: desktop.look(Files(machine))})["desktop"]
    desk = found if isinstance(found, desktop.Desktop) else desktop.Desktop()
    others = {key: each for key, each in settings.items() if each["origin"] not in {ours, "default"}}
    tables = frozenset(key.partition("[")[2].partition("]")[0] for key in settings if key.startswith("gpu["))
    return _Sight(gpus, others, tables, seen, why, tuple(findings(seen)) if seen else (), desk, Files(machine))


def _in_general(sight: _Sight) -> list[Finding]:
    """What is in the way whatever the answers are."""
    if sight.seen is None:
        warning(
            _(
                "this machine could not be looked at, so nothing is said of what may be in the way: {why}; to look "
                "again: {command}",
                why=sight.unseen,
                command="gpuswitchctl doctor",
            )
        )
        return []
    return [each for each in sight.findings if not each.subject and each.severity and each.kind != "hook"]


def _about(sight: _Sight, wanted: Sequence[Wanted]) -> list[Finding]:
    """What is in the way of these GPUs, but for what the file answers."""
    answered = {each.address: _ANSWERED if each.desk is None else _ANSWERED_BY_THE_DESK for each in wanted}
    return [
        each
        for each in sight.findings
        if each.subject in answered and each.severity and each.kind not in answered[each.subject]
    ]


def _booted(sight: _Sight, address: str) -> bool:
    """Whether the machine booted on it, as far as anybody can tell."""
    facts = sight.seen.facts if sight.seen else None
    gpus = sight.seen.gpus if sight.seen else ()
    return facts is not None and any(
        function.boot_display for gpu in gpus if str(gpu.address) == address for function in gpu.present(facts)
    )


def _show(found: Sequence[Finding]) -> None:
    for each in sorted(found, key=lambda finding: -finding.severity):
        show_finding(each)


def _problems(found: Iterable[Finding]) -> bool:
    return any(each.severity is Severity.PROBLEM for each in found)


# What is wanted ------------------------------------------------------------------------------------------------------


def _answers(args: Namespace, sight: _Sight, *, asking: bool) -> tuple[list[Wanted], str]:
    """The GPUs as they are to be configured, and the virtual machine ("" none).

    Raises:
        CtlError: an answer is missing, or makes no sense.
        KeyboardInterrupt: ^C.
    """
    if args.vm and not sight.files.program("virsh"):
        raise _no_virsh(sight)
    if not asking:
        _refuse_without_answers(args, sight)
    gpus = _which(args, sight, asking=asking)
    screens = args.screens or _screens(gpus, sight, asking=asking)
    if screens == _ONE and len(gpus) > 1:
        raise CtlError.of(
            InvalidArgument, _("cannot set up several GPUs with one screen: set up the one that draws on it")
        )
    _refuse_a_dark_start(screens, args.at_boot)
    taken = {each.name.casefold() for each in sight.gpus if each.name and each not in gpus}
    wanted = []
    for gpu in gpus:
        _refuse_a_second_table(gpu, sight)
        name = args.name or _name(gpu, taken, asking=asking and len(gpus) == 1)
        taken.add(name.casefold())
        wanted.append(_wanted(gpu, name, screens, sight))
    at_boot = args.at_boot or (_at_boot() if asking and screens == _TWO else "keep")
    wanted = [each._replace(at_boot=at_boot) for each in wanted]
    return wanted, _machine(args, sight, asking=asking)


def _refuse_without_answers(args: Namespace, sight: _Sight) -> None:
    """Where nobody is asked.

    Raises:
        CtlError: there is something that nobody can tell; all of that at once.
    """
    gpus = _given(args, sight) or _likely(sight)
    possible = gpus or sight.gpus
    known = ", ".join(gpu.title for gpu in sight.gpus)
    alone = len(sight.gpus) == len(gpus) == 1
    dark = sight.seen is None or any(_booted(sight, gpu.address) for gpu in possible)
    if dark and not alone and not args.screens:
        if gpus:
            text = _(
                "cannot tell where the desktop draws: say --screens one (on this GPU), or --screens two (on another)"
            )
        else:
            text = _(
                "cannot tell which GPU is meant, and where the desktop draws: say --gpu, one of {gpus}, and "
                "--screens one (on that GPU), or --screens two (on another)",
                gpus=known,
            )
        raise CtlError.of(InvalidArgument, text)
    if not gpus:
        raise CtlError.of(InvalidArgument, _("cannot tell which GPU is meant: say --gpu, one of {gpus}", gpus=known))


def _given(args: Namespace, sight: _Sight) -> list[Gpu]:
    """Those that are named as options, each once."""
    return list({gpu.path: gpu for gpu in (_named(each, sight) for each in args.gpus)}.values())


def _likely(sight: _Sight) -> list[Gpu]:
    """The one that is meant where nobody says: the only one, or the only one that the machine does not boot on."""
    candidates = [gpu for gpu in sight.gpus if not _booted(sight, gpu.address)]
    return candidates if len(candidates) == 1 else list(sight.gpus) if len(sight.gpus) == 1 else []


def _which(args: Namespace, sight: _Sight, *, asking: bool) -> list[Gpu]:
    if given := _given(args, sight):
        return given
    likely = _likely(sight)
    if len(sight.gpus) == 1:
        _tell(args, _("GPU: {gpu}", gpu=_title(sight.gpus[0], sight)))
    if len(sight.gpus) == 1 or not asking:
        return likely
    for number, gpu in enumerate(sight.gpus, 1):
        line(f"  {number}  {_title(gpu, sight)}")
    default = str(sight.gpus.index(likely[0]) + 1) if likely else ""
    while True:
        said = _said(_("Which GPU is to go to virtual machines (a number, or several)?"), default)
        try:
            found = {
                gpu.path: gpu for gpu in (_named(each, sight, numbers=True) for each in said.replace(",", " ").split())
            }
        except CtlError as error:
            problem(str(error))
            continue
        if found:
            return list(found.values())
        tell_answers(*(str(number) for number, _gpu in enumerate(sight.gpus, 1)))


def _tell(args: Namespace, text: str) -> None:
    """A line, where people read what comes."""
    if not args.json:
        line(text)


def _named(word: str, sight: _Sight, *, numbers: bool = False) -> Gpu:
    if numbers and word.isdecimal() and 1 <= int(word) <= len(sight.gpus):
        return sight.gpus[int(word) - 1]
    for gpu in sight.gpus:
        addresses = [gpu.address, *(str(each[0]) for each in gpu.properties["Functions"])]
        if word.casefold() in {
            gpu.name.casefold() or gpu.address,
            *addresses,
            *(a.removeprefix("0000:") for a in addresses),
        }:
            return gpu
    known = ", ".join(gpu.title for gpu in sight.gpus)
    raise CtlError.of(NoSuchGpu, _("no GPU is named {name}; this host has {gpus}", name=repr(word[:80]), gpus=known))


def _title(gpu: Gpu, sight: _Sight) -> str:
    text = f"{gpu.title}  {gpu.properties['Model'] or gpu.properties['Vendor']}"
    return _("{gpu}  (the machine boots on it)", gpu=text) if _booted(sight, gpu.address) else text


def _screens(gpus: Sequence[Gpu], sight: _Sight, *, asking: bool) -> str:
    if len(sight.gpus) == len(gpus) == 1:
        return _ONE
    booted = any(_booted(sight, gpu.address) for gpu in gpus)
    if not asking:
        return _TWO
    question = _("Does the desktop draw on this GPU, so that it ends meanwhile (1), or on another one (2)?")
    while True:
        said = _said(question, "1" if booted else "2")
        if said in {"1", _ONE, *_("1 one").split()}:
            return _ONE
        if said in {"2", _TWO, *_("2 two").split()}:
            return _TWO
        tell_answers("1", "2")


def _name(gpu: Gpu, taken: set[str], *, asking: bool) -> str:
    name = gpu.name or name_for(gpu.properties["Model"], taken)
    if not asking or gpu.name:
        return name
    while True:
        said = _said(_("What is it to be called?"), name)
        try:
            _refuse_no_name(said)
        except CtlError as error:
            problem(str(error))
            continue
        return said


def _at_boot() -> str:
    question = _("Where is it to be when the machine has started: as it is found (k), on vfio (v), on the host (h)?")
    while True:
        said = _said(question, "k")
        if said[:1] in _AT_BOOT:
            return _AT_BOOT[said[:1]]
        tell_answers(*_AT_BOOT)


def _refuse_a_second_table(gpu: Gpu, sight: _Sight) -> None:
    """A table is known by the address that it has, else by what it matches. One that has a GPU by the address of
    another function, or by `match` alone, would be beside one with the GPU's own.

    Raises:
        CtlError: there is one.
    """
    if not gpu.properties["Managed"] or gpu.address in sight.with_tables:
        return
    own = tuple(f"gpu[{each.address}]" for each in sight.gpus)
    files = {
        each["origin"] for key, each in sight.settings.items() if key.startswith("gpu[") and not key.startswith(own)
    }
    text = _(
        "cannot set up {gpu}: it has a table already that does not name it by this address, in {file}; a second one "
        "would be in its way: complete that one, or take it out",
        gpu=gpu.title,
        file=", ".join(sorted(files)),
    )
    raise CtlError.of(ConfigError, text)


def _wanted(gpu: Gpu, name: str, screens: str, sight: _Sight) -> Wanted:
    table = f"gpu[{gpu.address}]"
    others = [each.properties["Match"] for each in sight.gpus if each.path != gpu.path]
    # Where somebody has said already what it is told by, that holds: both together may fit nothing.
    elsewhere = any(key.startswith(f"{table}.match") for key in sight.settings)
    units = sight.settings.get(f"{table}.stop_units") or sight.settings.get("defaults.stop_units")
    desk = None
    if screens == _ONE:
        desk = Desk(sight.desk.manager, sight.desk.is_really, sight.desk.may_outlive_its_manager)
    return Wanted(
        gpu.address,
        name,
        gpu.properties["Model"],
        {} if elsewhere else match_of(gpu.properties["Match"], others),
        allow_boot_display=screens == _ONE or _booted(sight, gpu.address),
        stop_units=tomllib.loads(f"units = {units['value']}")["units"] if units else (),
        desk=desk,
    )


def _no_virsh(sight: _Sight) -> CtlError:
    """It is what asks libvirt."""
    commands = install(sight.seen.system, "virsh") if sight.seen else ()
    if not commands:
        text = _(
            "cannot ask libvirt for its virtual machines: {program} is not installed; a package of libvirt has it",
            program="virsh",
        )
        return CtlError.of(Failed, text)
    text = _(
        "cannot ask libvirt for its virtual machines: {program} is not installed; to install it: {command}",
        program="virsh",
        command=" && ".join(commands),
    )
    return CtlError.of(Failed, text)


def _machine(args: Namespace, sight: _Sight, *, asking: bool) -> str:
    if args.vm:
        return machines.named(args.vm, machines.names(sight.files.asked))
    known = machines.names(sight.files.asked) if asking else None
    if not known:
        return ""
    for number, name in enumerate(known, 1):
        line(f"  {number}  {name}")
    while True:
        said = _said(_("Which virtual machine gets it (a number; nothing: later)?"), "")
        if not said:
            return ""
        if said.isdecimal() and 1 <= int(said) <= len(known):
            return known[int(said) - 1]
        try:
            return machines.named(said, known)
        except CtlError as error:
            problem(str(error))


def _said(question: str, default: str) -> str:
    """The answer; `default` for an empty one.

    Raises:
        CtlError: there is none, and never will be.
        KeyboardInterrupt: ^C.
    """
    said = answer(f"{question} [{default}] " if default else f"{question} ")
    if said is None:
        raise CtlError.of(Failed, _(_NO_ANSWER), is_whole=True)
    return said or default


# What is written -----------------------------------------------------------------------------------------------------


def _checked(places: Places, text: str) -> Verdict:
    """What the service would say of the configuration with this file in it.

    Raises:
        CtlError: it would refuse it.
    """
    with tempfile.TemporaryDirectory(prefix="gpuswitch-setup-") as folder:
        copy = Path(folder) / "copy.toml"
        copy.write_text(text)
        copy.chmod(0o644)
        verdict = judged(places.configuration, file=places.file, copy=copy, machine=places.simulated)
    if verdict.faults:
        first, *more = verdict.faults
        if first["file"] == str(places.file):
            text = _(
                "cannot use what setup would write: {fault}; give other answers; nothing is changed",
                fault=in_their_words(first),
            )
        else:
            text = _(
                "cannot use the configuration with what setup would write in it: {fault}; nothing is changed; to put a "
                "file right: {command}",
                fault=whole(first),
                command="gpuswitchctl config edit",
            )
        Verdict(more, verdict.warnings).tell()
        raise CtlError.of(ConfigError, text)
    return verdict


def _read(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CtlError.of(Failed, _("cannot read {file}: {why}", file=file, why=error.strerror)) from error


def _propose(file: Path, decided: _Decided) -> None:
    """Show what would change."""
    if not decided.changes:
        line(_("nothing is to be written: {file} says all of this already", file=file))
        return
    show_change(str(file), decided.before, decided.text)


def _tell_of_the_desk(desk: desktop.Desktop) -> None:
    """What was found that draws on the only screen."""
    if desk.manager:
        line(_("display manager: {unit}; it ends before the GPU goes, and comes back with it", unit=desk.is_really))
    else:
        line(_("display manager: none"))
    if (session := desk.session) is not None and not session.greeter:
        what = " ".join(filter(None, (session.type, session.desktop)))
        line(_("session {id} of {user}: {what}", id=session.id, user=session.user, what=what))
    if desk.started_by_hand:
        line(
            _(
                "no display manager brings the desktop back: start it by hand when the GPU is back, or name a unit "
                "that does: after_host in gpuswitch.toml(5)"
            )
        )


def _agree() -> None:
    if not agrees(_said(_("Write this? [y/N]"), "")):
        raise CtlError.of(Failed, _("cannot go on: you said no; nothing was changed"))


def _in_force(args: Namespace, file: Path) -> list[str]:
    try:
        return reload(args.bus, file)
    except CtlError as error:
        text = _("{error}; to take it back: {command}", error=error, command="gpuswitchctl setup undo")
        raise CtlError(text, error.exit_code, name=error.name) from None


# What comes then -----------------------------------------------------------------------------------------------------


def _hook(sight: _Sight, *, run: bool) -> str:
    """Whether libvirt runs the hook, in a sentence; a libvirt that may know of none is had to look again."""
    found = [each for each in sight.findings if each.kind == "hook"]
    if not found:
        return _("libvirt is not installed, or was not looked at: virtual machines get GPUs once it is")
    [hook] = found[:1]
    if hook.severity is Severity.OK:
        return _("the hook is installed, and libvirt runs it")
    for command in hook.commands:
        if run and command.startswith("systemctl reload ") and sight.files.asked(*command.split()) is not None:
            return _("libvirt was reloaded, and sees the hook now: {command}", command=command)
    return _(
        "{reason}; to mend it: {command}", reason=in_their_language(hook.reason), command=" && ".join(hook.commands)
    )


def _of_the_machine(vm: str, wanted: Sequence[Wanted], sight: _Sight) -> list[str]:
    """The commands that give the virtual machine what it lacks."""
    if not vm:
        return []
    chosen = {each.address for each in wanted}
    functions = [str(each[0]) for gpu in sight.gpus if gpu.address in chosen for each in gpu.properties["Functions"]]
    return [machines.to_attach(vm, each) for each in machines.lacking(vm, functions, sight.files.asked)]


def _tell_of_the_machine(vm: str, lines: Sequence[str]) -> None:
    if lines:
        line(
            _(
                "{machine} does not have all of it yet; setup leaves its definition alone. These lines add it:",
                machine=vm,
            )
        )
        for each in lines:
            write(f"  {clean(each)}")
    elif vm:
        line(_("{machine} has all of it in its definition", machine=vm))


def _trial(args: Namespace, wanted: Sequence[Wanted], *, stands_in_the_way: bool, asking: bool) -> int:
    """Offer one."""
    gpu = wanted[0]
    command = f"gpuswitchctl trial {gpu.name} --seconds {TRIAL_SECONDS:g}"
    if stands_in_the_way:
        line(_("there are problems above: mend them first, then look again: {command}", command="gpuswitchctl doctor"))
        return 0
    if not asking:
        line(_("to try it: {command}", command=command))
        return 0
    if gpu.desk is not None:
        line(
            _(
                "a trial ends the desktop, and the screen is dark for {seconds} s: save your work first",
                seconds=f"{TRIAL_SECONDS:g}",
            )
        )
    _tell_what_ends(args, gpu.name)
    question = _("Try it now: to vfio, and home by itself after {seconds} s? [y/N] ", seconds=f"{TRIAL_SECONDS:g}")
    try:
        said = answer(question)
    except KeyboardInterrupt:
        raise CtlError.interrupted(
            _("interrupted; what setup wrote stays; to try it: {command}", command=command)
        ) from None
    if not agrees(said):
        line(_("to try it: {command}", command=command))
        return 0
    from gpuswitch.cli.trial import trial  # noqa: PLC0415 -- for who wants one

    given = {"gpu": gpu.name, "seconds": TRIAL_SECONDS, "busy": None, "wait": None, "stop_unit": [], "target": "vfio"}
    with closing(Service.connect(args.bus)) as service:
        return trial(service, Namespace(**given, yes=True, json=False, timeout=None, no_wait=False, bus=args.bus))


def _tell_what_ends(args: Namespace, gpu: str) -> None:
    """As `trial` itself does, which does not ask once more."""
    from gpuswitch.cli.what_ends import told_to_end  # noqa: PLC0415 -- for who is offered one

    with suppress(CtlError), closing(Service.connect(args.bus)) as service:  # what a trial says then is told by that
        for each in told_to_end(service, [service.gpu(gpu)], "vfio", {}).splitlines():
            line(each)
