"""The host's side of a build: its tools, and how they are run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.debian.errors import HarnessError

PROJECT = Path(__file__).parents[3]

OVERLAY = Path(__file__).with_name("overlay.sh")

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
APART = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")


def require_tools(purpose: str) -> None:
    """See to the Debian packages that are needed for `purpose` (of contrib/need.sh): as root they are installed.

    Raises:
        HarnessError: something is missing that cannot be installed; the text has the line to run.
    """
    need = subprocess.run(
        [PROJECT / "contrib/need.sh", sys.executable, purpose],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if need.returncode != 0:
        raise HarnessError(need.stdout.strip())


def require_root() -> None:
    if os.geteuid() != 0:
        raise HarnessError("cannot make a Debian system without root: its files belong to users of its own; use sudo")


def run(
    command: Sequence[str | Path],
    *,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    pass_fds: Sequence[int] = (),
) -> bytes:
    """Run a program that dies with us, with these files of ours open; gives its standard output.

    Raises:
        HarnessError: it failed; the text ends with the last lines of its standard error.
    """
    done = subprocess.run(
        [*DIES_WITH_US, *command],
        check=False,
        cwd=folder,
        env={**os.environ, **(env or {})},
        input=stdin,
        capture_output=True,
        pass_fds=pass_fds,
    )
    if done.returncode != 0:
        log = (done.stdout + done.stderr).decode(errors="replace").splitlines()[-40:]
        words = " ".join(str(word) for word in command)
        raise HarnessError("\n".join([f"cannot build: {words} ended with status {done.returncode}", *log]))
    return done.stdout


def run_apart(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> bytes:
    """Run a program in mount and process namespaces of its own.

    What it mounts is never seen outside, and when it ends or is killed, nothing of it stays: no mount that a later
    removal of the build folder could walk into, no process.
    """
    return run([*APART, *command], env=env)


def run_in(root: Path, command: str, *, env: Mapping[str, str] | None = None) -> bytes:
    """Run a shell command in an unpacked system: with its own /proc, without network settings, systemd or bus.

    The environment is the given one and a PATH, nothing of ours.
    """
    return run_apart(in_root(root, command, env))


def run_on_top(layers: Sequence[Path], changes: Path, command: str, *, env: Mapping[str, str] | None = None) -> bytes:
    """Run a shell command as run_in does, in a system made of layers, the uppermost first, which stay as they are.

    The folder `changes` gets what it changes: one more layer, to lie on top of them.
    """
    with tempfile.TemporaryDirectory(prefix="gpuswitch-layers-") as place:
        keep = ["cp", "-a", f"{place}/upper/.", str(changes)]
        return run_apart(script(["sh", OVERLAY, place, *layers], in_root(Path(place) / "root", command, env), keep))


def show_on_top(layers: Sequence[Path], command: str, *, env: Mapping[str, str] | None = None) -> int:
    """Run a shell command in a system made of layers, with our own devices, input and output; gives its status.

    What it changes is gone when it ends.
    """
    with tempfile.TemporaryDirectory(prefix="gpuswitch-layers-") as place:
        root = Path(place) / "root"
        devices = ["mount", "--rbind", "/dev", str(root / "dev")]
        # Not by chroot(2): in such a root, no user may make a namespace (user_namespaces(7)).
        pivot = (
            'cd "$1"; shift; mkdir -p mnt; pivot_root . mnt; mount -t proc proc proc; umount -l mnt; exec env -i "$@"'
        )
        inside: list[str | Path] = ["sh", "-euc", pivot, "sh", root, *_settings(env), "/bin/sh", "-euc", command]
        words = script(["sh", OVERLAY, place, *layers], devices, inside)
        return subprocess.run([*DIES_WITH_US, *APART, *words], check=False).returncode


def script(*commands: Sequence[str | Path]) -> list[str]:
    """One after the other, until one fails; the last one's status is that of all."""
    return ["sh", "-euc", "\n".join(shlex.join(map(str, each)) for each in commands)]


def _settings(env: Mapping[str, str] | None) -> list[str]:
    settings = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", **(env or {})}
    return [f"{name}={value}" for name, value in settings.items()]


def in_root(root: Path, command: str, env: Mapping[str, str] | None) -> list[str | Path]:
    # The shell outside stays process 1: programs tell a chroot by its root being another than process 1's.
    chroot = 'root=$1; shift; mount -t proc proc "$root/proc" && chroot "$root" env -i "$@"; exit $?'
    return ["sh", "-c", chroot, "sh", root, *_settings(env), "/bin/sh", "-euc", command]
