"""`setup boot`: have the initrd give a GPU to vfio-pci before any host driver, and take that back.

For GPUs that a host driver must never touch; for all others `at_boot` of the configuration does, which moves them by a
switch. It asks no service: what counts is the next start of the machine.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpuswitch.cli.asking import agree, can_ask
from gpuswitch.cli.changes import show_change
from gpuswitch.cli.disk import sync
from gpuswitch.cli.doctor import in_their_language, service_seen
from gpuswitch.cli.early_binding import LISTED_BY, TOOLS, Bound, Function, files_of
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.kept_files import ChangedError, KeptFiles
from gpuswitch.cli.making_initrd import LONGEST_SECONDS, MakingError, make_initrd
from gpuswitch.cli.output import as_json, line, warning
from gpuswitch.cli.simulated import refuse_for_another_machine, tell_of_this_machine
from gpuswitch.cli.translate import _
from gpuswitch.doctor.early import may_be_dark, place_of, refused
from gpuswitch.doctor.examination import look
from gpuswitch.doctor.looks import system
from gpuswitch.doctor.looks.early import PENDING, initrd_of
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.remedies import rebuild_initramfs
from gpuswitch.doctor.seen import Patient, Seen, Service
from gpuswitch.errors import Failed, InvalidArgument, NoSuchGpu, NotAuthorized, NotViable

STATE = Path("/var/lib/gpuswitch/setup-boot")
UNDO = "gpuswitchctl setup boot undo"
_MODE = 0o755
"""Programs of the initrd run them, or read them."""
OFF = "gpuswitch.early=off"


class _Decided(NamedTuple):
    """What is to be written. `before`: what the files say now, None for those that are not there."""

    tool: str
    commands: Sequence[str]
    gpus: Sequence[Bound]
    files: Mapping[Path, str]
    before: Mapping[Path, str | None]
    pending: bool

    @property
    def changes(self) -> bool:
        return self.pending or any(self.before[file] != text for file, text in self.files.items())


class _Kept:
    """Our files on a machine, what was there before them, and whether the initrd has been made of them."""

    def __init__(self, machine: Machine) -> None:
        self.files = KeptFiles(Path(machine.path(str(STATE))), undo=UNDO)
        self._pending = Path(machine.path(PENDING))

    @property
    def pending(self) -> bool:
        return self._pending.exists()

    def begin(self) -> None:
        """From now on the initrd may be another one than the files say, on disk before this returns."""
        try:
            self._pending.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._pending.touch()
            sync(self._pending.parent)
        except OSError as error:
            text = _("cannot write {file}: {why}; nothing is changed", file=self._pending, why=error.strerror)
            raise CtlError.of(Failed, text) from error

    def done(self) -> None:
        self._pending.unlink(missing_ok=True)


def boot(args: Namespace, machine: Machine | None = None, *, seconds: float = LONGEST_SECONDS) -> int:
    """Look, show, ask, write, and make the initrd anew.

    Raises:
        CtlError: nothing was changed, all was put back, or the text says what was not.
    """
    another = machine is None and tell_of_this_machine(args.bus, writes=not args.dry_run)
    machine = machine or Machine()
    kept = _Kept(machine)
    asking = _asking(args, machine)
    decided = _decide(args, machine, kept, Service() if another else service_seen(args.bus))
    if not args.json:
        _propose(decided)
    if asking and decided.changes:
        agree(_("Write this? [y/N]") + " ")
    initrd = ""
    if decided.changes and not args.dry_run:
        initrd = _write(kept, decided, machine, seconds)
    if args.json:
        as_json(_record(args, decided, initrd))
    elif args.dry_run:
        line(_("nothing is written: this was a dry run"))
    elif decided.changes:
        if initrd:
            line(_("{file} was made anew, and has it", file=initrd))
        else:
            line(_("the initrd was made anew; it could not be looked into"))
        line(_("it counts from the next start on; to take it back: {command}", command=UNDO))
    return 0


def undo(args: Namespace, machine: Machine | None = None, *, seconds: float = LONGEST_SECONDS) -> int:
    """Take back what was written, and make the initrd anew without it.

    Raises:
        CtlError: nothing was changed, or the text says what was.
    """
    if machine is None:
        refuse_for_another_machine(args.bus)
    machine = machine or Machine()
    _refuse_strangers(machine, f"sudo {UNDO}")
    kept = _Kept(machine)
    foreign = kept.files.changed_by_others()
    pending = kept.pending
    there = pending or kept.files.folder.exists()
    commands: Sequence[str] = ()
    done: list[tuple[Path, str]] = []
    if there:
        kept.begin()
        try:
            done = list(kept.files.undo(force=args.force))
        except ChangedError:
            if not pending:
                kept.done()
            raise
        commands = rebuild_initramfs(system.look(Files(machine)))
        _made_without(commands, machine, seconds)
        kept.done()
    saved = {file: str(kept.files.kept_text(file)) for file in foreign if kept.files.kept_text(file).exists()}
    if args.json:
        files = [{"path": str(file), "result": what, "kept": saved.get(file, "")} for file, what in done]
        as_json({"files": files, "commands": list(commands)})
        return 0
    if not there:
        line(_("there is nothing to undo: setup boot has written nothing"))
    for file, _what in done:
        line(_("{file} is removed, as it was not there before", file=file))
    for each in saved.values():
        line(_("the text that was there is kept in {file}", file=each))
    if there:
        line(_("the initrd was made anew: from the next start on, host drivers find the GPU"))
    return 0


# What makes no sense -------------------------------------------------------------------------------------------------


def _refuse_strangers(machine: Machine, command: str) -> None:
    if not machine.as_root:
        text = _("cannot write what the initrd is made of: it takes root: {command}", command=command)
        raise CtlError.of(NotAuthorized, text)


def _asking(args: Namespace, machine: Machine) -> bool:
    """Whether somebody is to be asked.

    Raises:
        CtlError: nobody can be, or it takes root.
    """
    if args.dry_run:
        return False
    _refuse_strangers(machine, "sudo gpuswitchctl setup boot")
    if not args.yes and (args.json or not can_ask()):
        text = _("cannot ask: this is no terminal; say --yes, or --dry-run to see what would be written")
        raise CtlError.of(InvalidArgument, text)
    return not args.yes


# What is there -------------------------------------------------------------------------------------------------------


def _decide(args: Namespace, machine: Machine, kept: _Kept, service: Service) -> _Decided:
    """Look, and see whether it can be done; nothing is changed. `service`: what it says of this machine.

    Raises:
        CtlError: it cannot.
    """
    try:
        seen = look(machine, service, args.gpus)
    except NoSuchGpu as error:
        raise CtlError.of(NoSuchGpu, in_their_language(str(error))) from None
    tool = seen.system.initramfs
    if tool not in TOOLS:
        text = _(
            'cannot tell what makes the initrd here: it is none of {tools}; at_boot = "vfio" moves the GPU without one',
            tools=", ".join(sorted(TOOLS)),
        )
        raise CtlError.of(NotViable, text)
    patients = _which(args, seen)
    _refuse(seen, patients)
    gpus = [_bound(seen, patient, machine) for patient in patients]
    files = {Path(machine.path(place)): text for place, text in files_of(tool, gpus).items()}
    before = {file: _read(file) for file in files}
    strangers = [file for file in kept.files.changed_by_others() if file in files]
    strangers += [file for file, text in before.items() if text is not None and not kept.files.has(file)]
    if strangers and not args.dry_run:
        text = _("cannot write {file}: there is one that is not ours; give it another name", file=strangers[0])
        raise CtlError.of(Failed, text)
    if seen.system.unified and not args.json:
        warning(
            _(
                "this machine starts a unified kernel image, which has its initrd in it: see that {command} makes that "
                "anew, too",
                command=rebuild_initramfs(seen.system)[0],
            )
        )
    return _Decided(tool, rebuild_initramfs(seen.system), gpus, files, before, kept.pending)


def _which(args: Namespace, seen: Seen) -> Sequence[Patient]:
    if seen.facts is None:
        raise CtlError.of(Failed, _("cannot look at this machine: {command} says why", command="gpuswitchctl doctor"))
    if args.gpus or len(seen.patients) == 1:
        return seen.patients
    if not seen.patients:
        raise CtlError.of(NoSuchGpu, _("there is no GPU on this host"))
    known = ", ".join(str(each.address) for each in seen.patients)
    raise CtlError.of(InvalidArgument, _("cannot tell which GPU is meant: say --gpu, one of {gpus}", gpus=known))


def _refuse(seen: Seen, patients: Iterable[Patient]) -> None:
    found = [each for patient in patients for each in refused(seen, patient)]
    if found:
        told = [{"kind": b.kind, "text": b.sentence, "error": b.error.name} for b in found]
        text = "\n".join(in_their_language(b.sentence) for b in found)
        raise CtlError(text, NotViable.exit_code, name=NotViable.name, blockers=told)


def _bound(seen: Seen, patient: Patient, machine: Machine) -> Bound:
    functions = patient.gpu.present(seen.facts) if seen.facts else ()
    return Bound(
        str(patient.address),
        [
            Function(
                str(each.address),
                place_of(machine, each.address),
                f"0x{each.vendor:04x}",
                f"0x{each.device:04x}",
                dark=not may_be_dark(seen, patient, each),
            )
            for each in functions
        ],
    )


def _read(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CtlError.of(Failed, _("cannot read {file}: {why}", file=file, why=error.strerror)) from error


def _propose(decided: _Decided) -> None:
    if not decided.changes:
        script = next(iter(decided.files))
        line(_("nothing is to be written: {file} says all of this already", file=script))
        return
    for file, text in decided.files.items():
        show_change(str(file), decided.before[file], text)
    line(_("then the initrd is made anew: {command}", command=" && ".join(decided.commands)))
    if decided.tool == "mkinitcpio":
        warning(_("what is written for mkinitcpio was never run: have another way to start this machine at hand"))


def _record(args: Namespace, decided: _Decided, initrd: str) -> dict[str, Any]:
    """docs/json.md has the form."""
    return {
        "tool": decided.tool,
        "files": [
            {"path": str(file), "text": text, "before": decided.before[file]} for file, text in decided.files.items()
        ],
        "gpus": [
            {
                "gpu": gpu.address,
                "functions": [
                    {"address": each.address, "place": each.place, "vendor": each.vendor, "device": each.device}
                    for each in gpu.functions
                ],
            }
            for gpu in decided.gpus
        ],
        "commands": list(decided.commands),
        "changed": decided.changes and not args.dry_run,
        "dry_run": args.dry_run,
        "initrd": initrd,
    }


# What is written -----------------------------------------------------------------------------------------------------


def _write(kept: _Kept, decided: _Decided, machine: Machine, seconds: float) -> str:
    """Write the files, and make the initrd of them; gives the one that has them for sure, "" where nobody knows it.

    Raises:
        CtlError: all was put back, or the text says what was not.
    """
    kept.begin()
    try:
        kept.files.write({file: text.encode() for file, text in decided.files.items()}, mode=_MODE)
    except CtlError as error:
        if not decided.pending:
            kept.done()
        if isinstance(error, ChangedError):
            text = _("cannot write {file}: there is one that is not ours; give it another name", file=error.file)
            raise CtlError.of(Failed, text) from None
        raise
    try:
        make_initrd([_whole(machine, each) for each in decided.commands], seconds)
        initrd = _checked(decided.tool, Files(machine))
    except (MakingError, KeyboardInterrupt) as error:
        why = _("interrupted") if isinstance(error, KeyboardInterrupt) else str(error)
        raise _put_back(kept, decided, machine, seconds, why) from None
    kept.done()
    return initrd


def _put_back(kept: _Kept, decided: _Decided, machine: Machine, seconds: float, why: str) -> CtlError:
    """As it was, with an initrd that was made of that; gives what is to be said.

    Raises:
        CtlError: not all of it could be put back.
    """
    if old := {file: text.encode() for file, text in decided.before.items() if text is not None}:
        kept.files.write(old, mode=_MODE)
    if new := [file for file, text in decided.before.items() if text is None]:
        kept.files.take_away(new)
    _made_without(decided.commands, machine, seconds, why)
    kept.done()
    return CtlError.of(Failed, _("cannot make the initrd: {why}\nall is as it was before", why=why))


def _made_without(commands: Sequence[str], machine: Machine, seconds: float, why: str = "") -> None:
    """Make the initrd anew once the files are as they were.

    Raises:
        CtlError: it was not made; the files stay so.
    """
    try:
        if not commands:
            raise MakingError(_("no program for that was found"))
        make_initrd([_whole(machine, each) for each in commands], seconds)
    except (MakingError, KeyboardInterrupt) as error:
        last = _("interrupted") if isinstance(error, KeyboardInterrupt) else str(error)
        text = _(
            "cannot make the initrd: {why}\nthe files are as they were, but the initrd may still bind the GPU; with "
            "{option} on the kernel's command line it does not; once that is mended: {command}",
            why=why or last,
            option=OFF,
            command=UNDO,
        )
        raise CtlError.of(Failed, text) from None


def _whole(machine: Machine, command: str) -> str:
    """The command with the place of its program."""
    name, space, rest = command.partition(" ")
    place = Files(machine).program(name)
    return f"{machine.path(place)}{space}{rest}" if place else command


def _checked(tool: str, files: Files) -> str:
    """The initrd of the running kernel, which has the script; "" where nobody could look into it.

    Raises:
        MakingError: it does not have it.
    """
    program, inside = LISTED_BY[tool]
    initrd = initrd_of(files)
    said = files.asked(program, files.machine.path(initrd)) if initrd else None
    if said is None:
        return ""
    if inside not in said:
        raise MakingError(_("{file} was made without it", file=initrd))
    return initrd
