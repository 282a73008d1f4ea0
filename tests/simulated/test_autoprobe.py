"""Machines whose PCI bus binds nothing by itself: `drivers_autoprobe` is 0."""

from __future__ import annotations

from dataclasses import replace
from errno import EIO
from pathlib import Path

import pytest

from gpuswitch.errors import NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.catalogue import NVIDIA
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.scenarios import plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from tests.simulated.bed import Bed, config

GPU, SOUND = "0000:01:00.0", PciAddress.parse("0000:01:00.1")


async def made(directory: Path, **rules: object) -> tuple[Bed, Actor]:
    bed = await Bed.of("plain", directory, **rules)
    bed.machine.set_autoprobe(on=False)
    return bed, bed.fleet.find(GPU)


async def test_a_gpu_goes_and_comes_back(tmp_path: Path) -> None:
    """Its modules stay: nvidia's would not load again, since it is given no device."""
    bed, actor = await made(tmp_path)
    before = bed.snapshot()
    titles = [step.title for step in (await actor.plan(State.VFIO)).steps]
    assert "unbind 0000:01:00.0 from nvidia" in titles
    assert not any(title.startswith("unload") for title in titles)
    await bed.moved(actor, State.VFIO)
    await bed.moved(actor, State.HOST)
    assert (bed.snapshot(), bed.pages) == (before, [])


@pytest.mark.parametrize("policy", ["auto", "always"])
async def test_an_old_driver_that_would_have_to_be_unloaded_is_a_blocker(tmp_path: Path, policy: str) -> None:
    bed, actor = await made(tmp_path, module_policy=policy)
    for name in ("nvidia", "nvidia_drm"):
        module = bed.machine.drivers.loaded(name)
        assert module is not None
        bed.machine.drivers.register(replace(module, version="570.1"))
    bed.machine.changed(None)
    with pytest.raises(NotViable, match="since /sys/bus/pci/drivers_autoprobe is 0"):
        await actor.request(State.VFIO)


async def test_a_driver_that_would_not_load_keeps_it_on_vfio(tmp_path: Path) -> None:
    bed = await Bed.made(plain(vfio_ids=[(NVIDIA, 0x2484)]), tmp_path, config())
    bed.machine.set_autoprobe(on=False)
    actor = bed.fleet.find(GPU)
    before = bed.snapshot()
    with pytest.raises(NotViable, match=r"the module nvidia is given no device, .* write 1 to it first"):
        await actor.request(State.HOST)
    assert (bed.snapshot(), bed.pages) == (before, [])
    bed.machine.set_autoprobe(on=True)
    await bed.moved(actor, State.HOST)


async def test_a_removal_and_a_rescan_bring_it_home(tmp_path: Path) -> None:
    bed, actor = await made(tmp_path, rescan_on_failure=True)
    before = bed.snapshot()
    bed.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
    bed.witness.on_step = lambda _, event: bed.host.faults.clear() if event.step.kind == "rescan" else None
    switch = await bed.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (bed.snapshot(), bed.pages) == (before, [])
