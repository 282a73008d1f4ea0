"""What a switch stops and ends is told whole before somebody agrees to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from jeepney import HeaderFields, Message

from gpuswitch.cli.desktops import Desktop, desktops
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.what_ends import NOTHING, Ends, told_to_end, what_ends
from gpuswitch.errors import EXIT_UNREACHABLE
from tests.harness.service.fixed import FixedGpu, fixed, gpu

DESKTOP = "display-manager.service"


def holder(command: str, **more: Any) -> dict[str, Any]:
    return {
        "pid": 1001,
        "command": command,
        "user": "alice",
        "unit": "",
        "user_unit": False,
        "session": "",
        "goes_by_itself": False,
    } | more


XORG = holder("Xorg", user="root", unit=DESKTOP)
KWIN = holder("kwin_x11", unit="session-2.scope", session="2")
BLENDER = holder("blender", unit="app-blender.scope", user_unit=True)
OLLAMA = holder("ollama", user="ollama", unit="ollama.service")
PERSISTENCED = holder("nvidia-persiste", unit="nvidia-persistenced.service", goes_by_itself=True)
PIPEWIRE = holder("pipewire", unit="pipewire.service", user_unit=True, goes_by_itself=True)
OLLAMAS = "ollama.service (ollama)"
KERNEL = holder("kernel", pid=0)
EVERYBODY = [XORG, KWIN, BLENDER, OLLAMA, PERSISTENCED, KERNEL, holder("cuda", user="")]


def step(*stops: str, starts: Sequence[str] = (), ends: bool = False) -> dict[str, Any]:
    return {"stops": list(stops), "starts": list(starts), "ends_programs": ends}


WAITS = [step("nvidia-persistenced.service"), step()]
ENDS = [step("nvidia-persistenced.service"), step(ends=True)]
ALICES = "session 2 of alice (kwin_x11)"


def test_whoever_has_it_open_and_is_ended_is_named_with_what_is_stopped() -> None:
    ends = what_ends(ENDS, EVERYBODY)
    assert ends.ended == [ALICES, "blender of alice", "cuda (1001)"]
    stopped = ["nvidia-persistenced.service", f"{DESKTOP} (Xorg)", "ollama.service (ollama)"]
    assert (ends.stopped, ends.restarted, ends.of_people) == (stopped, [], True)


def test_nobody_is_named_who_is_waited_for_or_goes_with_what_is_stopped() -> None:
    assert what_ends(WAITS, [KWIN, BLENDER, OLLAMA]) == NOTHING._replace(stopped=["nvidia-persistenced.service"])
    stops = [step("session 2", "ollama.service", ends=True)]
    ends = what_ends(stops, [KWIN, OLLAMA])
    assert ends == Ends([ALICES], ["ollama.service (ollama)"], [], [], of_people=True)
    # A person's unit may be called as one of the system.
    theirs = holder("ollama", unit="ollama.service", user_unit=True)
    assert what_ends(stops, [theirs]).ended == ["session 2", "ollama of alice"]


@pytest.mark.parametrize("stops", [[step(DESKTOP)], [step(ends=True)]], ids=["planned", "since it has it open"])
def test_with_a_display_manager_end_the_sessions_behind_it(stops: list[dict[str, Any]]) -> None:
    """Whoever draws there, by whichever GPU; and what lives as long as they do."""
    there = [Desktop("2", "alice", "seat0"), Desktop("5", "bob", "seat1")]
    ends = what_ends(stops, [XORG, KWIN, BLENDER, PIPEWIRE], there)
    assert ends.ended == ["session 2 of alice on seat0 (kwin_x11)", "session 5 of bob on seat1", "blender of alice"]
    assert (ends.stopped, ends.of_people) == ([f"{DESKTOP} (Xorg)"], True)


def test_without_one_a_session_goes_on_whose_program_is_ended() -> None:
    there = [Desktop("2", "alice", "seat0")]
    assert what_ends([step(ends=True)], [KWIN], there).ended == ["kwin_x11 in session 2 of alice"]


def test_each_unit_is_told_by_one_word() -> None:
    steps = [step("a.service", "b.service"), step(starts=["a.service"])]
    assert what_ends(steps, ()).lines() == ["stopped until it is home: b.service", "restarted: a.service"]
    home = [step(starts=["b.service"]), step("a.service", starts=["a.service"])]
    assert what_ends(home, ()).lines() == ["restarted: a.service", "started again: b.service"]
    # Of two GPUs, the one that stays away counts.
    both = what_ends(steps, ()).and_also(what_ends([step("a.service")], ()))
    assert both.lines() == ["stopped until it is home: b.service, a.service"]


def test_a_service_that_is_older_does_not_say_what_it_starts() -> None:
    assert what_ends([{"stops": ["a.service"], "ends_programs": False}], ()).stopped == ["a.service"]


def told(*holders: dict[str, Any], plan: list[dict[str, Any]] | CtlError = ENDS) -> list[str]:
    service = fixed()
    here = FixedGpu(service, gpu(Name="left"), holders, plan)  # type: ignore[arg-type] # it stands for a service
    return told_to_end(service, [here], "vfio", {}).splitlines()


LEAD = "to move left (0000:01:00.0) to vfio ends what runs on this screen:"
PERSISTENCE = "nvidia-persistenced.service"


@pytest.mark.parametrize(
    ("who", "lines"),
    [
        (XORG, [f"stopped until it is home: {PERSISTENCE}, {DESKTOP} (Xorg), ollama.service (ollama)"]),
        (KWIN, ["ended: kwin_x11 in session 2 of alice", f"stopped until it is home: {PERSISTENCE}, {OLLAMAS}"]),
        (BLENDER, ["ended: blender of alice", f"stopped until it is home: {PERSISTENCE}, {OLLAMAS}"]),
    ],
    ids=["Xorg", "kwin", "blender"],
)
def test_people_are_told_all_where_something_of_theirs_ends(who: dict[str, Any], lines: list[str]) -> None:
    assert told(who, OLLAMA) == [LEAD, *lines]


def test_nobody_is_asked_where_nothing_of_a_person_ends() -> None:
    assert told(OLLAMA, KERNEL, PERSISTENCED) == []
    assert told(XORG, KWIN, BLENDER, plan=WAITS) == []
    assert told(XORG, plan=CtlError("refused", 3)) == []


def test_a_logind_that_does_not_answer_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of sessions it had."""
    service, now, asked = fixed(), [1000.0], list[float]()

    def ask(message: Message, seconds: float = 30.0) -> SimpleNamespace:
        asked.append(seconds)
        if message.header.fields[HeaderFields.member] == "ListSessions":
            return SimpleNamespace(body=([(str(number), 1000, "alice", "seat0", f"/{number}") for number in range(9)],))
        now[0] += seconds
        raise CtlError("no answer", EXIT_UNREACHABLE)

    monkeypatch.setattr(service, "ask", ask)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert desktops(service) == []
    assert (len(asked), sum(asked[1:])) == (10, 5.0)
