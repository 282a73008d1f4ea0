"""Who left the bus with something of ours on its way, and what was on its way when we lost the bus: a line each.

The bus ends a connection that does not read, or fills a quota (dbus-broker: diag_quota_queue_reply in bus/diag.c), and
tells nobody else why. What we know of it stands in the line, to be laid beside the bus' own log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

from gpuswitch.api.connection import Connection
from gpuswitch.api.users import Users
from gpuswitch.runtime.seldom import Seldom

logger = logging.getLogger(__name__)

MUCH: Final = 64 * 1024
"""Bytes of answers to one connection that are worth a line, if it may not have read them."""
MOST_NAMED: Final = 3
"""Calls, or users, that are named in a line."""


class Departures:
    """Tells the log of them, some times in a minute."""

    def __init__(self, connection: Connection, users: Users) -> None:
        self._connection = connection
        self._users = users
        self._tells = Seldom()

    def left(self, name: str, called: Sequence[str]) -> None:
        """This connection is gone. `called` are the methods that it has not had an answer of."""
        user = self._users.known(name)
        waiting = self._connection.waiting(name, *([] if user is None else [user]))[name]
        answers, size = self._connection.answered(name)
        if (not called and not waiting and size < MUCH) or not self._tells():
            return
        parts = [f"{_count(len(called), 'call')} without an answer ({_some(called)})"] if called else []
        parts += [f"{_count(waiting, 'call')} not served yet"] if waiting else []
        parts += [f"{_count(answers, 'answer')} of {size} bytes sent to it"] if answers else []
        logger.info("%s left the bus, or was ended by it, with %s", self._described(name), ", ".join(parts))

    def lost(self, called: int) -> str:
        """What was on its way when we lost the bus, as the end of a sentence; "" where that was nothing.

        `called` is how many calls were under way.
        """
        parts = []
        if waiting := self._connection.waiting():
            of_user: Counter[str] = Counter()
            for name, count in waiting.items():
                user = self._users.known(name)
                of_user[name if user is None else f"user {user}"] += count
            most = ", ".join(f"{count} of {owner}" for owner, count in of_user.most_common(MOST_NAMED))
            parts.append(f"{_count(waiting.total(), 'call')} not served yet ({most})")
        parts += [f"{_count(called, 'call')} under way"] if called else []
        parts += [f"{unsent} bytes not sent"] if (unsent := self._connection.unsent) else []
        return f", with {', '.join(parts)}" if parts else ""

    def _described(self, name: str) -> str:
        user, process = self._users.known(name), self._users.process(name)
        known = [f"user {user}"] if user is not None else []
        known += [f"pid {process}"] if process is not None else []
        return f"{name} ({', '.join(known)})" if known else name


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _some(called: Sequence[str]) -> str:
    named = sorted(set(called))
    return ", ".join([*named[:MOST_NAMED], *(["…"] if len(named) > MOST_NAMED else [])])
