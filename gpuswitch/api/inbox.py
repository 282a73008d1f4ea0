"""Calls that have come and are not served yet: of each user in turn, so that one who floods us is in nobody else's way.

The message bus hands on what it gets in the order in which it got it, and waits for nobody. So all that it has for us
is read at once, and what is served next is decided here (start-time fair queueing: Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

CALL: Final = 1
"""METHOD_CALL (specification, Message Types)."""
SIGNAL: Final = 4

_TEXT: Final = rb"[so]\x00.{4}[^\x00]*\x00{1,8}"
_OTHERS: Final = rb"g\x00.[^\x00]*\x00{1,8}|u\x00.{4}"
_UP_TO_SENDER: Final = re.compile(
    rb"(?:[^\x00\x07]\x01(?:" + _TEXT + rb"|" + _OTHERS + rb"))*\x07\x01s\x00.{4}([^\x00]*)\x00", re.DOTALL
)
"""Header fields, each its number, its type and its value, up to the one with number 7 (specification, Header Fields).

No text holds a zero byte: one ends each, and more fill up to the next multiple of eight. As one expression this takes
a third of the time, and it is done for each message of a flood.
"""

MANY: Final = 512
"""Calls that wait: from here on each user has a limit."""
MANY_BYTES: Final = 1024 * 1024
"""The same in bytes."""
MOST_OF_ONE: Final = 64
"""Calls of one user that wait then. More of them are refused."""
MOST_BYTES_OF_ONE: Final = 16 * 1024
"""The same in bytes. A call of ours has a few hundred."""


@dataclass(eq=False, slots=True)
class _Queue:
    frames: deque[bytes] = field(default_factory=deque)
    size: int = 0


class Inbox:
    """The frames that wait, of each of their owners: a user where it is known, else a connection."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, _Queue] = {}
        self._turns: list[tuple[int, int, Hashable]] = []
        self._numbers = itertools.count()
        self._now = 0
        self._count = 0
        self._size = 0

    def __len__(self) -> int:
        return self._count

    @property
    def crowded(self) -> bool:
        """Whether it matters whose is next."""
        return self._count >= MANY or self._size >= MANY_BYTES

    def put(self, owner: Hashable, frame: bytes) -> bool:
        """Keep it until it is its turn. False where there are too many of this owner's already."""
        queue = self._queues.get(owner) or _Queue()
        if self.crowded and (len(queue.frames) >= MOST_OF_ONE or queue.size + len(frame) > MOST_BYTES_OF_ONE):
            return False
        if not queue.frames:
            # Whoever had nothing waiting is next: a caller that waits for each answer is before one that does not.
            self._queues[owner] = queue
            heapq.heappush(self._turns, (self._now, -next(self._numbers), owner))
        queue.frames.append(frame)
        queue.size += len(frame)
        self._count += 1
        self._size += len(frame)
        return True

    def take(self) -> bytes | None:
        """The next one; None: nothing waits."""
        if not self._turns:
            return None
        self._now, _, owner = heapq.heappop(self._turns)
        queue = self._queues[owner]
        frame = queue.frames.popleft()
        queue.size -= len(frame)
        self._count -= 1
        self._size -= len(frame)
        if queue.frames:
            heapq.heappush(self._turns, (self._now + 1, next(self._numbers), owner))
        else:
            del self._queues[owner]
        return frame


def sender_of(message: bytes) -> str:
    """The sender in a header (specification, Message Format), without reading the rest; "" where that is not so easy.

    Of what the bus has passed on, that is so where a header field has a type of its own.
    """
    found = _UP_TO_SENDER.match(message, 16)
    return found[1].decode("ascii", "replace") if found else ""
