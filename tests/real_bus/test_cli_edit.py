"""`gpuswitchctl config edit`: an editor on a terminal, around it the check, and after it the real service."""

from __future__ import annotations

import os
import pty
import shlex
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gpuswitch.cli import editing
from gpuswitch.cli.editing import TEMPLATE
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.parser import parse
from gpuswitch.cli.reloading import changes
from gpuswitch.errors import NotAuthorized
from tests.harness.buses.private import PrivateBus
from tests.harness.service.services import BIN, contents, environment, write_config
from tests.harness.service.terminal import END, INTERRUPT
from tests.real_bus.conftest import Start

QUIET = "[metrics]\nenabled = false\n"
TYPO = f"{QUIET}[deadlines]\nunbnid = 7\n"
GOOD = f"{QUIET}[deadlines]\nunbind = 7\n"
NOT_IN_FORCE = "the service reads /etc/gpuswitch: this was only checked and saved"
FAULT = "deadlines.unbnid: no such key; did you mean unbind?"

READS = """
import sys
from pathlib import Path
from gpuswitch.cli import editing, main
editing.DIRECTORY = Path(sys.argv.pop(1))
sys.exit(main.main())
"""
"""The command, where the service reads another directory: the tests leave this machine's own alone."""


@dataclass
class Person:
    """Somebody at a terminal, whose editor is a shell script: $1 is the file, and `times` has a line for each run."""

    folder: Path
    environ: dict[str, str]
    command: Sequence[str] = (str(BIN / "gpuswitchctl"),)

    def with_service_in(self, directory: Path) -> Person:
        """The same, where the service reads this directory, and not /etc/gpuswitch."""
        return replace(self, command=(sys.executable, "-c", READS, str(directory)))

    def edits(
        self, file: Path, script: str, answers: Sequence[str] = "", *, stderr: int | None = None, **variables: str
    ) -> tuple[int, str]:
        """The exit status, and what the terminal showed. The answers, a key each, are given when something is asked."""
        program = self.folder / "an editor"
        program.write_text(f"#!/bin/sh\ncd {shlex.quote(str(self.folder))}\necho >>times\n{script}\n")
        program.chmod(0o755)
        ours, theirs = pty.openpty()
        shown, waiting = b"", list(answers)
        environ = self.environ | {"VISUAL": f"'{program}'", **variables}
        # It has to be the terminal of its session, or ^C would be no signal.
        command = ["setsid", "--ctty", *self.command, "config", "edit", str(file)]
        with subprocess.Popen(command, env=environ, stdin=theirs, stdout=theirs, stderr=stderr or theirs) as process:
            os.close(theirs)
            while data := _read(ours):
                shown += data
                if waiting and shown.endswith(b"as it was? "):
                    key = waiting.pop(0)
                    os.write(ours, f"{key}\n".encode() if key.isalpha() or not key else key.encode())
            os.close(ours)
        return process.returncode, shown.decode().replace("\r\n", "\n")

    @property
    def times(self) -> int:
        """How often the editor ran."""
        return (self.folder / "times").read_text().count("\n")


def _read(descriptor: int) -> bytes:
    """What comes next; nothing once the other side is closed, which Linux tells as an error (EIO)."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def writes(text: str) -> str:
    return f"""cat >"$1" <<'END'\n{text}END"""


def told(shown: str) -> list[str]:
    """The lines, without what the machine of the test, which has other GPUs, has to say of it."""
    return [line for line in shown.splitlines() if not line.startswith("gpuswitchctl: warning: ")]


def kept(directory: Path) -> Path:
    """The one file there that nobody reads."""
    [hidden] = [path for path in directory.iterdir() if path.name.startswith(".")]
    return hidden


@pytest.fixture
def person(private_bus: PrivateBus, tmp_path_factory: pytest.TempPathFactory) -> Person:
    environ = environment(GPUSWITCH_BUS=private_bus.address, TERM="dumb")
    return Person(tmp_path_factory.mktemp("editor"), environ)


async def test_what_was_edited_is_in_force_and_told(start: Start, person: Person) -> None:
    service = await start("laptop", config=QUIET)
    file = service.config / "config.toml"
    file.chmod(0o640)
    person = person.with_service_in(service.config)
    status, shown = person.edits(file, writes(f'{GOOD}[[gpu]]\naddress = "01:00.0"\nname = "geforce"\n'))
    assert told(shown) == [
        f"{file} is saved",
        "the service has read it: this is new",
        '  gpu[0000:01:00.0].address = "0000:01:00.0"',
        '  gpu[0000:01:00.0].name = "geforce" (before: "")',
        "  deadlines.unbind = 7.0 (before: 20.0)",
    ]
    assert (status, contents(service.config), stat.S_IMODE(file.stat().st_mode)) == (0, ["config.toml"], 0o640)
    assert await service.ask("GetGpu", "s", "geforce")
    status, shown = person.edits(file, writes(f"{GOOD}# a word\n"))
    assert told(shown)[1:] == [
        "the service has read it: this is new",
        "  gpu[0000:01:00.0] has no table any more",
    ]
    status, shown = person.edits(file, writes(GOOD))
    assert told(shown)[1:] == ["the service has read it: nothing in force is changed by that"]


async def test_the_service_is_not_told_of_what_it_does_not_read(start: Start, person: Person, tmp_path: Path) -> None:
    service = await start("laptop", config=QUIET)
    write_config(service.config, GOOD)
    file = write_config(tmp_path / "mine", QUIET)
    status, shown = person.edits(file, writes(f"{QUIET}# a word\n"))
    not_in_force = NOT_IN_FORCE.replace("/etc/gpuswitch", str(service.config))
    assert (status, told(shown)) == (0, [f"{file} is saved", not_in_force])
    assert (
        "the service has read it: this is new"
        in person.with_service_in(service.config).edits(service.config / "config.toml", writes(f"{GOOD}# a word\n"))[1]
    )


async def test_what_the_service_refuses_all_the_same_is_said(start: Start, person: Person) -> None:
    """It has variables that the files know nothing of."""
    service = await start("laptop", config=QUIET, GPUSWITCH_GPU='[{"address": "02:00.0"}]')
    file = service.config / "config.toml"
    text = f'{QUIET}[[gpu]]\naddress = "01:00.0"\nmembers = ["02:00.0"]\n'
    status, shown = person.with_service_in(service.config).edits(file, writes(text))
    assert (status, file.read_text()) == (2, text)
    assert (
        f"gpuswitchctl: cannot have the service read {file}, which is saved: cannot use {file}:5: gpu[0000:01" in shown
    )


def test_a_drop_in_is_checked_together_with_the_others(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, TYPO)
    (tmp_path / "conf.d").mkdir(mode=0o755)
    drop_in = tmp_path / "conf.d/50-a.toml"
    status, shown = person.edits(drop_in, writes("[deadlines]\nprobe = 7\n"), "l")
    assert (status, drop_in.exists()) == (2, False)
    assert f"{file}:4: {FAULT}" in shown
    file.write_text(QUIET)
    status, shown = person.edits(drop_in, writes("[deadlines]\nprobe = 7\n"))
    assert (status, drop_in.read_text()) == (0, "[deadlines]\nprobe = 7\n")


def test_with_faults_one_may_go_on(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    second_time = f"if [ -e tried ]; then\n{writes(GOOD)}\nelse\ntouch tried\n{writes(TYPO)}\nfi"
    status, shown = person.with_service_in(tmp_path).edits(file, second_time, ["x", "", "a"])
    assert (status, person.times, file.read_text(), contents(tmp_path)) == (0, 2, GOOD, ["config.toml"])
    assert f"{file}:4: {FAULT}\n" in shown
    assert shown.count("as it was? ") - 1 == shown.count("gpuswitchctl: type one of these, then Enter: a, l\n") == 2
    assert shown.endswith(f"{file} is saved\nthe service does not run, and reads it when it starts\n")


def test_or_leave_and_nothing_is_changed_or_lost(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, writes(TYPO), "l")
    assert (status, file.read_text(), kept(tmp_path).read_text()) == (2, QUIET, TYPO)
    assert shown.endswith(f"gpuswitchctl: nothing is changed; your text is kept in {kept(tmp_path)}\n")


@pytest.mark.parametrize(("key", "status"), [(END, 2), (INTERRUPT, 130)], ids=["^D", "^C"])
def test_nor_where_there_is_no_answer(person: Person, tmp_path: Path, key: str, status: int) -> None:
    file = write_config(tmp_path, QUIET)
    ended, shown = person.edits(file, writes(TYPO), key)
    assert (ended, file.read_text(), kept(tmp_path).read_text()) == (status, QUIET, TYPO)
    assert f"gpuswitchctl: nothing is changed; your text is kept in {kept(tmp_path)}\n" in shown


def test_the_question_is_not_in_the_output(person: Person, tmp_path: Path) -> None:
    """Who has sent what goes wrong elsewhere would not see it, and sees none of the faults."""
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, writes(TYPO), stderr=subprocess.DEVNULL)
    assert (status, shown, contents(tmp_path)) == (2, "", ["config.toml"])


def test_an_editor_that_fails_has_changed_nothing(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, f"{writes(GOOD)}\nexit 3", "l")
    assert (status, file.read_text(), kept(tmp_path).read_text()) == (1, QUIET, GOOD)
    assert "gpuswitchctl: the editor ended with status 3\n" in shown


@pytest.mark.parametrize(
    ("script", "ended"),
    [
        ("exit 127", "ended with status 127"),
        ('kill -INT $$\necho "# not reached" >>"$1"', "was ended by signal 2"),
        ('kill -QUIT $$\necho "# not reached" >>"$1"', "was ended by signal 3"),
    ],
    ids=["status", "interrupt", "quit"],
)
def test_an_editor_that_fails_at_once_is_no_success(person: Person, tmp_path: Path, script: str, ended: str) -> None:
    """The signals of the keyboard are for it as for any other program, although we ignore them meanwhile."""
    file = write_config(tmp_path, QUIET)
    assert person.edits(file, f"ulimit -c 0\n{script}") == (
        1,
        f"gpuswitchctl: the editor {ended}; {file} is unchanged\n",
    )
    assert (file.read_text(), contents(tmp_path)) == (QUIET, ["config.toml"])


def test_an_editor_has_the_time_it_takes_after_an_interrupt(person: Person, tmp_path: Path) -> None:
    """The keyboard sends them to all on the terminal. Some editors use them, and ask whether to save."""
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, f"trap : INT QUIT\nkill -INT 0\nkill -QUIT 0\nsleep 1\n{writes(GOOD)}")
    assert (status, told(shown)[0], file.read_text()) == (0, f"{file} is saved", GOOD)


@pytest.mark.parametrize("script", ["true", 'touch "$1"'])
def test_what_is_unchanged_is_said_and_left(person: Person, tmp_path: Path, script: str) -> None:
    file = write_config(tmp_path, TYPO)
    assert person.edits(file, script) == (0, f"{file} is unchanged\n")
    assert (file.read_text(), contents(tmp_path)) == (TYPO, ["config.toml"])


def test_a_file_that_is_not_there_begins_with_every_key_and_none_in_force(person: Person, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "etc/config.toml"
    assert person.edits(file, "true") == (0, f"{file} is unchanged\n")
    assert contents(tmp_path / "etc") == []
    status, _ = person.edits(file, """echo '[deadlines]' >>"$1"; echo 'unbind = 9' >>"$1" """)
    assert (status, file.read_text()) == (0, f"{TEMPLATE.read_text()}[deadlines]\nunbind = 9\n")
    assert (stat.S_IMODE(file.stat().st_mode), contents(tmp_path / "etc")) == (0o644, ["config.toml"])


def test_what_somebody_else_changed_meanwhile_is_not_overwritten(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, f"{writes(GOOD)}\necho '# theirs' >{shlex.quote(str(file))}")
    assert (status, file.read_text(), kept(tmp_path).read_text()) == (1, "# theirs\n", GOOD)
    assert f"{file} was changed by somebody else meanwhile, and stays so; your text is kept in " in shown


def test_a_link_stays_one_and_an_editor_may_write_a_file_of_its_own(person: Person, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    place = tmp_path / "there/real.toml"
    place.write_text(QUIET)
    place.chmod(0o600)
    file = tmp_path / "config.toml"
    file.symlink_to(place)
    status, _ = person.edits(file, 'cp "$1" new; echo "# a word" >>new; chmod 644 new; mv new "$1"')
    assert (status, file.is_symlink(), place.read_text()) == (0, True, f"{QUIET}# a word\n")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "puts",
    ['mv "$1" other; ln -s "$PWD/other" "$1"', 'ln "$1" other', 'rm "$1"; mkfifo "$1"', 'rm "$1"; mkdir "$1"'],
    ids=["symbolic link", "hard link", "pipe", "directory"],
)
def test_what_somebody_put_in_the_place_of_the_copy_is_not_touched(person: Person, tmp_path: Path, puts: str) -> None:
    tmp_path.chmod(0o755)
    file = write_config(tmp_path / "etc", QUIET)
    file.chmod(0o640)
    status, shown = person.edits(file, f'{writes(GOOD)}\ncd "$(dirname "$1")"/..\nchmod 600 "$1"\n{puts}')
    [copy] = [path for path in (tmp_path / "etc").iterdir() if path != file]
    assert status == 1
    assert shown == (
        f"gpuswitchctl: cannot save {file}: its copy is no regular file with one name any more; nothing is changed; "
        f"your text is kept in {copy}\n"
    )
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (QUIET, 0o640)
    if (tmp_path / "other").exists():
        assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o600


def test_attributes_of_the_file_stay(person: Person, tmp_path: Path) -> None:
    """A label of SELinux is one of them."""
    file = write_config(tmp_path, QUIET)
    os.setxattr(file, "user.label", b"a word")
    file.chmod(0o604)
    status, _ = person.edits(file, f'rm "$1"\n{writes(GOOD)}')
    assert (status, file.read_text()) == (0, GOOD)
    assert (os.getxattr(file, "user.label"), stat.S_IMODE(file.stat().st_mode)) == (b"a word", 0o604)


def test_where_it_cannot_be_checked_one_is_told_where_the_text_is(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    # Its interpreter is not in the folder that the service's program would be in.
    lost = ("import sys; from gpuswitch.cli import main; sys.executable = '/none/python'; sys.exit(main.main())",)
    status, shown = replace(person, command=(sys.executable, "-c", *lost)).edits(file, writes(GOOD))
    assert (status, kept(tmp_path).read_text(), file.read_text()) == (1, GOOD, QUIET)
    assert shown == (
        f"gpuswitchctl: cannot find /none/gpuswitchd; install gpuswitch anew; your text is kept in {kept(tmp_path)}\n"
    )


def test_where_it_cannot_be_saved_one_is_told_where_the_text_is(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, f"{writes(GOOD)}\nrm {shlex.quote(str(file))}\nmkdir {shlex.quote(str(file))}")
    assert (status, kept(tmp_path).read_text()) == (1, GOOD)
    assert f"cannot edit {file}: Is a directory; your text is kept in {kept(tmp_path)}\n" in shown


@pytest.mark.parametrize(
    ("editor", "sentence"),
    [
        ("/none/such -w", "cannot start the editor /none/such: No such file or directory; set EDITOR to one that is"),
        ("'vi", "cannot use VISUAL='vi: No closing quotation"),
        ("rm -f", "cannot save {file}: the editor took its copy away; nothing is changed"),
    ],
)
def test_an_editor_that_does_not_work_is_named(person: Person, tmp_path: Path, editor: str, sentence: str) -> None:
    file = write_config(tmp_path, QUIET)
    status, shown = person.edits(file, "", VISUAL=editor)
    assert status != 0
    assert shown.startswith(f"gpuswitchctl: {sentence.format(file=file)}")
    assert (file.read_text(), contents(tmp_path)) == (QUIET, ["config.toml"])


def test_who_may_not_write_there_is_told_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(editing, "Draft", refuse)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("VISUAL", "'no command of a shell")
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    args = parse(["config", "edit", str(tmp_path / "config.toml")])
    with pytest.raises(CtlError, match=r"Permission denied; it takes root: sudo gpuswitchctl config edit$") as refused:
        editing.edit(args)
    assert refused.value.exit_code == NotAuthorized.exit_code


@pytest.mark.parametrize("place", ["config.toml", "conf.d/a.toml", "link/config.toml"])
def test_root_edits_nothing_where_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Whoever may could put something else in the place of the copy."""
    folder = tmp_path / "open"
    (folder / "conf.d").mkdir(parents=True)
    (folder / "conf.d").chmod(0o755)
    (tmp_path / "link").mkdir(mode=0o755)
    (tmp_path / "link/config.toml").symlink_to(write_config(folder, QUIET))
    folder.chmod(0o777)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("VISUAL", "/none/such")
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    file = tmp_path / place if place.startswith("link") else folder / place
    before = contents(folder), contents(folder / "conf.d")
    with pytest.raises(CtlError) as refused:
        editing.edit(parse(["config", "edit", str(file)]))
    # Where the tests are not run by root, no folder here is root's.
    assert str(refused.value).startswith(f"cannot edit {file} as root: others than root may write {tmp_path}/")
    assert str(refused.value).endswith("; edit it as the user whose it is")
    assert before == (contents(folder), contents(folder / "conf.d"))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(CtlError, match="cannot start the editor"):
        editing.edit(parse(["config", "edit", str(file)]))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(editing, "DIRECTORY", folder)
    with pytest.raises(CtlError, match=f"run: chown root {folder}(/conf.d)? && chmod go-w "):
        editing.edit(parse(["config", "edit", str(folder / "config.toml")]))


def test_the_names_of_what_changed() -> None:
    def setting(value: str, default: str) -> dict[str, str]:
        return {"value": value, "default": default}

    before = {"a": setting("1", "1"), "b": setting('""', '""'), "gpu[x].address": setting('"x"', "")}
    after = {"a": setting("2", "1"), "b": setting('""', '""'), "gpu[y].address": setting('"y"', "")}
    assert list(changes(before, after)) == [
        "a = 2 (before: 1)",
        'gpu[y].address = "y"',
        "gpu[x] has no table any more",
    ]


def test_what_an_edit_that_was_killed_has_left_is_taken_away_or_named(person: Person, tmp_path: Path) -> None:
    file = write_config(tmp_path, QUIET)
    for script in ('kill -9 "$PPID"', f'{writes(GOOD)}\nkill -9 "$PPID"'):
        status, _shown = person.edits(file, script)
        assert status == -9
    status, shown = person.edits(file, "true")
    assert status == 0
    left = kept(tmp_path)
    assert left.read_text() == GOOD
    assert f"an earlier edit that was ended left {left}: take what you want from it, then: rm {left}\n" in shown


async def test_a_simulated_service_has_its_own_file_edited(person: Person, start: Start) -> None:
    service = await start("laptop", config=QUIET)
    file = service.config / "config.toml"
    status, shown = person.edits(file, writes(GOOD))
    assert (status, file.read_text()) == (0, GOOD)
    assert told(shown)[:2] == [f"{file} is saved", "the service has read it: this is new"]
