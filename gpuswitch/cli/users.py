"""Users by their names, where a number is known of them."""

from __future__ import annotations

import pwd
import re
from functools import cache

from gpuswitch.cli.translate import _

_REQUESTER = re.compile(r" \((?:(pid \d+), )?uid (\d+)\)")
"""Behind the name of a program: as the service words who asked (`Requester` in gpuswitch/switch/record.py)."""
_USER = re.compile(r"\buid (\d+)\b(?! \(|:[0-9a-f])")
"""What goes on with a colon is an address."""


def user_word(uid: int) -> str:
    """Their name; `uid 1000` where there is none for it."""
    return _name(uid) or f"uid {uid}"


def with_names(text: str) -> str:
    """What the service says, which looks for no names, with the users' beside the numbers or in their place: as the
    history tells who asked, `gpuswitchctl (pid 42) of alice`; elsewhere `uid 1000 (alice)`.
    """

    def requester(found: re.Match[str]) -> str:
        pid = f" ({found[1]})" if found[1] else ""
        return f"{pid} {_('of {user}', user=user_word(int(found[2])))}"

    def user(found: re.Match[str]) -> str:
        name = _name(int(found[1]))
        return f"{found[0]} ({name})" if name else found[0]

    return _USER.sub(user, _REQUESTER.sub(requester, text))


@cache
def _name(uid: int) -> str:
    """Or "" where there is none, also for a number that is none of a user (OverflowError)."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return ""
