"""The command channel, our side; inside/agent.py is the other end and describes the protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.harness.machines.channel import Channel
from tests.harness.machines.errors import MachineGoneError

KILL_GRACE = 60.0
"""Seconds between a command's own deadline and the end of our patience with the machine."""


@dataclass(frozen=True)
class Reply:
    """Status and outputs of one command; timed_out means that it was still running at its deadline."""

    status: int
    timed_out: bool
    stdout: bytes
    stderr: bytes


class Agent:
    """Starts commands, and collects their replies in whatever order they come. For one thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._next = 0
        self._deadlines: dict[int, float] = {}
        self._replies: dict[int, Reply] = {}

    def fileno(self) -> int:
        """For select(): readable when a reply is coming, or when the machine is gone."""
        return self._channel.fileno()

    def wait_ready(self, timeout: float) -> None:
        """Wait until the agent of a booting machine says that it is there. Commands of the boot before are lost.

        What a machine had half sent when it was reset is passed over.
        """
        self._deadlines.clear()
        self._replies.clear()
        deadline = time.monotonic() + timeout
        while b'{"ready":' not in self._channel.line(deadline):
            pass

    def reconnect(self, channel: Channel) -> None:
        """Go on with the channel of another QEMU; wait_ready() comes next."""
        self._channel = channel

    def start(self, command: str, stdin: bytes, timeout: float) -> int:
        """Start a shell command with a deadline of so many seconds; gives the number to ask for its reply."""
        return self._ask({"sh": command, "in": len(stdin), "timeout": timeout}, stdin, timeout + KILL_GRACE)

    def do(self, word: str, arguments: Sequence[Any], timeout: float) -> int:
        """Have a word of inside/words.py done; gives the number to ask for its reply."""
        return self._ask({"do": word, "with": arguments}, b"", timeout)

    def has_reply(self, number: int) -> bool:
        """Whether the reply to this command is here. Raises as reply() does."""
        while number not in self._replies and self._channel.has_input():
            self._collect(self._deadline(number))
        return number in self._replies

    def reply(self, number: int) -> Reply:
        """Wait for the reply to one command.

        Raises:
            MachineGoneError: the machine was booted anew since the command was started.
            TimeoutError, EOFError: the machine does not answer, or QEMU is gone.
        """
        deadline = self._deadline(number)
        while number not in self._replies:
            self._collect(deadline)
        del self._deadlines[number]
        return self._replies.pop(number)

    def _ask(self, request: Mapping[str, Any], data: bytes, patience: float) -> int:
        self._next += 1
        deadline = self._deadlines[self._next] = time.monotonic() + patience
        self._channel.send(json.dumps({"id": self._next, **request}).encode() + b"\n" + data, deadline)
        return self._next

    def _deadline(self, number: int) -> float:
        if number not in self._deadlines:
            raise MachineGoneError("cannot get the reply of a command: the machine was booted anew since")
        return self._deadlines[number]

    def _collect(self, deadline: float) -> None:
        head: dict[str, Any] = json.loads(self._channel.line(deadline) or b"{}")
        if "ready" in head:
            raise MachineGoneError("cannot go on: the machine rebooted by itself")
        if "id" in head:
            body = self._channel.exactly(head["out"] + head["err"], deadline)
            stdout, stderr = body[: head["out"]], body[head["out"] :]
            self._replies[head["id"]] = Reply(head["status"], head["timed_out"], stdout, stderr)
