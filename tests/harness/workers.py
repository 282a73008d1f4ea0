"""What the tests of the worker share: a GPU of two functions in a fake sysfs, and its kernel."""

from __future__ import annotations

from collections.abc import Awaitable

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.model.address import PciAddress
from tests.harness.sysfs_tree import Tree

GPU = PciAddress.parse("0000:01:00.0")
AUDIO = PciAddress.parse("0000:01:00.1")
BOTH = (GPU, AUDIO)


def fill(tree: Tree) -> None:
    """Add them; the attributes that the worker reads and writes are plain files."""
    tree.driver("nvidia", "nvidia")
    tree.driver("snd_hda_intel", "snd_hda_intel")
    (tree.sys / "bus/pci/drivers_probe").touch()
    for address, driver, code in ((GPU, "nvidia", "030000"), (AUDIO, "snd_hda_intel", "040300")):
        tree.function(str(address), driver=driver, class_code=code)
        tree.plain(str(address), "driver_override", "(null)\n")
        tree.plain(str(address), "power/control", "auto\n")


async def refused(call: Awaitable[object]) -> KernelError:
    with pytest.raises(KernelError) as caught:
        await call
    return caught.value
