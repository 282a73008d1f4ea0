"""polkit's own agent for terminals, which asks for a password where no agent of a desktop is there to do so."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PROGRAM = "pkttyagent"
_START_SECONDS = 10.0


def can_authenticate() -> bool:
    """Whether there is a person to ask for a password: at a terminal, and not root, who is never asked."""
    return sys.stdin.isatty() and sys.stderr.isatty() and os.geteuid() != 0


@contextmanager
def agent() -> Iterator[None]:
    """An agent for what this process asks for, until the block ends; none where the program is missing.

    Without `--fallback`: polkit finds no such agent for callers that belong to no session
    (get_authentication_agent_for_subject in polkitbackendinteractiveauthority.c). So this is for when it is known that
    there is no other.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        yield
        return
    ready, theirs = os.pipe()
    try:
        command = [program, "--notify-fd", str(theirs)]
        process = subprocess.Popen(command, pass_fds=[theirs])
    finally:
        os.close(theirs)
    try:
        # It closes its end when polkit knows of it, or when it ends.
        select.select([ready], [], [], _START_SECONDS)
        os.close(ready)
        yield
    except KeyboardInterrupt:
        # What comes next is not to stand behind its prompt.
        sys.stderr.write("\n")
        raise
    finally:
        process.terminate()
        process.wait()
