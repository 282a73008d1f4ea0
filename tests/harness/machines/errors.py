"""What goes wrong in a machine."""

from __future__ import annotations

from dataclasses import dataclass

from tests.harness.debian.errors import HarnessError


class MachineGoneError(HarnessError):
    """The machine has ended, or was reset under a command that was running in it."""


@dataclass(frozen=True)
class Result:
    """What a command in a machine came to."""

    command: str
    status: int
    """As a shell says it: 128 + N for a command that died of signal N."""
    stdout: str
    stderr: str


class CommandError(HarnessError):
    """A command in a machine did not do what it should have.

    Attributes:
        result: status and both outputs, as far as they came.
        console: the last lines of the machine's console.
    """

    def __init__(self, problem: str, result: Result, console: str) -> None:
        self.result = result
        self.console = console
        parts = (("stdout", result.stdout), ("stderr", result.stderr), ("console", console))
        logs = "".join(f"\n--- {name}\n{text.rstrip()}" for name, text in parts if text.strip())
        super().__init__(f"{problem}: {result.command}{logs}")


class CommandFailedError(CommandError):
    """It ended with another status than 0."""


class CommandTimeoutError(CommandError):
    """It was still running at its deadline; it got SIGKILL, which does not end a process in state D."""
