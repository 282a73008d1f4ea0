"""Kernel operations on a real kernel that no folder can stand in for: consoles, uevents, modules, and their facts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups.guest import hold_open, kill, node_of_sound
from tests.harness.setups.preloaded import Run, Suite
from tests.harness.virtual_machines.hardware import (
    AUDIO_DRIVER,
    BOOT_GPU,
    CROWDED_GPU,
    DISPLAY_DRIVER,
    GPU,
    GPU_AUDIO,
    SINGLE_GPU,
)

PROGRAM = "tests.harness.kernel_program"
MODULE = "bochs"
FRAME_BUFFERS = {"0": BOOT_GPU, "1": GPU, "2": SINGLE_GPU, "3": CROWDED_GPU}
ALL = {str(terminal): 0 for terminal in range(1, 64)}
"""Every terminal is on the display that the machine booted on."""


@pytest.fixture
def harness(suite: Suite) -> Suite:
    """A machine with the program in it, and without the service."""
    return suite


def outcomes(harness: Suite, *calls: list[Any]) -> list[Any]:
    """What came of each call, all of them by one `LinuxKernel`."""
    said = harness.run(PROGRAM, GPU, stdin=json.dumps(calls)).stdout
    return [json.loads(line) for line in said.splitlines()]


def begin(harness: Suite, *calls: list[Any]) -> Run:
    """As `outcomes` does, without waiting."""
    return harness.start(PROGRAM, GPU, stdin=json.dumps(calls))


def test_terminals_are_shown_on_another_gpu_and_back(harness: Suite) -> None:
    """Also one that nobody ever used; one that is there already is left as it is."""
    there, home = ["map_consoles", [1, 40], 2], ["map_consoles", [1, 40], 0]
    before, _, after, _, back = outcomes(harness, ["consoles"], there, ["consoles"], home, ["consoles"])
    assert before == {"frame_buffers": FRAME_BUFFERS, "mapped": ALL, "bound": {"vtcon1": True}}
    assert after == before | {"mapped": ALL | {"1": 2, "40": 2}}
    assert back == before


def test_what_is_no_terminal_or_frame_buffer(harness: Suite) -> None:
    refused = outcomes(harness, ["map_consoles", [64], 1], ["map_consoles", [0], 1], ["map_consoles", [1], 9])
    assert [number for number, _ in refused] == ["EINVAL", "EINVAL", "ENOENT"]


def test_text_leaves_the_frame_buffers_and_comes_back(harness: Suite) -> None:
    """The kernel then maps the terminals in use only, and to a frame buffer of its choice: so they are mapped anew."""
    leave, come = ["bind_console", "vtcon1", {"bound": False}], ["bind_console", "vtcon1", {"bound": True}]
    _, _, gone, refused, _, come_back, _, restored = outcomes(
        harness,
        *(leave, leave, ["consoles"], ["map_consoles", [1], 2]),
        *(come, ["consoles"], ["map_consoles", list(range(1, 64)), 0], ["consoles"]),
    )
    assert gone == {"frame_buffers": FRAME_BUFFERS, "mapped": {}, "bound": {"vtcon1": False}}
    assert refused[0] == "ENODEV"
    assert come_back["bound"] == {"vtcon1": True}
    assert 0 < len(come_back["mapped"]) < len(ALL)
    assert restored == {"frame_buffers": FRAME_BUFFERS, "mapped": ALL, "bound": {"vtcon1": True}}


def test_a_gpu_that_shows_all_text_leaves(harness: Suite) -> None:
    """The kernel shows text nowhere then, though other frame buffers are there; unless one of them shows some already.

    When the GPU comes back it takes over what it had, but not what the kernel had moved by itself.
    """
    terminals = list(range(1, 64))
    leave, come = ["unbind", GPU, DISPLAY_DRIVER], ["probe", GPU]
    _, _, gone, _, back = outcomes(harness, ["map_consoles", terminals, 1], leave, ["consoles"], come, ["consoles"])
    others = {number: gpu for number, gpu in FRAME_BUFFERS.items() if gpu != GPU}
    assert gone == {"frame_buffers": others, "mapped": {}, "bound": {"vtcon1": False}}
    assert back["bound"] == {"vtcon1": True}
    assert set(back["mapped"].values()) == {1}

    _, _, moved, _, back = outcomes(harness, ["map_consoles", [5], 2], leave, ["consoles"], come, ["consoles"])
    assert (moved["bound"], set(moved["mapped"].values())) == ({"vtcon1": True}, {2})
    assert back == moved | {"frame_buffers": FRAME_BUFFERS}


def test_fbcon_does_not_keep_a_drm_driver(harness: Suite) -> None:
    """DRM's frame buffers take no reference for it. A process that has one open does, and nothing is lost then."""
    program = hold_open(harness.machine, "/dev/fb1")
    [[number, text], still] = outcomes(harness, ["unload", MODULE], ["consoles"])
    assert (number, text.endswith("Module bochs is in use")) == ("EAGAIN", True)
    assert still["frame_buffers"] == FRAME_BUFFERS
    kill(harness.machine, program)
    unloaded, nothing, twice, loaded, all_back = outcomes(
        harness, ["unload", MODULE], ["consoles"], ["unload", MODULE], ["load", MODULE], ["consoles"]
    )
    assert (unloaded, twice, loaded) == (None, None, None)
    assert nothing == {"frame_buffers": {}, "mapped": {}, "bound": {}}
    assert all_back == {"frame_buffers": FRAME_BUFFERS, "mapped": ALL, "bound": {"vtcon1": True}}


def test_a_module_that_another_one_needs_stays(harness: Suite) -> None:
    [[number, text]] = outcomes(harness, ["unload", "snd-hda-codec"])
    assert (number, "is in use by:" in text) == ("EAGAIN", True)
    [facts] = outcomes(harness, ["look"])
    assert facts["modules"][AUDIO_DRIVER]["users"] == []


def test_cards_are_announced_to_whoever_follows_udev(harness: Suite) -> None:
    """Though nothing happens to them."""
    harness.machine.sh("setsid udevadm monitor --udev </dev/null >/run/seen 2>&1 &")
    harness.machine.do(words.await_text, "/run/seen", "UDEV")
    cards = [("sound", "remove"), ("sound", "add"), ("drm", "remove"), ("drm", "add")]
    assert outcomes(harness, *(["announce", [GPU, GPU_AUDIO], *card] for card in cards)) == [None] * 4
    # udev's rules give a sound card back on `change`
    told_of = [*cards, ("sound", "change")]
    seen = harness.machine.do(words.await_text, "/run/seen", r"(^UDEV  .*\n[^\0]*){5}")
    # UDEV  [29.35] remove   /devices/pci0000:00/0000:00:05.0/0000:01:00.1/sound/card0 (sound)
    told = [
        (place.split("/")[-3], subsystem, action)
        for _, _, action, place, subsystem in map(str.split, re.findall("^UDEV  .*$", seen, re.MULTILINE))
    ]
    of = {"sound": GPU_AUDIO, "drm": GPU}
    assert sorted(told) == sorted((of[subsystem], f"({subsystem})", action) for subsystem, action in told_of)
    harness.machine.sh(f"test -c {node_of_sound(harness.machine)}")


def test_facts_of_modules(harness: Suite) -> None:
    """No profile names bochs; and no firmware left a frame buffer here."""
    program = hold_open(harness.machine, node_of_sound(harness.machine))
    [facts] = outcomes(harness, ["look"])
    expected = {"references": 1, "users": [], "version": "", "modeset": False, "built_in": False}
    assert facts["modules"][AUDIO_DRIVER] == expected
    assert set(facts["modules"]) <= {AUDIO_DRIVER, "xhci_pci"}
    assert facts["boot_framebuffers"] == []
    harness.machine.sh(f"kill {program}")


def test_an_operation_outlives_the_service_and_is_found_again(harness: Suite) -> None:
    """A program has the sound card open, so its unbind waits; whoever asked for it is killed, the worker stays."""
    holder = hold_open(harness.machine, node_of_sound(harness.machine))
    first = begin(harness, ["begin", "unbind", GPU_AUDIO, AUDIO_DRIVER], ["returned"])
    harness.machine.do(words.await_gone, f"/sys/bus/pci/devices/{GPU_AUDIO}/driver")
    pid = int(harness.machine.sh(f"pgrep -f '[w]orker_main.*{GPU}'").stdout)
    harness.machine.do(words.await_process_state, pid, "D")
    worker = harness.machine.read(f"/proc/{pid}/stat").split()
    harness.machine.sh(f"kill -9 {worker[3]}")
    first.wait(check=False)
    started = int(worker[21])
    calls: list[list[Any]] = [
        ["adopt", pid, started],
        ["pending"],
        ["probe", GPU],
        ["returned"],
        ["pending"],
        ["probe", GPU_AUDIO],
    ]
    second = begin(harness, *calls)
    harness.machine.do(words.await_text, second.output, r"(.*\n){3}")
    harness.machine.sh(f"kill {holder}")
    second.wait()
    adopted, pending, refused, _, nothing, probed = map(json.loads, harness.machine.read(second.output).splitlines())
    assert adopted is True
    assert (pending["pid"], pending["process_state"], pending["kernel_wait"]) == (pid, "D", "snd_card_free")
    assert pending["stack"][:2] == ["snd_card_free", "pci_device_remove"]
    assert pending["worker"] == {"pid": pid, "started": started}
    assert refused[0] == "EBUSY"
    assert (nothing, probed) == (None, None)
    assert harness.machine.sh(f"test -e /proc/{pid}", check=False).status == 1
