"""The other programs of this installation."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed


def installed(name: str) -> str:
    """The path of a command that was installed with this one.

    Raises:
        CtlError: it is not there.
    """
    program = Path(sys.executable).with_name(name)
    if program.exists():
        return str(program)
    raise CtlError.of(Failed, _("cannot find {program}; install gpuswitch anew", program=program))


def as_typed(name: str) -> str:
    """What a person types for a command that was installed with this one: its name where a shell finds it by that, else
    where it is, from here.
    """
    if shutil.which(name):
        return name
    program = installed(name)
    return min(program, os.path.relpath(program), key=len)
