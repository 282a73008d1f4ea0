"""Completion as people have it: real shells, the real command, and the service on a private bus."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jeepney import HeaderFields

from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import Peer, watching
from tests.harness.service.services import BIN, environment
from tests.real_bus.conftest import Start

SCRIPTS = Path(__file__).parents[2] / "contrib/completion"
CONFIG = """
[metrics]
enabled = false
[deadlines]
unbind = 600
[[gpu]]
address = "0000:01:00.0"
name = "geforce"
"""
BASH = """
bind -x '"\\C-g": printf "%s\\n" "$READLINE_LINE" >"$SHOWN"'
PS1='ready> '
. /usr/share/bash-completion/bash_completion
"""
ZSH = """
autoload -Uz compinit
compinit -u -d "$ZDOTDIR/dump"
show() { print -r -- "$BUFFER" >"$SHOWN" }
zle -N show
bindkey '^G' show
bindkey '^U' kill-whole-line
PS1='ready> '
"""
TYPED = {
    "to-v": "to-vfio ",
    "--json stat": "--json status ",
    "status gef": "status geforce ",
    "status 0000:01": "status 0000:01:00.0 ",
    "to-host 01": "to-host 01:00.0 ",
    "plan geforce vfio --busy=k": "plan geforce vfio --busy=kill ",
    "plan geforce vfio --no-such": "plan geforce vfio --no-such",
}
"""What somebody types before they press Tab, and what stands there then."""


@pytest.fixture
def environ(private_bus: PrivateBus, tmp_path: Path) -> dict[str, str]:
    """Where the scripts lie as `contrib/install.sh` puts them, below a folder that is searched for such."""
    for script, place in (
        ("gpuswitchctl.bash", "bash-completion/completions/gpuswitchctl"),
        ("gpuswitchctl.fish", "fish/vendor_completions.d/gpuswitchctl.fish"),
        ("_gpuswitchctl", "zsh/site-functions/_gpuswitchctl"),
    ):
        (tmp_path / "share" / place).parent.mkdir(parents=True)
        shutil.copy(SCRIPTS / script, tmp_path / "share" / place)
    return environment(
        GPUSWITCH_BUS=private_bus.address,
        PATH=f"{BIN}:{os.environ['PATH']}",
        XDG_DATA_DIRS=f"{tmp_path}/share:/usr/share",
        HOME=str(tmp_path),
        TERM="vt100",
        COLUMNS="80",
    )


class Shell:
    """A shell on a terminal, which writes its command line to `shown` when ^G is pressed."""

    def __init__(self, terminal: int, shown: int) -> None:
        self._terminal = terminal
        self._shown = shown

    def wait_until_ready(self) -> None:
        said = b""
        while b"ready> " not in said:
            said += os.read(self._terminal, 4096)

    def completed(self, typed: str) -> str:
        """The command line after somebody typed this, and pressed Tab; it is empty again then."""
        os.write(self._terminal, f"gpuswitchctl {typed}\t\a\x15".encode())
        # What it draws has to be read, or it stops.
        while self._shown not in (readable := select.select([self._terminal, self._shown], [], [])[0]):
            os.read(readable[0], 4096)
        return os.read(self._shown, 4096).decode().removeprefix("gpuswitchctl ").removesuffix("\n")


@contextmanager
def shell(environ: dict[str, str], *command: str) -> Iterator[Shell]:
    fifo = Path(environ["HOME"]) / "shown"
    os.mkfifo(fifo)
    ours, theirs = pty.openpty()
    shown = os.open(fifo, os.O_RDWR)
    with subprocess.Popen(
        command, env=environ | {"SHOWN": str(fifo)}, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        shell = Shell(ours, shown)
        try:
            shell.wait_until_ready()
            yield shell
        finally:
            process.kill()
            os.close(ours)
            os.close(shown)


async def test_bash_completes(start: Start, environ: dict[str, str], tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    (tmp_path / "bashrc").write_text(BASH)
    with shell(environ, "bash", "--noprofile", "--rcfile", f"{tmp_path}/bashrc", "-i") as bash:
        assert {typed: bash.completed(typed) for typed in TYPED} == TYPED


async def test_zsh_completes(start: Start, environ: dict[str, str], tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    (tmp_path / ".zshrc").write_text(f"fpath=({tmp_path}/share/zsh/site-functions $fpath)\n{ZSH}")
    with shell(environ | {"ZDOTDIR": str(tmp_path)}, "zsh", "-d", "-i") as zsh:
        assert {typed: zsh.completed(typed) for typed in TYPED} == TYPED


def fish(environ: dict[str, str], typed: str) -> list[str]:
    command = ["fish", "--private", "-c", f"complete -C 'gpuswitchctl {typed}'"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()


async def test_fish_completes_and_says_what_each_is(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    assert fish(environ, "to-") == ["to-host\tMove a GPU to host.", "to-vfio\tMove a GPU to vfio."]
    assert fish(environ, "status gef") == ["geforce\t0000:01:00.0, host-nvidia"]
    assert fish(environ, "plan geforce vfio --busy=k") == ["--busy=kill"]
    assert fish(environ, "wait --timeout ") == []


def complete(environ: dict[str, str], *words: str) -> list[str]:
    """The candidates, without what they are. Nothing else is ever said."""
    command = [str(BIN / "gpuswitchctl"), "__complete", *words]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return [line.partition("\t")[0] for line in ended.stdout.splitlines()]


async def test_gpus_are_offered_by_name_and_by_address_and_each_once(start: Start, environ: dict[str, str]) -> None:
    await start("laptop", config=CONFIG)
    assert complete(environ, "status", "") == ["0000:00:02.0", "geforce", "0000:01:00.0"]
    for spelling in ("geforce", "0000:01:00.0", "01:00.0"):
        assert complete(environ, "status", spelling, "") == ["0000:00:02.0"]
    assert complete(environ, "history", "geforce", "") == []


async def test_switches_are_offered_where_they_can_be_meant(start: Start, environ: dict[str, str]) -> None:
    service = await start("laptop", "unbind@0000:01:00.1#2=hang", config=CONFIG)
    gpu = "/org/gpuswitch1/gpu/0000_01_00_0"
    finished = await service.move(gpu, "vfio")
    await service.wait(gpu, finished)
    assert complete(environ, "show", "") == complete(environ, "show", finished[:3]) == [finished]
    assert complete(environ, "cancel", "") == []
    await service.move(gpu, "host")
    assert complete(environ, "cancel", "") == ["geforce", "0000:01:00.0"]


async def test_a_service_that_does_not_run_is_not_started_for_it(environ: dict[str, str], peer: Peer) -> None:
    async with watching(environ["GPUSWITCH_BUS"]) as calls:
        assert complete(environ, "status", "") == complete(environ, "show", "") == []
        await peer.call("org.freedesktop.DBus", "/", "org.freedesktop.DBus.GetId")
        made: list[tuple[str, ...]] = []
        while not made or made[-1][0] != "GetId":
            call = await calls.get()
            made.append((call.header.fields[HeaderFields.member], *call.body))
    assert made == [*(("Hello",), ("NameHasOwner", "org.gpuswitch1")) * 2, ("GetId",)]
