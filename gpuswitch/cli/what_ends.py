"""What a switch stops and ends, in words, and the question about that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gpuswitch.cli.asking import go_on
from gpuswitch.cli.client import Gpu, Options, Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import problem
from gpuswitch.cli.translate import _

_DESKTOPS = frozenset(
    f"{name}.service"
    for name in ("display-manager", "gdm", "gdm3", "greetd", "lightdm", "lxdm", "ly", "plasmalogin", "sddm", "xdm")
)
"""Units that a screen is gone with: display managers, by the names that distributions give them."""

Steps = Sequence[Mapping[str, Any]]
Holders = Iterable[Mapping[str, Any]]


class Ends(NamedTuple):
    """What people work with, desktops and sessions and programs of theirs; and which units and programs else."""

    of_people: list[str]
    others: list[str]

    def and_also(self, more: Ends) -> Ends:
        """Of two GPUs, each once."""
        return Ends(*(list(dict.fromkeys([*ours, *theirs])) for ours, theirs in zip(self, more, strict=True)))


def stopped(steps: Steps, holders: Holders) -> list[str]:
    """The units and sessions that these steps stop, by name: those that are planned, and the services of holders that
    are ended, which come back with the GPU as the others do.
    """
    return list(dict.fromkeys([*_planned(steps), *(each["unit"] for each in _ended(steps, holders) if _as_unit(each))]))


def what_ends(steps: Steps, holders: Holders) -> Ends:
    """All that these steps stop or end; `holders` are those of now, who may be others by then."""
    of_people: dict[str, None] = {}
    others: dict[str, None] = {}
    for name in _planned(steps):
        (of_people if name in _DESKTOPS or name.startswith("session ") else others)[name] = None
    for each in _ended(steps, holders):
        theirs = each["session"] or each["user_unit"] or each["unit"] in _DESKTOPS
        (of_people if theirs else others)[_words(each)] = None
    return Ends(list(of_people), list(others))


def _planned(steps: Steps) -> dict[str, None]:
    return dict.fromkeys(name for step in steps for name in step["stops"])


def _ended(steps: Steps, holders: Holders) -> list[Mapping[str, Any]]:
    """Those that have to let go of it by force; who goes with what is stopped, or by itself, has no need of that."""
    if not any(step["ends_programs"] for step in steps):
        return []
    planned = _planned(steps)
    return [
        each
        for each in holders
        # A service that is older does not say who goes by himself. The kernel is no program.
        if each["pid"]
        and not each.get("goes_by_itself")
        and f"session {each['session']}" not in planned
        and (each["user_unit"] or each["unit"] not in planned)
    ]


def _as_unit(holder: Mapping[str, Any]) -> bool:
    """Whether it is ended by stopping a unit of the system (`stoppable_unit` in gpuswitch/switch/holder_policy.py)."""
    unit = str(holder["unit"])
    return unit.endswith(".service") and not holder["user_unit"] and not unit.startswith("user@")


def _words(holder: Mapping[str, Any]) -> str:
    if _as_unit(holder):
        return f"{holder['unit']} ({holder['command']})"
    if holder["session"]:
        return _("{command} in session {session}", command=holder["command"], session=holder["session"])
    if holder["user"]:
        return _("{command} of {user}", command=holder["command"], user=holder["user"])
    return f"{holder['command']} ({holder['pid']})"


def ask_before_a_desktop_ends(service: Service, gpus: Sequence[Gpu], target: str, options: Options) -> None:
    """Ask whoever sits there, where the switch ends a desktop, a session or a program of somebody's.

    Raises:
        CtlError: they say no.
    """
    if not (told := told_to_end(gpus, target, options)):
        return
    problem(told)
    with service.clock_stopped():
        go_on()


def told_to_end(gpus: Sequence[Gpu], target: str, options: Options) -> str:
    """What such switches stop and end now, a line each; "" where that is nothing that people work with, and where they
    would be refused anyway.
    """
    ends = Ends([], [])
    for gpu in gpus:
        ends = ends.and_also(_now(gpu, target, options))
    if not ends.of_people:
        return ""
    text = _(
        "to move {gpus} to {target} ends what runs on this screen: {what}",
        gpus=_(" and ").join(gpu.title for gpu in gpus),
        target=target,
        what=", ".join(ends.of_people),
    )
    more = _("it also stops: {what}", what=", ".join(ends.others)) if ends.others else ""
    return "\n".join(filter(None, [text, more]))


def _now(gpu: Gpu, target: str, options: Options) -> Ends:
    try:
        steps = gpu.plan(target, options)
        return what_ends(steps, gpu.holders() if any(step["ends_programs"] for step in steps) else ())
    except CtlError:
        return Ends([], [])
