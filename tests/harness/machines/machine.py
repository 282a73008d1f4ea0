"""A running machine, as tests see it, whatever it is made of."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, ParamSpec, Self, TypeVar

from tests.harness.debian.errors import HarnessError
from tests.harness.machines.agent import Agent
from tests.harness.machines.errors import CommandFailedError, CommandTimeoutError, MachineGoneError, Result
from tests.harness.machines.inside import words

P = ParamSpec("P")
T = TypeVar("T")

COMMAND_SECONDS = 120.0
WORD_SECONDS = 200.0
BOOT_SECONDS = 300.0

COME_UP = """\
systemctl is-system-running --wait >/dev/null
{settle}
bad=$({{
    # systemd does not call a service failed, or the system degraded, that crashes and is started anew
    systemctl list-units --state=failed,auto-restart --plain --no-legend | cut -d ' ' -f 1
    systemctl show -p Id -p NRestarts '*.service' |
        awk 'BEGIN {{ RS = ""; FS = "\\n" }} !/NRestarts=0/ {{ sub(/.*Id=/, ""); sub(/\\n.*/, ""); print }}'
}} | sort -u)
test -n "$bad" || exit 0
echo $bad
for unit in $bad; do journalctl -b -n 40 -o cat --no-pager -u "$unit"; done
exit 1
"""


class Job:
    """A command that runs in a machine while the test does something else."""

    def __init__(self, machine: Machine, command: str, number: int) -> None:
        self._machine = machine
        self._command = command
        self._number = number

    def ended(self) -> bool:
        """Whether it has ended by now. Raises MachineGoneError as wait() does."""
        with self._machine.explained(f"no reply to {self._command!r}"):
            return self._machine.agent.has_reply(self._number)

    def wait(self, *, check: bool = True) -> Result:
        """Wait until it ends; once. With check, another status than 0 is an error.

        Raises:
            CommandFailedError, CommandTimeoutError: with both outputs and the end of the console.
            MachineGoneError: the machine ended, or was booted anew.
        """
        with self._machine.explained(f"no reply to {self._command!r}"):
            reply = self._machine.agent.reply(self._number)
        stdout, stderr = (data.decode(errors="replace") for data in (reply.stdout, reply.stderr))
        result = Result(self._command, reply.status, stdout, stderr)
        if reply.timed_out:
            raise CommandTimeoutError("ran out of time", result, self._machine.console_tail())
        if check and reply.status != 0:
            raise CommandFailedError(f"ended with status {reply.status}", result, self._machine.console_tail())
        return result


class Machine(ABC):
    """A machine with a command channel. For one thread; use start() to have commands run side by side.

    All methods that talk to it raise MachineGoneError when it has ended, and TimeoutError when it does not answer.
    """

    SETTLE: ClassVar = ":"
    """The command that waits until those are done who follow the start of everything, like udev."""

    JOURNAL: ClassVar = "-u 'gpuswitchd*' -n 80"
    """What a failed test shows of the journal: options of journalctl."""

    agent: Agent

    def sh(
        self, command: str, *, stdin: str | bytes = b"", check: bool = True, timeout: float = COMMAND_SECONDS
    ) -> Result:
        """Run a command with /bin/sh as root in `/` and wait for it; timeout in seconds, then SIGKILL to its group.

        A command may leave processes in the background. Raises as Job.wait() does.
        """
        return self.start(command, stdin=stdin, timeout=timeout).wait(check=check)

    def start(self, command: str, *, stdin: str | bytes = b"", timeout: float = COMMAND_SECONDS) -> Job:
        """Start a command as sh() does, without waiting for it."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        with self.explained(f"{command!r} not started"):
            return Job(self, command, self.agent.start(command, data, timeout))

    def do(self, word: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Have the machine's agent do what a function of inside/words.py says; gives what that returns.

        Raises:
            CommandFailedError: it has raised an error.
        """
        assert not keywords
        said = f"{word.__name__}{arguments}"
        with self.explained(f"{said} not done"):
            reply = self.agent.reply(self.agent.do(word.__name__, arguments, WORD_SECONDS))
        if reply.status != 0:
            result = Result(said, reply.status, "", reply.stderr.decode(errors="replace"))
            raise CommandFailedError("failed", result, self.console_tail())
        done: T = json.loads(reply.stdout)
        return done

    def push(self, content: str | bytes, path: str, *, mode: int = 0o644) -> None:
        """Write a file, making its folders."""
        data = content.encode() if isinstance(content, str) else content
        self.do(words.write, path, data.decode("latin-1"), mode)

    def read(self, path: str) -> str:
        """The text of a file. CommandFailedError where there is none."""
        return self.do(words.read, path)

    def wait_until_up(self, *, timeout: float = BOOT_SECONDS) -> None:
        """Wait until systemd has started everything and is done.

        Raises:
            HarnessError: units have failed, or fail and are started over and over; with their names and their log.
        """
        up = self.sh(COME_UP.format(settle=self.SETTLE), check=False, timeout=timeout)
        if up.status != 0:
            raise HarnessError(f"cannot go on: units have failed while the machine came up: {up.stdout}{up.stderr}")

    @abstractmethod
    def console_tail(self, lines: int = ...) -> str:
        """The last lines of the machine's console."""

    @abstractmethod
    def gone(self) -> MachineGoneError:
        """The error that tells why the machine is not there any more."""

    @abstractmethod
    def kill(self) -> None:
        """End it, whatever it is doing, and wait for that."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Let errors of the channels say what they stopped, and what the machine and its console have to say."""
        try:
            yield
        except EOFError:
            raise self.gone() from None
        except TimeoutError:
            raise TimeoutError(f"{what} in time; the console:\n{self.console_tail()}") from None
