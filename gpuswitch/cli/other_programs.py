"""Programs of others that change something when they are asked to, or judge what was written for them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from gpuswitch.cli.output import clean
from gpuswitch.cli.translate import _
from gpuswitch.doctor.machine import Files

SECONDS = 60.0
"""How long one may take: `qm set` waits up to ten seconds for a machine's lock."""


def run(files: Files, command: Sequence[str]) -> str | None:
    """Run a program; why it failed, in its own words, None where it did not."""
    program = files.machine.path(files.program(command[0]) or f"/usr/sbin/{command[0]}")
    try:
        ended = subprocess.run(
            [program, *command[1:]],
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except OSError as error:
        return str(error.strerror)
    except subprocess.TimeoutExpired:
        return _("{program} has not ended within {seconds} s", program=command[0], seconds=f"{SECONDS:g}")
    if ended.returncode == 0:
        return None
    said = "; ".join(filter(None, map(str.strip, ended.stderr.splitlines())))
    return clean(said) or _("{program} ended with status {status}", program=command[0], status=ended.returncode)
