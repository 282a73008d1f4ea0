"""Who may do what. Root and whoever runs the service may do all; for everybody else polkit is asked.

Its subject is the caller's name on the bus, which nobody else can have (a process' number may be another's by then:
CVE-2013-4288), and it asks a person only where the caller allows that. See units/org.gpuswitch1.policy.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final

from gpuswitch.api.bus import Bus, CallError
from gpuswitch.api.connection import DRIVER, Message, MessageFlag
from gpuswitch.api.serving import Caller
from gpuswitch.api.signatures import pack
from gpuswitch.errors import AuthenticationRequired, Failed, NotAuthorized, Timeout
from gpuswitch.runtime.seldom import Seldom

logger = logging.getLogger(__name__)

POLKIT: Final = "org.freedesktop.PolicyKit1"
_AUTHORITY: Final = ("/org/freedesktop/PolicyKit1/Authority", f"{POLKIT}.Authority")
_ABSENT: Final = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.systemd1.",
)
"""How the bus says that there is no such service: it is not installed, or it is masked."""
_CHECK: Final = ("(sa{sv})", "s", "a{ss}", "u", "s")
_ASK: Final = 1
"""AllowUserInteraction, a flag of CheckAuthorization."""
_SECONDS: Final = 60.0
"""For an answer for which nobody is asked: its rules are programs, which it ends after 15 s each."""


Denied = Callable[[str, NotAuthorized], None]
"""Hears of each call that its caller was not allowed: the action, and the error that it was answered with."""


class Action(StrEnum):
    """What a caller may be allowed to do: `org.gpuswitch1.` and this, for polkit."""

    INSPECT = "inspect"
    SWITCH = "switch"
    FORCE = "force"
    RECOVER = "recover"
    MANAGE = "manage"
    VM = "vm"

    @property
    def id(self) -> str:
        return f"org.gpuswitch1.{self}"


_WORDS: Final = {
    Action.INSPECT: "look at this",
    Action.SWITCH: "switch GPUs",
    Action.FORCE: "end programs, or stop units that the configuration does not name",
    Action.RECOVER: "recover GPUs",
    Action.MANAGE: "have the configuration read again",
    Action.VM: "speak for virtual machines",
}


class Authority:
    """Asks polkit on this bus."""

    def __init__(self, bus: Bus, denied: Denied = lambda _action, _error: None) -> None:
        self._bus = bus
        self._denied = denied
        self._numbers = itertools.count(1)
        self._told = False
        self._refused: deque[tuple[str, Action]] = deque(maxlen=64)
        self._tells = Seldom()

    async def permit(self, caller: Caller, action: str, about: Mapping[str, str]) -> None:
        """Return if the caller may do this. A question to a person takes as long as that person.

        Cancelled, the question is withdrawn.

        Raises:
            NotAuthorized: no, or a person was asked and did not prove to be one who may.
            AuthenticationRequired: a person would have to be asked.
            Failed: polkit did not say.
        """
        if caller.user in {0, os.geteuid()}:
            return
        try:
            await self._permit(caller, Action(action), about)
        except NotAuthorized as error:
            self._denied(action, error)
            raise

    async def _permit(self, caller: Caller, asked: Action, about: Mapping[str, str]) -> None:
        try:
            allowed, challenge, details = await self._ask(caller, asked, about)
        except CallError as error:
            if error.sender != DRIVER or not error.remote_name.startswith(_ABSENT):
                raise Failed(f"cannot ask polkit whether you may {_WORDS[asked]}: {error}") from error
            self._without(asked)
            return
        except Timeout as error:
            raise Failed(f"cannot ask polkit whether you may {_WORDS[asked]}: {error}") from error
        if allowed:
            return
        self._tell(caller, asked)
        if "polkit.dismissed" in details:
            raise NotAuthorized(f"you may not {_WORDS[asked]}: the question of polkit was dismissed")
        if challenge:
            nobody = "; no agent of it is there to ask you" if caller.may_be_asked else ""
            raise AuthenticationRequired(
                f"to {_WORDS[asked]}, prove to polkit that you may ({asked.id}){_or_else(asked)}{nobody}"
            )
        raise NotAuthorized(f"you may not {_WORDS[asked]}: polkit does not allow it ({asked.id})")

    async def _ask(
        self, caller: Caller, action: Action, about: Mapping[str, str]
    ) -> tuple[bool, bool, Mapping[str, str]]:
        """What CheckAuthorization returns: yes, whether a person could make it so, and details."""
        number = f"gpuswitch-{next(self._numbers)}"
        subject = ("system-bus-name", {"name": caller.name})
        flags = _ASK if caller.may_be_asked else 0
        body = [subject, action.id, dict(about), flags, number]
        answered = False
        try:
            [result] = await self._bus.call(
                _message("CheckAuthorization", _CHECK, *body), within=None if flags else _SECONDS
            )
            answered = True
        except CallError:
            answered = True
            raise
        finally:
            if not answered:
                self._bus.send(_message("CancelCheckAuthorization", ("s",), number, wanted=False))
        if not isinstance(result, list) or len(result) != 3:
            raise Failed(f"cannot understand polkit: it answered {str(result)[:80]}")
        yes, challenge, details = result
        return bool(yes), bool(challenge), details

    def _tell(self, caller: Caller, action: Action) -> None:
        """Log it, once for each connection, of which they can have many."""
        if (caller.name, action) not in self._refused and self._tells():
            self._refused.append((caller.name, action))
            words = _WORDS[action]
            logger.info("user %d (%s) may not %s: polkit says no to %s", caller.user, caller.name, words, action.id)

    def _without(self, action: Action) -> None:
        """There is no polkit: everybody may look, as by its defaults, and only root may act."""
        if not self._told:
            self._told = True
            logger.warning("polkit is not there, so only root may switch GPUs")
        if action is not Action.INSPECT:
            raise NotAuthorized(f"only root may {_WORDS[action]}: polkit is not there to ask")


def _or_else(action: Action) -> str:
    return ", or become a member of the group gpuswitch" if action is Action.SWITCH else ""


def _message(member: str, types: Sequence[str], *body: object, wanted: bool = True) -> Message:
    path, interface = _AUTHORITY
    packed = [pack(type_, value) for type_, value in zip(types, body, strict=True)]
    flags = MessageFlag.NONE if wanted else MessageFlag.NO_REPLY_EXPECTED
    return Message(POLKIT, path, interface, member, signature="".join(types), body=packed, flags=flags)
