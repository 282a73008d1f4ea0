"""Calls that have come and are not served yet: of each user in turn, so that one who floods us is in nobody else's way.

The message bus hands on what it gets in the order in which it got it, and waits for nobody. So all that it has for us
is read at once, and what is served next is decided here (start-time fair queueing: Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

import heapq
import itertools
import struct
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import suppress
from struct import unpack_from
from typing import Final

CALL: Final = 1
"""METHOD_CALL (specification, Message Types)."""
SIGNAL: Final = 4
_SENDER: Final = 7
_TEXTS: Final = (b"s", b"o")

MANY: Final = 512
"""Calls that wait: from here on each user has a limit."""
MOST_OF_ONE: Final = 64
"""Calls of one user that wait then. More of them are refused."""
MANY_OF_ONE: Final = 8
"""Calls of one user that wait then, from which on they get no large answers."""


class Inbox:
    """The frames that wait, of each of their owners: a user where it is known, else a connection."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[bytes]] = {}
        self._turns: list[tuple[int, int, Hashable]] = []
        self._numbers = itertools.count()
        self._now = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def crowded(self) -> bool:
        """Whether it matters whose is next."""
        return self._count >= MANY

    def waiting(self, *owners: Hashable) -> Iterator[bytes]:
        """The frames of these owners that wait; of all, where none is named."""
        for owner in owners or self._queues:
            yield from self._queues.get(owner, ())

    def crowds(self, owner: Hashable) -> bool:
        """Whether it matters, and this owner has many of those that wait."""
        return self.crowded and len(self._queues.get(owner, ())) >= MANY_OF_ONE

    @property
    def crowder_next(self) -> bool:
        """Whether whoever is next crowds others."""
        return bool(self._turns) and self.crowds(self._turns[0][2])

    def put(self, owner: Hashable, frame: bytes) -> bool:
        """Keep it until it is its turn. False where there are too many of this owner's already."""
        queue = self._queues.get(owner)
        if queue is None:
            # Whoever had nothing waiting is next: a caller that waits for each answer is before one that does not.
            queue = self._queues[owner] = deque()
            heapq.heappush(self._turns, (self._now, -next(self._numbers), owner))
        elif self.crowded and len(queue) >= MOST_OF_ONE:
            return False
        queue.append(frame)
        self._count += 1
        return True

    def take(self) -> bytes | None:
        """The next one; None: nothing waits."""
        if not self._turns:
            return None
        turn = heapq.heappop(self._turns)
        self._now = turn[0]
        return self._taken(turn)

    def take_from_others(self) -> bytes | None:
        """The next one of those who do not crowd others, whose turn may be before; None: there is none.

        Those keep their turns, and whoever had nothing waiting is before them as ever.
        """
        turn = min((each for each in self._turns if not self.crowds(each[2])), default=None)
        if turn is None:
            return None
        self._turns.remove(turn)
        heapq.heapify(self._turns)
        return self._taken(turn)

    def _taken(self, turn: tuple[int, int, Hashable]) -> bytes:
        now, _, owner = turn
        queue = self._queues[owner]
        frame = queue.popleft()
        self._count -= 1
        if queue:
            heapq.heappush(self._turns, (now + 1, next(self._numbers), owner))
        else:
            del self._queues[owner]
        return frame


def sender_of(message: bytes) -> str:
    """The sender in a header (specification, Message Format), without reading the rest; "" where that is not so easy.

    Of what the bus has passed on, that is so where a header field has a type of its own.
    """
    with suppress(IndexError, struct.error, UnicodeDecodeError):
        return _sender(message)
    return ""


def _sender(message: bytes) -> str:
    order = "<" if message[0] == ord("l") else ">"
    number = f"{order}I"
    at, end = 16, 16 + int(unpack_from(number, message, 12)[0])
    while at < end:
        at = (at + 7) & ~7
        code, length = message[at], message[at + 1]
        kind = message[at + 2 : at + 2 + length]
        at += 3 + length
        if kind in _TEXTS:
            at = (at + 3) & ~3
            size = int(unpack_from(number, message, at)[0])
            if code == _SENDER:
                return message[at + 4 : at + 4 + size].decode()
            at += 5 + size
        elif kind == b"g":
            at += 2 + message[at]
        elif kind == b"u":
            at = ((at + 3) & ~3) + 4
        else:
            return ""
    return ""
