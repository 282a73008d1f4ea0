"""The other programs of this installation."""

from __future__ import annotations

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
