"""Has the configuration read beside the service, by a process that ends with that.

What checks it, pydantic, would be a third of the service, in time and in memory, and nobody needs it once the files are
read.
"""

from __future__ import annotations

import email.message  # noqa: F401 -- as below
import os
import pickle
import subprocess
import sys
import tempfile  # noqa: F401 -- as below
import traceback
import uuid  # noqa: F401 -- pydantic and the service both take these four: whatever is here before the fork is read once
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Self

import typing_extensions  # noqa: F401 -- as above

from gpuswitch import __version__
from gpuswitch.config.places import ConfigFaultsError, Fault
from gpuswitch.config.settings import Config
from gpuswitch.errors import ConfigError, Failed

_PROGRAM = Path(__file__).with_name("reading_main.py")
_BY = f"gpuswitch {__version__}, Python {sys.hexversion:x}\n".encode()
"""What it says begins so. A program of another version would mean something else by its pickle."""
_Found = tuple[Config | None, Sequence[Fault], str | None]
"""The configuration, or faults, or the sentence of what is no fault of a file."""


class Reading:
    """One that is under way, in a fork of this process. That must have no threads yet, and shares all it has imported.

    Whoever begins it does something else meanwhile.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = directory
        self._said, told = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._said)  # else it would be there to read what it writes itself, and wait for that
            _tell_and_end(directory, told)
        os.close(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody waits for it any more: at the end of its pipe it ends, too."""
        os.close(self._said)

    def result(self) -> Config:
        """Wait for it; once.

        Raises:
            ConfigFaultsError: with one line for each fault.
            ConfigError: it cannot be reached.
            Failed: that process did not end well; a second try may help.
        """
        with open(self._said, "rb", closefd=False) as file:
            said = file.read()
        _, status = os.waitpid(self._pid, 0)
        return _result(self._directory, os.waitstatus_to_exitcode(status), said)


def read(directory: Path) -> Config:
    """Have it read by a program of its own, where there are threads. Raises as `Reading.result`."""
    # It finds the libraries where they are found here, and takes no other order from the environment.
    command = [sys.executable, "-ISE", str(_PROGRAM), str(directory), *sys.path]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        raise Failed(f"cannot read {directory}: {sys.executable} cannot be started: {error.strerror}") from error
    return _result(directory, done.returncode, done.stdout)


def tell(directory: Path | str, descriptor: int) -> None:
    """Read it here, and say what was found there."""
    # To look for plugins, which nobody wants in here, takes a fifth of the time (pydantic/plugin/_loader.py).
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    from gpuswitch.config.loading import load  # noqa: PLC0415 -- the reason for all of this

    found: _Found
    try:
        found = load(Path(directory)), (), None
    except ConfigFaultsError as error:
        found = None, error.faults, None
    except ConfigError as error:
        found = None, (), str(error)
    with open(descriptor, "wb") as file:
        file.write(_BY)
        pickle.dump(found, file)


def _tell_and_end(directory: Path | str, descriptor: int) -> NoReturn:
    status = 1
    try:
        tell(directory, descriptor)
        status = 0
    except (BrokenPipeError, KeyboardInterrupt):  # nobody waits for it
        pass
    except BaseException:  # noqa: BLE001 -- nothing of the service may go on in here
        traceback.print_exc()
    finally:
        os._exit(status)


def _result(directory: Path | str, status: int, said: bytes) -> Config:
    if status != 0:
        raise Failed(f"cannot read {directory}: the process that reads it ended with status {status}")
    if not said.startswith(_BY):
        raise Failed(f"cannot read {directory}: gpuswitch was upgraded since this service began: start it anew")
    found: _Found = pickle.loads(said[len(_BY) :])  # noqa: S301 -- of our own process
    config, faults, error = found
    if faults:
        raise ConfigFaultsError(faults)
    if config is None:
        raise ConfigError(error)
    return config
