"""Every error that leaves the program: its D-Bus name, its exit status in the CLI, and one sentence for a person.

The sentence names the thing in the way and, where there is one, the next thing to do. Nothing below this module
formats prose twice: an error is raised with its sentence and shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from gpuswitch.sentence import Sentence

PREFIX = "org.gpuswitch1.Error."
AUTHENTICATION_REQUIRED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


def snake_case(name: str) -> str:
    """A name on the bus as JSON and metrics have it: `NotViable` is `not_viable`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class GpuswitchError(Exception):
    """An error with a D-Bus name (`dbus_name`) and the exit status `gpuswitchctl` ends with (`exit_code`).

    `blockers` are the reasons of a refusal that has several, for programs: of each its `kind` in a word, the sentence
    (`text`), and the name of the error that it would be alone (`error`).
    """

    name: ClassVar[str] = "Failed"
    exit_code: ClassVar[int] = 1
    blockers: tuple[Mapping[str, str], ...] = ()

    @property
    def dbus_name(self) -> str:
        return PREFIX + self.name

    @property
    def kind(self) -> str:
        """The last part of its D-Bus name as programs have it: `not_viable`."""
        return snake_case(self.dbus_name.rpartition(".")[2])


class Failed(GpuswitchError):
    """The switch, or an operation of it, did not work."""


class InvalidArgument(GpuswitchError):
    """What was asked for makes no sense: a malformed address, an unknown option, an ambiguous name."""

    name = "InvalidArgument"
    exit_code = 2


class NoSuchGpu(GpuswitchError):
    """No GPU answers to that name or address."""

    name = "NoSuchGpu"
    exit_code = 2


class NotViable(GpuswitchError):
    """The host cannot give this GPU away: no IOMMU, a neighbour in its group, a missing driver."""

    name = "NotViable"
    exit_code = 3


class Busy(GpuswitchError):
    """Something has the GPU open."""

    name = "Busy"
    exit_code = 3


class Owned(GpuswitchError):
    """A virtual machine has the GPU."""

    name = "Owned"
    exit_code = 3


class InProgress(GpuswitchError):
    """Another switch of the same GPU is under way; the sentence carries its id."""

    name = "InProgress"
    exit_code = 3


class NotAuthorized(GpuswitchError):
    """The caller may not do this."""

    name = "NotAuthorized"
    exit_code = 4


class AuthenticationRequired(NotAuthorized):
    """The caller may do this once a person has proved who they are, and has not allowed that they are asked.

    Its name is the one that D-Bus has for it (specification, Header Flags: ALLOW_INTERACTIVE_AUTHORIZATION).
    """

    @property
    def dbus_name(self) -> str:
        return AUTHENTICATION_REQUIRED


class Timeout(GpuswitchError):
    """The answer did not come in the time that the caller allowed."""

    name = "Timeout"
    exit_code = 6


class Wedged(GpuswitchError):
    """A kernel operation on this GPU has not returned, so nothing more is written to it."""

    name = "Wedged"
    exit_code = 7


class ConfigError(GpuswitchError):
    """The configuration cannot be used; the sentence names file, key and reason."""

    name = "InvalidArgument"
    exit_code = 2


_ERRORS = (Failed, InvalidArgument, NoSuchGpu, NotViable, Busy, Owned, InProgress, NotAuthorized, Timeout, Wedged)
KINDS = tuple(snake_case(error.name) for error in _ERRORS)
"""Every `kind` of an error."""
BY_NAME: dict[str, type[GpuswitchError]] = {error.name: error for error in _ERRORS}
"""Each by its name, as the record of a switch has it (`Switch.error`)."""
EXIT_CODES: dict[str, int] = {PREFIX + error.name: error.exit_code for error in _ERRORS} | {
    AUTHENTICATION_REQUIRED: NotAuthorized.exit_code
}
"""Exit status by D-Bus error name, for a client that knows nothing but the name."""
EXIT_UNREACHABLE = 5
"""The service does not answer on the bus."""


class KernelError(Exception):
    """The kernel refused one operation. `errno` is its reason, `operation` and `subject` say what was tried on what.

    `whole`: the subject as it is said to a person, with all that belongs to it; "": it is that already. Never leaves
    the program by itself: a step turns it into the sentence of its failure.
    """

    def __init__(self, operation: str, subject: str, errno: int, message: str, *, whole: str = "") -> None:
        words = {"operation": operation, "subject": whole or subject, "message": message}
        super().__init__(Sentence("cannot {operation} {subject}: {message}", **words))
        self.operation = operation
        self.subject = subject
        self.errno = errno
        self.message = message
