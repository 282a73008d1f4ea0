"""`config edit`: a file of the configuration in an editor, replaced only by one that the service can use.

As visudo does it: a copy beside the file is edited and checked, and renamed over the file in one instant.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jeepney import message_bus

from gpuswitch.cli.client import MANAGER, NAME, ROOT, Service, call
from gpuswitch.cli.configuration import DIRECTORY, judged
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import line, problem
from gpuswitch.errors import ConfigError, Failed, InvalidArgument

Setting = Mapping[str, str]
_NOTHING = "nothing is changed"
TEMPLATE = Path(__file__).parents[1] / "config" / "template.toml"
"""What a file begins with that is not there yet: every key, and none of them in force."""


def edit(args: Namespace) -> int:
    """Edit one file, and have the running service read it.

    Raises:
        CtlError: nothing was changed; or all was, and the service does not take it.
    """
    file = Path(args.path or DIRECTORY / "config.toml").absolute()
    directory = _directory_of(file)
    if args.json:
        raise CtlError.of(InvalidArgument, "cannot edit with --json: an editor needs a terminal")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CtlError(
            f"cannot edit {file}: this is no terminal; write it in another way, then: gpuswitchctl config check && "
            "systemctl reload gpuswitchd",
            InvalidArgument.exit_code,
        )
    editor = _editor()
    try:
        draft = Draft(file)
        status = _edited(draft, directory, editor)
    except OSError as error:
        raise _cannot(file, error) from error
    if status is not None:
        return status
    line(f"{file} is saved")
    _reload(args.bus, file)
    return 0


class Draft:
    """A copy of `file`, beside it and with its mode and owner, that nobody reads: its name begins with a dot.

    `path` is where it is.

    Raises:
        OSError: there can be none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._target = file.resolve()  # a link stays one
        self._before = self._content()
        self._begun = TEMPLATE.read_bytes() if self._before is None else self._before
        self._status = self._target.stat() if self._before is not None else None
        if self._status is None:
            self._target.parent.mkdir(mode=0o755, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._target.parent, prefix=f".{self._target.stem}.", suffix=".toml")
        self.path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self._begun)
            self._as_the_file()
        except OSError:
            self.drop()
            raise

    @property
    def changed(self) -> bool:
        return self.path.read_bytes() != self._begun

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)

    def replace(self) -> bool:
        """Put it in the place of the file, on disk before this returns; False where that was changed meanwhile."""
        if self._content() != self._before:
            return False
        self._as_the_file()
        _sync(self.path)
        self.path.replace(self._target)
        _sync(self._target.parent)
        return True

    def _content(self) -> bytes | None:
        try:
            return self._target.read_bytes()
        except FileNotFoundError:
            return None

    def _as_the_file(self) -> None:
        """An editor may have written a new file in its place."""
        if self._status is None:
            self.path.chmod(0o644)
            return
        shutil.copystat(self._target, self.path)  # with its label for SELinux, which is an extended attribute
        os.utime(self.path)
        os.chown(self.path, self._status.st_uid, self._status.st_gid)


def _edited(draft: Draft, directory: Path, editor: Sequence[str]) -> int | None:
    """Edit until it can be used, or a person has enough: then its exit status. None: it is in its place."""
    try:
        while True:
            status = _run(editor, draft)
            if not draft.changed:
                draft.drop()
                line(f"{draft.file} is unchanged")
                return 0
            verdict = judged(directory, file=draft.file, copy=draft.path)
            verdict.tell()
            if status:
                problem(f"the editor ended with status {status}")
            if not status and not verdict.faults:
                break
            if not _again():
                return _left(draft, _NOTHING, ConfigError.exit_code if verdict.faults else Failed.exit_code)
    except KeyboardInterrupt:
        _left(draft, _NOTHING, 0)
        raise
    if not draft.replace():
        return _left(draft, f"{draft.file} was changed by somebody else meanwhile, and stays so", Failed.exit_code)
    return None


def _run(editor: Sequence[str], draft: Draft) -> int:
    """Its exit status.

    Raises:
        CtlError: it did not start, or left nothing behind.
    """
    try:
        status = subprocess.run([*editor, str(draft.path)], check=False).returncode
    except OSError as error:
        draft.drop()
        text = f"cannot start the editor {editor[0]}: {error.strerror}; set EDITOR to one that is there"
        raise CtlError.of(Failed, text) from error
    if not draft.path.exists():
        raise CtlError.of(Failed, f"cannot save {draft.file}: the editor took its copy away; {_NOTHING}")
    return status


def _left(draft: Draft, what: str, status: int) -> int:
    problem(f"{what}; your text is kept in {draft.path}")
    return status


def _again() -> bool:
    """What a person wants: to go on, or to leave everything as it was. Without an answer, the latter."""
    while True:
        try:
            answer = input("edit it (a)gain, or (l)eave everything as it was? ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            line("")
            return False
        if answer in {"a", "again", "l", "leave"}:
            return answer.startswith("a")


def _reload(address: str | None, file: Path) -> None:
    """Have the service read it, where it runs, and say what that changed.

    Raises:
        CtlError: it does not take it.
    """
    try:
        service = Service.connect(address)
    except CtlError as error:
        line(f"nobody was told: {error}")
        return
    try:
        # A call would start it.
        if not service.ask(message_bus.NameHasOwner(NAME)).body[0]:
            line("the service does not run, and reads it when it starts")
            return
        before = _by_key(service)
        service.ask_allowed(call(NAME, ROOT, MANAGER, "Reload"))
        changed = list(changes(before, _by_key(service)))
    except CtlError as error:
        text = f"cannot have the service read {file}, which is saved: {error}"
        raise CtlError(text, error.exit_code, name=error.name) from error
    finally:
        service.close()
    line(f"the service has read it: {'this is new' if changed else 'nothing in force is changed by that'}")
    for sentence in changed:
        line(f"  {sentence}")


def changes(before: Mapping[str, Setting], after: Mapping[str, Setting]) -> Iterator[str]:
    """What differs between two configurations in force, by the names of their keys: each with its value as TOML."""
    for key, setting in after.items():
        value, was = setting["value"], before.get(key, setting)["value" if key in before else "default"]
        if value != was:
            yield f"{key} = {value} (before: {was})" if was else f"{key} = {value}"
    for key in before:
        if key not in after and key.endswith("].address"):
            yield f"{key.removesuffix('.address')} has no table any more"


def _by_key(service: Service) -> dict[str, Setting]:
    return {str(each["key"]): each for each in service.config()}


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
        f"cannot edit {file}: nobody reads it; the configuration is {DIRECTORY}/config.toml and "
        f"{DIRECTORY}/conf.d/*.toml",
        InvalidArgument.exit_code,
    )


def _editor() -> list[str]:
    """The words of the command that a person has chosen, else of what Debian and POSIX have."""
    for variable in ("VISUAL", "EDITOR"):
        if chosen := os.environ.get(variable, "").strip():
            try:
                return shlex.split(chosen)
            except ValueError as error:
                raise CtlError.of(InvalidArgument, f"cannot use {variable}={chosen}: {error}") from None
    for program in ("editor", "vi"):
        if found := shutil.which(program):
            return [found]
    raise CtlError.of(Failed, "cannot find an editor: set EDITOR to one")


def _cannot(file: Path, error: OSError) -> CtlError:
    remedy = "; it takes root: sudo gpuswitchctl config edit" if error.errno in {errno.EACCES, errno.EPERM} else ""
    return CtlError.of(Failed, f"cannot edit {file}: {error.strerror}{remedy}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
