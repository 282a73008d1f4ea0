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
from tests.harness.simulated.harness import Harness, config

GPU, SOUND = "0000:01:00.0", PciAddress.parse("0000:01:00.1")


async def start_harness(directory: Path, **rules: object) -> tuple[Harness, Actor]:
    harness = await Harness.of("plain", directory, **rules)
    harness.machine.set_autoprobe(on=False)
    return harness, harness.fleet.find(GPU)


async def test_a_gpu_goes_and_comes_back(tmp_path: Path) -> None:
    """Its modules stay: nvidia's would not load again, since it is given no device."""
    harness, actor = await start_harness(tmp_path)
    before = harness.snapshot()
    titles = [step.title for step in (await actor.plan(State.VFIO)).steps]
    assert "unbind 0000:01:00.0 from nvidia" in titles
    assert not any(title.startswith("unload") for title in titles)
    await harness.moved(actor, State.VFIO)
    await harness.moved(actor, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])


@pytest.mark.parametrize("policy", ["auto", "always"])
async def test_an_old_driver_that_would_have_to_be_unloaded_is_a_blocker(tmp_path: Path, policy: str) -> None:
    harness, actor = await start_harness(tmp_path, module_policy=policy)
    for name in ("nvidia", "nvidia_drm"):
        module = harness.machine.drivers.loaded(name)
        assert module is not None
        harness.machine.drivers.register(replace(module, version="570.1"))
    harness.machine.changed(None)
    with pytest.raises(NotViable, match="since /sys/bus/pci/drivers_autoprobe is 0"):
        await actor.request(State.VFIO)


async def test_a_driver_that_would_not_load_keeps_it_on_vfio(tmp_path: Path) -> None:
    harness = await Harness.start(plain(vfio_ids=[(NVIDIA, 0x2484)]), tmp_path, config())
    harness.machine.set_autoprobe(on=False)
    actor = harness.fleet.find(GPU)
    before = harness.snapshot()
    with pytest.raises(
        NotViable, match=r"the module nvidia is given no device, .* echo 1 > /sys/bus/pci/drivers_autoprobe"
    ):
        await actor.request(State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])
    harness.machine.set_autoprobe(on=True)
    await harness.moved(actor, State.HOST)


async def test_a_removal_and_a_rescan_bring_it_home(tmp_path: Path) -> None:
    harness, actor = await start_harness(tmp_path, rescan_on_failure=True)
    before = harness.snapshot()
    harness.host.faults.add(Errno(EIO), operation="probe", subject=SOUND, nth=None)
    harness.witness.on_step = lambda _, event: harness.host.faults.clear() if event.step.kind == "rescan" else None
    switch = await harness.switch(actor, State.VFIO)
    assert (switch.result, actor.state) == (Result.REVERTED, State.HOST)
    assert (harness.snapshot(), harness.pages) == (before, [])
