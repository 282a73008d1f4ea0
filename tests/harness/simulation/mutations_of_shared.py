"""Further ones: faults in what several GPUs share (`tests/harness/bridge_power.py`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.shared.settings import SharedSettings
from gpuswitch.switch.steps.attributes import ChangeAttribute, RestoreAttribute
from tests.harness.simulation.mutations import breaks, nothing
from tests.harness.simulation.story import Event, Story

_FIRST_LEAVES, _SECOND_LEAVES = (Event("ask", gpu, "vfio", seconds=50.0) for gpu in (0, 1))
_FIRST_COMES, _SECOND_COMES = (Event("ask", gpu, "host", seconds=50.0) for gpu in (0, 1))
_THE_FIRST_IS_HOME = Story("trio", "refuse", (_FIRST_LEAVES, _SECOND_LEAVES, _FIRST_COMES))
_BOTH_ARE_HOME = Story("trio", "refuse", (_FIRST_LEAVES, _SECOND_LEAVES, _FIRST_COMES, _SECOND_COMES))
_KILLED_WHILE_BOTH_ARE_AWAY = Story(
    "trio", "refuse", (_FIRST_LEAVES, _SECOND_LEAVES, Event("kill", seconds=50.0), _FIRST_COMES)
)


@breaks(3, story=_THE_FIRST_IS_HOME)
def the_first_one_home_gives_back_what_others_need(patch: pytest.MonkeyPatch) -> None:
    async def restore(
        _: object, __: object, ___: object, work: Callable[[], Awaitable[None]], ____: object = None
    ) -> None:
        await work()

    patch.setattr(SharedSettings, "restore", restore)


@breaks(3, story=_KILLED_WHILE_BOTH_ARE_AWAY)
def who_needs_it_is_forgotten_when_the_service_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SharedSettings, "claim", lambda *_: None)


@breaks(3, story=_BOTH_ARE_HOME)
def the_second_one_records_what_the_first_one_changed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SharedSettings, "recorded", lambda *_: None)


@breaks(3, story=_BOTH_ARE_HOME)
def nobody_gives_back_what_is_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RestoreAttribute, "apply", nothing)


@breaks(3, story=Story("trio", "refuse", (Event("fault", 0, "error", 23), _FIRST_LEAVES)))
def what_is_shared_stays_when_a_switch_is_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChangeAttribute, "revert", nothing)


_LATE, _SOON = (Event("ask", gpu, "host") for gpu in (0, 1))
_ONE_BINDS_AS_THE_OTHER_IS_HOME = Story(
    "trio", "refuse", (_FIRST_LEAVES, _SECOND_LEAVES, Event("fault", 0, "delay", 30), _LATE, _SOON)
)


@breaks(1, story=_ONE_BINDS_AS_THE_OTHER_IS_HOME)
def whoever_is_home_waits_for_no_other_that_returns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Arbiter, "arrive", nothing)
