"""The desktops that end with a display manager: sessions of logind on a seat (org.freedesktop.login1(5)). They may draw
by another GPU than the one that is asked about.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, NamedTuple

from jeepney import MessageFlag

from gpuswitch.cli.client import PROPERTIES, Service, call, plain_values
from gpuswitch.cli.failures import CtlError

LOGIND = "org.freedesktop.login1"
_PATH = "/org/freedesktop/login1"
_MANAGER = "org.freedesktop.login1.Manager"
_SESSION = "org.freedesktop.login1.Session"
_DRAWN = frozenset({"x11", "wayland", "mir"})
"""Types of a session that is no text."""
_SECONDS = 5.0
"""For all that logind has to answer: what it does not say in time is left out of what is told."""


class Desktop(NamedTuple):
    """A session, by logind's id, and whose it is; "" where nobody could tell."""

    session: str
    user: str
    seat: str


def desktops(service: Service) -> list[Desktop]:
    """Those that people see now; none where the machine is one in memory, or has no logind on this bus."""
    until = time.monotonic() + _SECONDS
    with suppress(CtlError):
        if not service.about().get("Simulated"):
            found = _ask(service, until, _PATH, _MANAGER, "ListSessions")
            return [
                Desktop(session, user, seat)
                for session, _uid, user, seat, path in found
                if seat and _drawn(service, until, path)
            ]
    return []


def _drawn(service: Service, until: float, path: str) -> bool:
    """Whether it is a desktop of a person, and no text console, nor what asks people for their names."""
    with suppress(CtlError):  # it has ended since
        now = plain_values(_ask(service, until, path, PROPERTIES, "GetAll", "s", _SESSION))
        return now["Type"] in _DRAWN and now["Class"] == "user"
    return False


def _ask(
    service: Service, until: float, path: str, interface: str, method: str, signature: str = "", *arguments: object
) -> Any:
    message = call(LOGIND, path, interface, method, signature, *arguments)
    # Where it does not run, there is none.
    message.header.flags |= MessageFlag.no_auto_start
    return service.ask(message, max(0.0, until - time.monotonic())).body[0]
