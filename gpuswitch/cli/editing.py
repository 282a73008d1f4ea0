"""`config edit`: a file of the configuration in an editor, replaced only by one that the service can use.

As visudo does it: a copy beside the file is edited and checked, and renamed over the file in one instant.
"""

from __future__ import annotations

import errno
import glob
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gpuswitch.cli.asking import answer, tell_answers
from gpuswitch.cli.configuration import DIRECTORY, judged
from gpuswitch.cli.draft import Draft
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import line, problem
from gpuswitch.cli.reloading import reload
from gpuswitch.cli.simulated import serving
from gpuswitch.cli.translate import _, mark
from gpuswitch.errors import ConfigError, Failed, InvalidArgument, NotAuthorized

_NOTHING = mark("nothing is changed")
TEMPLATE = Path(__file__).parents[1] / "config" / "template.toml"
"""What a file begins with that is not there yet: every key, and none of them in force."""


def edit(args: Namespace) -> int:
    """Edit one file, and have the running service read it.

    Raises:
        CtlError: nothing was changed; or all was, and the service does not take it.
    """
    found = serving(args.bus)
    read = Path(found.directory or DIRECTORY)
    file = Path(args.path or read / "config.toml").absolute()
    directory = _directory_of(file)
    if args.json:
        raise CtlError.of(InvalidArgument, _("cannot edit with --json: an editor needs a terminal"))
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise CtlError(
            _(
                "cannot edit {file}: this is no terminal; write it in another way, then: gpuswitchctl config check && "
                "systemctl reload gpuswitchd",
                file=file,
            ),
            InvalidArgument.exit_code,
        )
    _refuse_where_others_write(file, directory)
    for left in _left_behind(file):
        problem(
            _(
                "an earlier edit that was ended left {draft}: take what you want from it, then: rm {quoted}",
                draft=left,
                quoted=shlex.quote(str(left)),
            )
        )
    try:
        before = file.read_bytes() if file.exists() else None
        draft = Draft(file, before, TEMPLATE.read_bytes() if before is None else before)
    except OSError as error:
        raise _cannot(file, error) from error
    try:
        editor = _editor()
    except CtlError:
        draft.drop()
        raise
    try:
        status = _edited(draft, directory, editor, found.machine if directory == read else "")
    except CtlError as error:
        raise _with_place(error, draft) from error
    except OSError as error:
        raise _with_place(_cannot(file, error), draft) from error
    except KeyboardInterrupt:
        if draft.is_there:
            _left(draft, _(_NOTHING), 0)
        raise
    if status is not None:
        return status
    line(_("{file} is saved", file=file))
    if directory.resolve() == read.resolve():
        for sentence in reload(args.bus, file):
            line(sentence)
    else:
        line(_("the service reads {folder}: this was only checked and saved", folder=read))
    return 0


def _left_behind(file: Path) -> list[Path]:
    """Copies of an edit that has ended, however it did. Those that have no other text than the file, or than a new one
    begins with, are taken away; the others, in which somebody wrote something, are returned.
    """
    target, known, left = file.resolve(), [TEMPLATE.read_bytes()], list[Path]()
    with suppress(OSError):
        known.append(target.read_bytes())
    for path in sorted(target.parent.glob(f".{glob.escape(target.stem)}.*.*.toml")):
        pid = path.name.removeprefix(f".{target.stem}.").partition(".")[0]
        if not pid.isdecimal() or Path(f"/proc/{pid}").exists() or path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError):  # then it stays; the edit goes on all the same
            if path.read_bytes() in known:
                path.unlink()
            else:
                left.append(path)
    return left


def _edited(draft: Draft, directory: Path, editor: Sequence[str], machine: str) -> int | None:
    """Edit until it can be used, or a person has enough: then its exit status. None: it is in its place. `machine` is
    one in memory, whose GPUs it is about.

    Raises:
        CtlError, OSError: it is not in its place.
    """
    while True:
        ended = _run(editor, draft)
        if not draft.changed:
            draft.drop()
            if ended:
                problem(_("{what}; {file} is unchanged", what=ended, file=draft.file))
                return Failed.exit_code
            line(_("{file} is unchanged", file=draft.file))
            return 0
        verdict = judged(directory, file=draft.file, copy=draft.path, machine=machine)
        verdict.tell()
        if ended:
            problem(ended)
        if not ended and not verdict.faults:
            break
        if not _again():
            return _left(draft, _(_NOTHING), ConfigError.exit_code if verdict.faults else Failed.exit_code)
    if not draft.replace():
        what = _("{file} was changed by somebody else meanwhile, and stays so", file=draft.file)
        return _left(draft, what, Failed.exit_code)
    return None


def _run(editor: Sequence[str], draft: Draft) -> str:
    """How it ended, where that was no success; "" where it was.

    Raises:
        CtlError: it did not start, or left nothing behind.
    """
    try:
        with _keyboard_signals_ignored():
            status = subprocess.run([*editor, str(draft.path)], check=False).returncode
    except OSError as error:
        draft.drop()
        text = _(
            "cannot start the editor {editor}: {why}; set EDITOR to one that is there",
            editor=editor[0],
            why=error.strerror,
        )
        raise CtlError.of(Failed, text) from error
    if not draft.is_there:
        text = _("cannot save {file}: the editor took its copy away; nothing is changed", file=draft.file)
        raise CtlError.of(Failed, text)
    if status < 0:
        return _("the editor was ended by signal {number}", number=-status)
    return _("the editor ended with status {status}", status=status) if status else ""


@contextmanager
def _keyboard_signals_ignored() -> Iterator[None]:
    """^C and its like go to all on a terminal, and are for the editor alone. Else we would end it, a moment later.

    By a handler, and not by SIG_IGN, which a program that is started would inherit (execve(2)).
    """
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: object) -> None:
    pass


def _left(draft: Draft, what: str, status: int) -> int:
    problem(_("{what}; your text is kept in {file}", what=what, file=draft.path))
    return status


def _with_place(error: CtlError, draft: Draft) -> CtlError:
    """The same, with where the text is, where it is not lost."""
    if not draft.is_there:
        return error
    text = _("{what}; your text is kept in {file}", what=error, file=draft.path)
    return CtlError(text, error.exit_code, name=error.name)


def _again() -> bool:
    """What a person wants: to go on, or to leave everything as it was. Without an answer, the latter."""
    while True:
        said = answer(_("edit it (a)gain, or (l)eave everything as it was? "))
        again, leave = _("a again").split(), _("l leave").split()
        if said in {"a", "again", *again}:
            return True
        if said in {None, "l", "leave", *leave}:
            return False
        tell_answers(again[0], leave[0])


def _directory_of(file: Path) -> Path:
    """The directory of the whole configuration that this file is, or will be, part of.

    Raises:
        CtlError: nobody would read it.
    """
    if file.name == "config.toml" and file.parent.name != "conf.d":
        return file.parent
    if file.parent.name == "conf.d" and file.suffix == ".toml" and not file.name.startswith("."):
        return file.parent.parent
    raise CtlError(
        _(
            "cannot edit {file}: nobody reads it; the configuration is {folder}/config.toml and {folder}/conf.d/*.toml",
            file=file,
            folder=DIRECTORY,
        ),
        InvalidArgument.exit_code,
    )


def _refuse_where_others_write(file: Path, directory: Path) -> None:
    """Who may write there could put a link in the place of the copy, or of the file, that root then goes by. It is the
    rule that the service has for what it reads (config/merge.py).

    Raises:
        CtlError: we are root, and others may.
    """
    if os.geteuid() != 0:
        return
    for folder in dict.fromkeys((directory, file.parent, file.resolve().parent)):
        try:
            status = folder.stat()
        except FileNotFoundError:  # we make it
            continue
        except OSError as error:
            raise _cannot(file, error) from error
        if status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            continue
        text = _("cannot edit {file} as root: others than root may write {folder}", file=file, folder=folder)
        if directory == DIRECTORY:
            raise CtlError.of(
                ConfigError, _("{text}; run: chown root {folder} && chmod go-w {folder}", text=text, folder=folder)
            )
        raise CtlError.of(ConfigError, _("{text}; edit it as the user whose it is", text=text))


def _editor() -> list[str]:
    """The words of the command that a person has chosen, else of what Debian and POSIX have."""
    for variable in ("VISUAL", "EDITOR"):
        if chosen := os.environ.get(variable, "").strip():
            try:
                return shlex.split(chosen)
            except ValueError as error:
                raise CtlError.of(
                    InvalidArgument, _("cannot use {setting}: {error}", setting=f"{variable}={chosen}", error=error)
                ) from None
    for program in ("editor", "vi"):
        if found := shutil.which(program):
            return [found]
    raise CtlError.of(Failed, _("cannot find an editor: set EDITOR to one"))


def _cannot(file: Path, error: OSError) -> CtlError:
    text = _("cannot edit {file}: {why}", file=file, why=error.strerror)
    if error.errno in {errno.EACCES, errno.EPERM} and os.geteuid():
        text = _("{text}; it takes root: sudo gpuswitchctl config edit", text=text)
        return CtlError.of(NotAuthorized, text)
    return CtlError.of(Failed, text)
