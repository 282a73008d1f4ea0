"""Faults put into what is done at boot (see `mutations.py`)."""

from __future__ import annotations

import pytest

from gpuswitch.fleet import at_boot
from gpuswitch.switch.journal.boot import BootNote, BootNotes
from tests.harness.simulation.doubles import WRITTEN
from tests.harness.simulation.mutations import breaks
from tests.harness.simulation.story import Event, Story

_KILLED_MEANWHILE = Event("crash", 0, WRITTEN, 3)


@breaks(5, story=Story("plain", "at boot", (_KILLED_MEANWHILE,)))
def the_next_service_knows_nothing_of_what_was_begun(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BootNotes, "load", lambda _: BootNote())


@breaks(5, story=Story("pair", "at boot", ()))
def what_is_refused_at_boot_is_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(at_boot, "_stays", lambda *_: None)
