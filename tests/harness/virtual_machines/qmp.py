"""A client of QEMU's machine protocol (QMP) that loses no event.

Source of the protocol: QEMU, docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.harness.debian.errors import HarnessError
from tests.harness.machines.channel import Channel

Event = Mapping[str, Any]
"""{"event": NAME, "data": {...}, "timestamp": {...}}"""


def anything(_data: Mapping[str, Any]) -> bool:
    return True


class Qmp:
    """Commands one at a time; events are kept until somebody waits for them."""

    def __init__(self, channel: Channel, timeout: float = 60) -> None:
        """Shake hands. EOFError when QEMU ends instead of answering."""
        self._channel = channel
        self._events: list[Event] = []
        self._read(time.monotonic() + timeout)
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 60) -> Any:
        """Run one command and give what it returns.

        Raises:
            HarnessError: QEMU refused the command; the text is QEMU's.
            TimeoutError, EOFError: no answer in time, or QEMU is gone.
        """
        deadline = time.monotonic() + timeout
        request = {"execute": command, "arguments": dict(arguments or {})}
        self._channel.send(json.dumps(request).encode() + b"\n", deadline)
        while True:
            message = self._read(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise HarnessError(f"cannot {command} in QEMU: {message['error']['desc']}")
            self._events.append(message)

    def wait_event(
        self, name: str, matches: Callable[[Mapping[str, Any]], bool] = anything, *, timeout: float = 60
    ) -> Event:
        """Take the oldest kept event of this name whose data match, or wait for one."""
        deadline = time.monotonic() + timeout
        for kept in self._events:
            if kept["event"] == name and matches(kept.get("data", {})):
                self._events.remove(kept)
                return kept
        while True:
            event = self._read(deadline)
            if event["event"] == name and matches(event.get("data", {})):
                return event
            self._events.append(event)

    def forget_events(self, name: str) -> None:
        """Drop the kept events of this name, so that the next wait sees a new one."""
        self._events = [event for event in self._events if event["event"] != name]

    def _read(self, deadline: float) -> Mapping[str, Any]:
        message: Mapping[str, Any] = json.loads(self._channel.line(deadline))
        return message
