"""gpuswitchctl on machines whose GPU no host driver has: vfio-pci had it from boot on, or nobody."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.harness.service.services import ANY_PORT
from tests.real_bus.conftest import Ctl, Start

CARD = "0000:01:00.0"
CONFIG = f'{ANY_PORT}[[gpu]]\naddress = "{CARD}"\nname = "geforce"\n'


def status(ctl: Ctl) -> Any:
    [record] = json.loads(ctl("status", "geforce", "--json").stdout)["gpus"]
    return record


async def test_a_card_that_vfio_pci_had_from_boot_on_comes_home(start: Start, ctl: Ctl) -> None:
    await start("reserved", config=CONFIG)
    planned = ctl("plan", "geforce", "host")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert re.search(rf"bind {CARD} to nvidia \(", planned.stdout)
    assert "load nvidia_drm (" in planned.stdout
    home = ctl("to-host", "geforce")
    assert (home.returncode, home.stderr) == (0, "")
    assert [each["driver"] for each in status(ctl)["functions"]] == [
        "nvidia",
        "snd_hda_intel",
        "xhci_hcd",
        "nvidia-gpu",
    ]


async def test_a_gpu_on_vfio_is_not_ready_while_the_host_uses_its_group(start: Start, ctl: Ctl) -> None:
    await start("reserved", config=CONFIG)
    for arguments in (("plan", "geforce", "vfio"), ("to-vfio", "geforce")):
        refused = ctl(*arguments)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "is in IOMMU group 1 too and stays on r8169" in refused.stderr
    assert status(ctl)["state"] == "vfio"


async def test_a_gpu_without_driver_is_in_use_all_the_same(start: Start, ctl: Ctl) -> None:
    """X draws on what the firmware left."""
    await start("driverless", config=CONFIG)
    assert "/dev/fb0" in ctl("holders", "geforce").stdout
    for arguments in (("plan", "geforce", "vfio"), ("to-vfio", "geforce")):
        refused = ctl(*arguments)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert re.search(r"Xorg .* has /dev/fb0 open", refused.stderr)
    planned = ctl("plan", "geforce", "vfio", "--stop-unit", "display-manager.service")
    assert "unbind efi-framebuffer.0 from efi-framebuffer (" in planned.stdout


async def test_a_module_that_is_no_driver_is_refused_as_one(start: Start, ctl: Ctl) -> None:
    await start("reserved", config=f'{CONFIG}host_driver = "nvidia_drm"\n')
    for arguments in (("plan", "geforce", "host"), ("to-host", "geforce")):
        refused = ctl(*arguments)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert (
            'around the driver nvidia and no driver of the PCI bus: set `host_driver = "nvidia"` in' in refused.stderr
        )
    assert status(ctl)["state"] == "vfio"


async def test_a_driver_that_is_not_there_is_refused_before_anything_is_touched(start: Start, ctl: Ctl) -> None:
    await start("reserved", config=f'{CONFIG}host_driver = "nvidai"\n')
    for arguments in (("plan", "geforce", "host"), ("to-host", "geforce")):
        refused = ctl(*arguments)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "nvidai, which is not there and cannot be loaded: modprobe finds no module for it" in refused.stderr
    assert status(ctl)["state"] == "vfio"
