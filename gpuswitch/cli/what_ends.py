"""What a switch stops and ends, in words, and the question about that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gpuswitch.cli.asking import go_on
from gpuswitch.cli.client import Gpu, Options, Service
from gpuswitch.cli.desktops import Desktop, desktops
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import problem
from gpuswitch.cli.translate import _, mark

_DESKTOPS = frozenset(
    f"{name}.service"
    for name in ("display-manager", "gdm", "gdm3", "greetd", "lightdm", "lxdm", "ly", "plasmalogin", "sddm", "xdm")
)
"""Units that a screen is gone with: display managers, by the names that distributions give them."""
_SESSION = "session "
"""Before the id of one, among what a step stops (`EndSession` in gpuswitch/switch/steps/holders.py)."""

Steps = Sequence[Mapping[str, Any]]
Holders = Sequence[Mapping[str, Any]]


class Ends(NamedTuple):
    """What becomes of sessions, programs and units by the steps of a plan, in words: what is `ended` for good, what is
    `stopped` until the GPU is home, what is `restarted` before the steps are over, and what is `started` again since it
    had been stopped. `of_people`: people work with some of it.
    """

    ended: list[str]
    stopped: list[str]
    restarted: list[str]
    started: list[str]
    of_people: bool

    def and_also(self, more: Ends) -> Ends:
        """Of two GPUs, each once; what stays stopped for one of them is not running again."""
        ended, stopped, restarted, started = (
            list(dict.fromkeys([*ours, *theirs])) for ours, theirs in zip(self[:4], more[:4], strict=True)
        )
        again = [each for each in restarted if each not in stopped]
        return Ends(ended, stopped, again, started, self.of_people or more.of_people)

    def lines(self) -> list[str]:
        """One for each word that there is something to say by."""
        told = (
            (mark("ended: {what}"), self.ended),
            (STOPPED, self.stopped),
            (mark("restarted: {what}"), self.restarted),
            (STARTED, self.started),
        )
        return [_(text, what=", ".join(names)) for text, names in told if names]


NOTHING = Ends([], [], [], [], of_people=False)
STOPPED = mark("stopped until it is home: {what}")
STARTED = mark("started again: {what}")


def what_ends(steps: Steps, holders: Holders, sessions: Sequence[Desktop] = ()) -> Ends:
    """All that becomes of others by these steps; `holders` are those of now, who may be others by then, and `sessions`
    those that people see.
    """
    planned = dict.fromkeys(name for step in steps for name in step["stops"])
    forced = _forced(steps, holders)
    units = list(dict.fromkeys([*(name for name in planned if not _is_session(name)), *_units_of(forced)]))
    # A service that is older does not say what it starts.
    starts = dict.fromkeys(name for step in steps for name in step.get("starts", ()))
    desktop_ends = any(unit in _DESKTOPS for unit in units)
    gone = [name.removeprefix(_SESSION) for name in planned if _is_session(name)]
    if desktop_ends:
        gone += [each.session for each in sessions] + [each["session"] for each in holders if each["session"]]
    programs = [each for each in forced if not _as_unit(each) and each["session"] not in gone]
    if desktop_ends:
        # Their manager ends with the last session of its user.
        programs += [each for each in holders if each["user_unit"] and not each.get("goes_by_itself")]
    ended = [*(_session_words(each, holders, sessions) for each in dict.fromkeys(gone)), *map(_words, programs)]
    return Ends(
        list(dict.fromkeys(ended)),
        [_unit_words(unit, holders) for unit in units if unit not in starts],
        [_unit_words(unit, holders) for unit in units if unit in starts],
        [unit for unit in starts if unit not in units],
        of_people=bool(gone) or desktop_ends or any(each["session"] or each["user_unit"] for each in programs),
    )


def _is_session(name: str) -> bool:
    return name.startswith(_SESSION)


def _forced(steps: Steps, holders: Holders) -> list[Mapping[str, Any]]:
    """Those that have to let go of it by force; who goes with what is stopped, or by itself, has no need of that."""
    if not any(step["ends_programs"] for step in steps):
        return []
    planned = {name for step in steps for name in step["stops"]}
    return [
        each
        for each in holders
        # A service that is older does not say who goes by himself. The kernel is no program.
        if each["pid"]
        and not each.get("goes_by_itself")
        and f"{_SESSION}{each['session']}" not in planned
        and (each["user_unit"] or each["unit"] not in planned)
    ]


def _units_of(forced: Holders) -> list[str]:
    """The services of those, which come back with the GPU as what was stopped before does."""
    return [each["unit"] for each in forced if _as_unit(each)]


def _as_unit(holder: Mapping[str, Any]) -> bool:
    """Whether it is ended by stopping a unit of the system (`stoppable_unit` in gpuswitch/switch/holder_policy.py)."""
    unit = str(holder["unit"])
    return unit.endswith(".service") and not holder["user_unit"] and not unit.startswith("user@")


def _unit_words(unit: str, holders: Holders) -> str:
    """With what of it has the GPU open, where nobody would guess that."""
    theirs = [each for each in holders if each["unit"] == unit and _as_unit(each) and not each.get("goes_by_itself")]
    commands = dict.fromkeys(each["command"] for each in theirs)
    return f"{unit} ({', '.join(commands)})" if commands else unit


def _session_words(session: str, holders: Holders, sessions: Sequence[Desktop]) -> str:
    """Whose it is, where, and what of it has the GPU open."""
    theirs = [each for each in holders if each["session"] == session]
    known = next((each for each in sessions if each.session == session), None)
    user = known.user if known else next((each["user"] for each in theirs), "")
    if known:
        words = _("session {session} of {user} on {seat}", session=session, user=user, seat=known.seat)
    else:
        words = _("session {session} of {user}", session=session, user=user) if user else f"{_SESSION}{session}"
    return f"{words} ({', '.join(dict.fromkeys(each['command'] for each in theirs))})" if theirs else words


def _words(holder: Mapping[str, Any]) -> str:
    command, session, user = holder["command"], holder["session"], holder["user"]
    if session and user:
        return _("{command} in session {session} of {user}", command=command, session=session, user=user)
    if session:
        return _("{command} in session {session}", command=command, session=session)
    if user:
        return _("{command} of {user}", command=command, user=user)
    return f"{command} ({holder['pid']})"


def of_steps(service: Service, gpu: Gpu, steps: Steps) -> Ends:
    """What becomes of others by these steps, as it is now. Holders and sessions are asked for where they end by them.

    Raises:
        CtlError: nobody could tell who has it open.
    """
    planned = {name for step in steps for name in step["stops"]}
    if not any(step["ends_programs"] for step in steps) and not any(map(_of_people, planned)):
        return what_ends(steps, ())
    holders = gpu.holders()
    ends = what_ends(steps, holders)
    return what_ends(steps, holders, desktops(service)) if ends.of_people else ends


def _of_people(name: str) -> bool:
    return name in _DESKTOPS or _is_session(name)


def ask_before_a_desktop_ends(service: Service, gpus: Sequence[Gpu], target: str, options: Options) -> None:
    """Ask whoever sits there, where the switch ends a desktop, a session or a program of somebody's.

    Raises:
        CtlError: they say no.
    """
    if not (told := told_to_end(service, gpus, target, options)):
        return
    problem(told)
    with service.clock_stopped():
        go_on()


def told_to_end(service: Service, gpus: Sequence[Gpu], target: str, options: Options) -> str:
    """What such switches stop and end now, a line each; "" where that is nothing that people work with, and where they
    would be refused anyway.
    """
    ends = NOTHING
    for gpu in gpus:
        with suppress(CtlError):
            ends = ends.and_also(of_steps(service, gpu, gpu.plan(target, options)))
    if not ends.of_people:
        return ""
    text = _(
        "to move {gpus} to {target} ends what runs on this screen:",
        gpus=_(" and ").join(gpu.title for gpu in gpus),
        target=target,
    )
    return "\n".join([text, *ends.lines()])
