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

from gpuswitch.cli.asking import answer
from gpuswitch.cli.client import MANAGER, NAME, ROOT, Service, call
from gpuswitch.cli.configuration import DIRECTORY, judged
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import line, problem
from gpuswitch.cli.translate import _, mark
from gpuswitch.errors import ConfigError, Failed, InvalidArgument

Setting = Mapping[str, str]
_NOTHING = mark("nothing is changed")
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
    editor = _editor()
    try:
        draft = Draft(file)
        status = _edited(draft, directory, editor)
    except OSError as error:
        raise _cannot(file, error) from error
    if status is not None:
        return status
    line(_("{file} is saved", file=file))
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
                line(_("{file} is unchanged", file=draft.file))
                return 0
            verdict = judged(directory, file=draft.file, copy=draft.path)
            verdict.tell()
            if status:
                problem(_("the editor ended with status {status}", status=status))
            if not status and not verdict.faults:
                break
            if not _again():
                return _left(draft, _(_NOTHING), ConfigError.exit_code if verdict.faults else Failed.exit_code)
    except KeyboardInterrupt:
        _left(draft, _(_NOTHING), 0)
        raise
    if not draft.replace():
        what = _("{file} was changed by somebody else meanwhile, and stays so", file=draft.file)
        return _left(draft, what, Failed.exit_code)
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
        text = _(
            "cannot start the editor {editor}: {why}; set EDITOR to one that is there",
            editor=editor[0],
            why=error.strerror,
        )
        raise CtlError.of(Failed, text) from error
    if not draft.path.exists():
        text = _("cannot save {file}: the editor took its copy away; nothing is changed", file=draft.file)
        raise CtlError.of(Failed, text)
    return status


def _left(draft: Draft, what: str, status: int) -> int:
    problem(_("{what}; your text is kept in {file}", what=what, file=draft.path))
    return status


def _again() -> bool:
    """What a person wants: to go on, or to leave everything as it was. Without an answer, the latter."""
    while True:
        said = answer(_("edit it (a)gain, or (l)eave everything as it was? "))
        if said in {"a", "again", *_("a again").split()}:
            return True
        if said in {None, "l", "leave", *_("l leave").split()}:
            return False


def _reload(address: str | None, file: Path) -> None:
    """Have the service read it, where it runs, and say what that changed.

    Raises:
        CtlError: it does not take it.
    """
    try:
        service = Service.connect(address)
    except CtlError as error:
        line(_("nobody was told: {error}", error=error))
        return
    try:
        # A call would start it.
        if not service.ask(message_bus.NameHasOwner(NAME)).body[0]:
            line(_("the service does not run, and reads it when it starts"))
            return
        before = _by_key(service)
        service.ask_allowed(call(NAME, ROOT, MANAGER, "Reload"))
        changed = list(changes(before, _by_key(service)))
    except CtlError as error:
        text = _("cannot have the service read {file}, which is saved: {error}", file=file, error=error)
        raise CtlError(text, error.exit_code, name=error.name) from error
    finally:
        service.close()
    if changed:
        line(_("the service has read it: this is new"))
    else:
        line(_("the service has read it: nothing in force is changed by that"))
    for sentence in changed:
        line(f"  {sentence}")


def changes(before: Mapping[str, Setting], after: Mapping[str, Setting]) -> Iterator[str]:
    """What differs between two configurations in force, by the names of their keys: each with its value as TOML."""
    for key, setting in after.items():
        value, was = setting["value"], before.get(key, setting)["value" if key in before else "default"]
        if value != was:
            yield _("{key} = {value} (before: {was})", key=key, value=value, was=was) if was else f"{key} = {value}"
    for key in before:
        if key not in after and key.endswith("].address"):
            yield _("{key} has no table any more", key=key.removesuffix(".address"))


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
        _(
            "cannot edit {file}: nobody reads it; the configuration is {folder}/config.toml and {folder}/conf.d/*.toml",
            file=file,
            folder=DIRECTORY,
        ),
        InvalidArgument.exit_code,
    )


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
    if error.errno in {errno.EACCES, errno.EPERM}:
        text = _("{text}; it takes root: sudo gpuswitchctl config edit", text=text)
    return CtlError.of(Failed, text)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
