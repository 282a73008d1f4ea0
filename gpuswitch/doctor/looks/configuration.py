"""The configuration, read as the service does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gpuswitch.config.loading import load
from gpuswitch.config.settings import DIRECTORY
from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import Configuration
from gpuswitch.errors import ConfigError


def look(files: Files) -> Configuration:
    """Files that others than root may write are a fault: the service takes no orders from them.

    What only root may read is no fault, but not seen.
    """
    folder = Path(files.machine.path(str(DIRECTORY)))
    for place in (str(DIRECTORY), f"{DIRECTORY}/conf.d"):
        for name in files.names(place):
            if name.endswith(".toml"):
                files.text(f"{place}/{name}")
    try:
        return Configuration(load(folder, {}, as_root=not files.machine.root))
    except ConfigError as error:
        return Configuration(faults=tuple(fault for fault in str(error).splitlines() if not _for_root(fault)))


def _for_root(fault: str) -> bool:
    return os.geteuid() != 0 and fault.endswith(os.strerror(errno.EACCES))
