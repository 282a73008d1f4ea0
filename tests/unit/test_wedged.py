"""A wedged GPU in words."""

from __future__ import annotations

import pytest

from gpuswitch.gpu.wedged import first_words, report
from gpuswitch.host.port import Pending
from gpuswitch.model.holders import Holder, Process, Unit
from gpuswitch.switch.engine import StuckError
from tests.harness.facts import at

GPU = at("0000:01:00.0")
FROM_NVIDIA = StuckError(Pending("unbind 0000:01:00.0 from nvidia", 77, "S", "nv_pci_remove"), 20.0)
FROM_SOUND = StuckError(Pending("unbind 0000:01:00.1 from snd_hda_intel", 77, "D", "snd_card_free"), 20.0)
FROM_USB_C = StuckError(Pending("unbind 0000:01:00.3 from nvidia-gpu", 77, "D"), 200.0)
BLENDER = Holder(Process(1234, 5), "blender", 1000, "alice", nodes=("/dev/nvidia0",))
SYSRQ = "only a reboot frees it, and an ordinary one will hang: as root, echo s > /proc/sysrq-trigger, then u, then b"


def test_what_is_known_at_once() -> None:
    assert first_words(GPU, FROM_SOUND) == (
        "the kernel has not returned from 'unbind 0000:01:00.1 from snd_hda_intel' within 20 s (process 77 is in state "
        "D, waiting in snd_card_free)\nnothing more is written to 0000:01:00.0 until it does"
    )


def test_what_an_earlier_run_of_the_service_left() -> None:
    left = StuckError(Pending("unbind 0000:01:00.1 from snd_hda_intel"), None)
    assert str(left) == (
        "the kernel has not returned from 'unbind 0000:01:00.1 from snd_hda_intel' since before the service started"
    )


def test_where_somebody_has_it_open_that_is_told_and_no_reboot() -> None:
    told = report(GPU, FROM_SOUND, [BLENDER], "")
    assert told == (
        f"{first_words(GPU, FROM_SOUND)}\nit recovers by itself once these let go:\n"
        "blender (pid 1234, user alice) has /dev/nvidia0 open; close it, or: kill 1234"
    )


def test_what_was_stopped_for_it_is_told() -> None:
    told = report(GPU, FROM_SOUND, [BLENDER], "", [Unit("sddm.service"), Unit("kwin.service", 1000)])
    assert told.splitlines()[2] == "stopped until then: sddm.service, kwin.service of user 1000"


@pytest.mark.parametrize("holders", [None, ()])
def test_where_nobody_is_seen_a_reboot_is_likely_and_hope_is_left(holders: tuple[Holder, ...] | None) -> None:
    told = report(GPU, FROM_SOUND, holders, "")
    assert told.startswith(f"{first_words(GPU, FROM_SOUND)}\nit recovers by itself should the kernel return\n")
    assert f"most likely {SYSRQ}" in told


@pytest.mark.parametrize(
    ("stuck", "version", "hopeless"),
    [
        (FROM_NVIDIA, "595.45.04", True),
        (FROM_NVIDIA, "610.57.04", True),
        (FROM_NVIDIA, "590.44.01", False),
        (FROM_NVIDIA, "595.36", False),
        (FROM_NVIDIA, "580.105.08", False),
        (FROM_NVIDIA, "", False),
        # the USB-C controller's driver is another one, and so is the sound's
        (FROM_USB_C, "595.45.04", False),
        (FROM_SOUND, "595.45.04", False),
    ],
)
def test_from_which_nvidia_there_is_no_return(stuck: StuckError, version: str, hopeless: bool) -> None:
    told = report(GPU, stuck, [BLENDER], version)
    assert (f"nvidia {version} never returns from this, whoever lets go: {SYSRQ}" in told) is hopeless
    assert ("once these let go" in told) is not hopeless
