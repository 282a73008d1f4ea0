"""GPUs whose driver has NVIDIA's manners: a chain of modules, a persistence daemon, and a remove() that waits."""

from __future__ import annotations

import pytest

from tests.harness.setups import units
from tests.harness.setups.guest import (
    configure,
    ctl,
    drivers,
    prop,
    start_switch,
    state,
    wait_prop,
    wait_state,
    wait_switch,
)
from tests.harness.setups.nvidia import CHAIN, load_nvidia, loaded, nvidia_node, start_persistenced
from tests.harness.setups.programs import hide_descriptor, holders, start_game
from tests.harness.setups.units import main_pid
from tests.harness.virtual_machines.hardware import BARE_GPU, BARE_GPU_AUDIO, SINGLE_GPU, TWIN_GPU
from tests.harness.virtual_machines.machine import Machine

AWAY = ["vfio-pci", "vfio-pci"]


@pytest.mark.smoke
def test_the_last_one_takes_the_modules_with_it_and_brings_them_back(machine: Machine) -> None:
    load_nvidia(machine)
    ctl(machine, f"to-vfio {TWIN_GPU}")
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["nvidia", "vfio-pci"]
    assert loaded(machine) == list(CHAIN)
    said = ctl(machine, f"to-vfio {BARE_GPU}").stdout
    assert f"unload {', '.join(CHAIN)}: done" in said
    assert loaded(machine) == []
    assert drivers(machine, BARE_GPU, BARE_GPU_AUDIO) == AWAY
    ctl(machine, f"to-host {BARE_GPU}")
    assert loaded(machine) == list(CHAIN)
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["nvidia", "vfio-pci"]
    ctl(machine, f"to-host {TWIN_GPU}")
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["nvidia", "nvidia"]


def test_the_sibling_is_untouched_and_has_its_persistenced_back(machine: Machine) -> None:
    load_nvidia(machine)
    before = start_persistenced(machine)
    game = start_game(machine, nvidia_node(machine, TWIN_GPU))
    ctl(machine, f"to-vfio {BARE_GPU}")
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["vfio-pci", "nvidia"]
    after = main_pid(machine, "nvidia-persistenced")
    assert after not in {"0", before}
    assert holders(machine, nvidia_node(machine, TWIN_GPU)) == {game, after}
    ctl(machine, f"to-host {BARE_GPU}")
    anew = main_pid(machine, "nvidia-persistenced")
    assert anew not in {"0", after}
    assert holders(machine, nvidia_node(machine, BARE_GPU)) == {anew}
    assert holders(machine, nvidia_node(machine, TWIN_GPU)) == {game, anew}


def test_the_last_one_has_its_persistenced_back_when_it_comes_home(machine: Machine) -> None:
    load_nvidia(machine)
    ctl(machine, f"to-vfio {TWIN_GPU}")
    start_persistenced(machine)
    ctl(machine, f"to-vfio {BARE_GPU}")
    assert units.active(machine, "nvidia-persistenced") == ["inactive"]
    ctl(machine, f"to-host {BARE_GPU}")
    assert units.active(machine, "nvidia-persistenced") == ["active"]
    assert holders(machine, nvidia_node(machine, BARE_GPU)) == {main_pid(machine, "nvidia-persistenced")}


def test_what_no_look_finds_is_seen_by_the_modules_references(machine: Machine) -> None:
    """A descriptor that is under way in a socket message."""
    load_nvidia(machine)
    ctl(machine, f"to-vfio {TWIN_GPU}")
    hide_descriptor(machine, nvidia_node(machine, BARE_GPU))
    refused = ctl(machine, f"to-vfio {BARE_GPU}", check=False)
    assert refused.status == 3
    assert "nvidia" in refused.stderr
    assert loaded(machine) == list(CHAIN)
    assert drivers(machine, BARE_GPU, BARE_GPU_AUDIO) == ["nvidia", "snd_hda_intel"]


def test_what_neither_shows_is_refused_by_the_unload(machine: Machine) -> None:
    """Its own frame buffer console may have the reference, as far as anybody can tell."""
    load_nvidia(machine, "nvidia_drm fb=1")
    ctl(machine, f"to-vfio {TWIN_GPU}")
    hide_descriptor(machine, nvidia_node(machine, BARE_GPU))
    refused = ctl(machine, f"to-vfio {BARE_GPU}", check=False)
    assert refused.status == 1
    assert "in use" in refused.stderr
    assert loaded(machine) == list(CHAIN)
    assert drivers(machine, BARE_GPU, BARE_GPU_AUDIO) == ["nvidia", "snd_hda_intel"]
    assert state(machine, BARE_GPU) == "host"


def test_one_of_two_cannot_leave_an_older_driver_with_modeset(machine: Machine) -> None:
    load_nvidia(machine, "nvidia_drm modeset=1", version="550.54")
    refused = ctl(machine, f"to-vfio {BARE_GPU}", check=False)
    assert refused.status == 3
    assert "550.54" in refused.stderr
    assert drivers(machine, BARE_GPU, TWIN_GPU) == ["nvidia", "nvidia"]


def test_an_unbind_that_waits_for_what_nobody_sees(machine: Machine) -> None:
    """Wedged within the deadline; found again by a service that starts anew; home by itself when it is let go."""
    load_nvidia(machine)
    configure(machine, "[deadlines]\nunbind = 3\n")
    hidden = hide_descriptor(machine, nvidia_node(machine, BARE_GPU))
    switch = start_switch(machine, BARE_GPU, "ToVfio")
    assert wait_switch(machine, BARE_GPU, switch)["result"] == "wedged"
    reason = prop(machine, BARE_GPU, "Reason")
    assert f"unbind {BARE_GPU} from nvidia" in reason
    assert "state D" in reason
    wait_reason(machine, "sysrq-trigger")
    assert ctl(machine, f"to-host {BARE_GPU}", check=False).status == 7
    assert ctl(machine, "list").stdout.count("wedged") == 1
    # Others are not touched by it.
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    ctl(machine, f"to-host {SINGLE_GPU}")

    units.restart(machine, "gpuswitchd")
    assert units.show(machine, "gpuswitchd", "Result") == "success"
    assert state(machine, BARE_GPU) == "wedged"
    assert f"unbind {BARE_GPU} from nvidia" in prop(machine, BARE_GPU, "Reason")
    assert ctl(machine, f"to-vfio {BARE_GPU}", check=False).status == 7

    machine.sh(f"kill {hidden}")
    wait_state(machine, BARE_GPU, "host")
    assert drivers(machine, BARE_GPU, BARE_GPU_AUDIO, TWIN_GPU) == ["nvidia", "snd_hda_intel", "nvidia"]
    ctl(machine, f"to-vfio {BARE_GPU}")


def test_the_other_gpu_is_not_unloaded_under_a_wedged_one(machine: Machine) -> None:
    """Its driver looks unused by then, and to unload it would wait for ever."""
    load_nvidia(machine)
    configure(machine, "[deadlines]\nunbind = 3\n")
    hide_descriptor(machine, nvidia_node(machine, BARE_GPU))
    assert ctl(machine, f"to-vfio {BARE_GPU}", check=False).status == 7
    ctl(machine, f"to-vfio {TWIN_GPU}")
    assert drivers(machine, TWIN_GPU) == ["vfio-pci"]
    assert "nvidia" in loaded(machine)


def wait_reason(machine: Machine, word: str) -> None:
    """Wait until the report of a wedged GPU is whole: the look for holders comes after the state."""
    wait_prop(machine, BARE_GPU, "Reason", lambda reason: word in reason)
