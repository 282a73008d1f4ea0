"""Where the things lie that are looked at: below a folder, so that a tree of files is a machine for tests."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gpuswitch.doctor.findings import Unseen
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.sentence import Sentence

COMMAND_SECONDS = 20.0
"""How long a program may take that is asked something: it answers in milliseconds, or not at all."""
_MOST = 1 << 20
_PROGRAMS = ("usr/bin", "usr/sbin", "bin", "sbin", "run/current-system/sw/bin")
_ONLY_ROOT = Sentence("only root may look at it")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: `root` is "" or a folder with what is in `/`; `roots` are the places of a look at the host.

    `as_root`: whoever looks is root, and may see all of it.
    """

    root: str = ""
    roots: Roots = field(default_factory=Roots)
    as_root: bool = field(default_factory=lambda: os.geteuid() == 0)

    def path(self, place: str) -> str:
        return f"{self.root}{place}"


class Files:
    """Reads below a machine's root, and remembers what it was not allowed to: that nothing was seen says nothing then.

    It opens regular files alone: nobody knows what else there is to wait for.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.unseen: list[Unseen] = []

    def text(self, place: str) -> str:
        """A file, up to a megabyte; "" where there is none, or none that can be read."""
        try:
            descriptor = os.open(self.machine.path(place), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._note(place, error)
            return ""
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return ""
            said = b""
            while len(said) < _MOST and (part := os.read(descriptor, 1 << 16)):
                said += part
            return said.decode(errors="replace")
        except OSError as error:
            self._note(place, error)
            return ""
        finally:
            os.close(descriptor)

    def lines(self, place: str) -> list[str]:
        return self.text(place).split("\n")

    def names(self, place: str) -> list[str]:
        """What is in a folder, in order."""
        try:
            return sorted(os.listdir(self.machine.path(place)))  # noqa: PTH208 -- of the standard library's own kind
        except OSError as error:
            self._note(place, error)
            return []

    def status(self, place: str) -> os.stat_result | None:
        """What the file is, links followed; None where it is not there, or nobody may know."""
        try:
            return os.stat(self.machine.path(place))  # noqa: PTH116 -- as the rest here
        except OSError as error:
            self._note(place, error)
            return None

    def there(self, place: str) -> bool:
        return self.status(place) is not None

    def executable(self, place: str) -> bool:
        """Whether it is a file that may be run."""
        status = self.status(place)
        return status is not None and stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)

    def program(self, name: str) -> str:
        """Where a program lies, "" nowhere."""
        places = (f"/{folder}/{name}" for folder in _PROGRAMS)
        return next((place for place in places if os.access(self.machine.path(place), os.X_OK)), "")

    def asked(self, name: str, *arguments: str) -> str | None:
        """What a program answers, by its standard output; None where there is none, or it does not answer."""
        if not (place := self.program(name)):
            return None
        try:
            ended = subprocess.run(
                [self.machine.path(place), *arguments],
                env={"LC_ALL": "C", "PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            self.unseen.append(Unseen(name, Sentence("it does not answer")))
            return None
        if ended.returncode:
            self.unseen.append(Unseen(name, Sentence("it does not answer")))
            return None
        return ended.stdout

    def below(self, folders: Sequence[str], ending: str = "") -> Iterator[str]:
        """The files of these folders by their places, in order; those that end so."""
        for folder in folders:
            yield from (f"{folder}/{name}" for name in self.names(folder) if name.endswith(ending))

    def _note(self, place: str, error: OSError) -> None:
        if isinstance(error, PermissionError):
            unseen = Unseen(place, _ONLY_ROOT, for_root=True)
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        else:
            unseen = Unseen(place, Sentence.of(error.strerror))
        if unseen not in self.unseen:
            self.unseen.append(unseen)
