"""Who asked for a switch, in words: as `asker` of the service has it (docs/dbus.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpuswitch.cli.translate import _
from gpuswitch.cli.users import user_word

COMMAND = "gpuswitchctl"
"""What most people ask by: where there is no room, nobody misses it."""


def requester_words(requester: Mapping[str, Any], *, whole: bool = False, short: bool = False) -> str:
    """Who asked: `gpuswitchctl of alice`; `whole`: with its number, and the unit that it ran in; `short`: of who asked
    by the command, only their name.
    """
    if requester.get("somebody_else"):
        return _("somebody else")
    if requester.get("trial"):
        return _("the service itself, since a trial was over")
    if requester.get("at_boot"):
        return _("the service itself, at boot")
    if requester["service"]:
        return _("the service itself")
    if short and requester["command"] == COMMAND and "uid" in requester:
        words = [user_word(requester["uid"])]
        return " ".join([*words, _("for {machine}", machine=requester["vm"])] if requester["vm"] else words)
    words = [requester["command"] or _("somebody")]
    if whole and "pid" in requester:
        words.append(f"(pid {requester['pid']})")
    if "uid" in requester:
        words.append(_("of {user}", user=user_word(requester["uid"])))
    if requester["unit"] and whole:
        words.append(_("in {unit}", unit=requester["unit"]))
    if requester["vm"]:
        words.append(_("for {machine}", machine=requester["vm"]))
    return " ".join(words)
