"""What a switch stops and ends is told whole before somebody agrees to it."""

from __future__ import annotations

from typing import Any

import pytest

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.what_ends import Ends, stopped, told_to_end, what_ends
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
KERNEL = holder("kernel", pid=0)
EVERYBODY = [XORG, KWIN, BLENDER, OLLAMA, PERSISTENCED, KERNEL, holder("cuda", user="")]


def step(*stops: str, ends: bool = False) -> dict[str, Any]:
    return {"stops": list(stops), "ends_programs": ends}


WAITS = [step("nvidia-persistenced.service"), step()]
ENDS = [step("nvidia-persistenced.service"), step(ends=True)]


def test_whoever_has_it_open_and_is_ended_is_named_with_what_is_stopped() -> None:
    people = [f"{DESKTOP} (Xorg)", "kwin_x11 in session 2", "blender of alice"]
    others = ["nvidia-persistenced.service", "ollama.service (ollama)", "cuda (1001)"]
    assert what_ends(ENDS, EVERYBODY) == Ends(people, others)
    assert stopped(ENDS, EVERYBODY) == ["nvidia-persistenced.service", DESKTOP, "ollama.service"]


def test_nobody_is_named_who_is_waited_for_or_goes_with_what_is_stopped() -> None:
    assert what_ends(WAITS, EVERYBODY) == Ends([], ["nvidia-persistenced.service"])
    stops = [step(DESKTOP, "session 2", "ollama.service", ends=True)]
    assert what_ends(stops, [XORG, KWIN, OLLAMA]) == Ends([DESKTOP, "session 2"], ["ollama.service"])
    # A person's unit may be called as one of the system.
    theirs = holder("ollama", unit="ollama.service", user_unit=True)
    assert what_ends(stops, [theirs]).of_people == [DESKTOP, "session 2", "ollama of alice"]


def told(*holders: dict[str, Any], plan: list[dict[str, Any]] | CtlError = ENDS) -> list[str]:
    here = FixedGpu(fixed(), gpu(Name="left"), holders, plan)  # type: ignore[arg-type] # it stands for a service
    return told_to_end([here], "vfio", {}).splitlines()


@pytest.mark.parametrize(
    ("who", "named"),
    [(XORG, f"{DESKTOP} (Xorg)"), (KWIN, "kwin_x11 in session 2"), (BLENDER, "blender of alice")],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_people_are_told_all_where_something_of_theirs_ends(who: dict[str, Any], named: str) -> None:
    assert told(who, OLLAMA) == [
        f"to move left (0000:01:00.0) to vfio ends what runs on this screen: {named}",
        "it also stops: nvidia-persistenced.service, ollama.service (ollama)",
    ]


def test_nobody_is_asked_where_nothing_of_a_person_ends() -> None:
    assert told(OLLAMA, KERNEL, PERSISTENCED) == []
    assert told(XORG, KWIN, BLENDER, plan=WAITS) == []
    assert told(XORG, plan=CtlError("refused", 3)) == []
