"""A GPU that the service first sees somewhere on its way, or whose drivers somebody else changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import NotViable
from gpuswitch.host.simulated.catalogue import AUDIO, NVIDIA, PCIEPORT, VFIO, VGA, Slot, alias, port
from gpuswitch.host.simulated.devices import Device
from gpuswitch.host.simulated.drivers import Module, PciDriver
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.host.simulated.scenarios import plain
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_MODULE
from gpuswitch.model.states import State
from gpuswitch.switch.record import Result
from tests.harness.simulated.harness import GENTLE, Harness, Settings, config, settings_of, snapshot

GPU = PciAddress.parse("0000:01:00.0")
SOUND = PciAddress.parse("0000:01:00.1")
_DRAWING = PciDriver("bochs-drm", (alias(NVIDIA, 0x03),), makes="drm")
_DRAWING_TOO = PciDriver("simple", (alias(NVIDIA, 0x03),), makes="drm")
_SOUND = Module("snd_hda_intel", (PciDriver("snd_hda_intel", (alias(None, 0x04, 0x03),), makes="sound"),))


def on_vfio(*modules: Module, builtin: PciDriver | None = None) -> SimulatedHost:
    """A machine whose GPU with sound somebody put on vfio-pci at boot, by driver_override."""
    slot = Slot("0000:01:00", 5, "0000:00:01.0")
    card: list[Device] = [slot.function(0, NVIDIA, 0x1111, VGA), slot.function(1, NVIDIA, 0x2222, AUDIO)]
    for device in card:
        device.override = "vfio-pci"
    installed = [Module(VFIO_MODULE, (VFIO,)), _SOUND, *modules]
    built = (PCIEPORT, builtin) if builtin else (PCIEPORT,)
    host = SimulatedHost(Machine([port("0000:00:01.0", 2), *card], installed, loaded=[VFIO_MODULE], builtin=built))
    assert {f.driver_name for f in host.look().group(5)} == {"vfio-pci"}
    return host


def home(machine: Machine, address: PciAddress) -> Settings:
    return settings_of(machine.devices[address])


class TestOnVfio:
    async def test_goes_to_the_only_driver_that_fits(self, tmp_path: Path) -> None:
        harness = await Harness.start(on_vfio(Module("bochs", (_DRAWING,))), tmp_path)
        actor = harness.fleet.find("")
        assert (actor.state, actor.record.host_driver) == (State.VFIO, None)
        await harness.moved(actor, State.HOST)
        assert home(harness.machine, GPU)[:3] == ("bochs-drm", "bochs-drm", None)
        assert home(harness.machine, SOUND)[:3] == ("snd_hda_intel", "snd_hda_intel", None)
        assert actor.record.host_driver == "bochs-drm"

    async def test_goes_to_a_driver_that_is_built_in(self, tmp_path: Path) -> None:
        """The module that a modalias names never shows in the link of a driver that is built in."""
        harness = await Harness.start(on_vfio(Module("bochs", (_DRAWING,)), builtin=_DRAWING), tmp_path)
        await harness.moved(harness.fleet.find(""), State.HOST)
        assert home(harness.machine, GPU).bound == "bochs-drm"

    async def test_of_several_drivers_names_them_all(self, tmp_path: Path) -> None:
        harness = await Harness.start(
            on_vfio(Module("bochs", (_DRAWING,)), Module("simple", (_DRAWING_TOO,))), tmp_path
        )
        before = harness.snapshot()
        with pytest.raises(NotViable, match=r"\(bochs-drm, simple\): say which .* `host_driver = .bochs-drm.`"):
            await harness.fleet.find("").request(State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_where_none_fits_says_so(self, tmp_path: Path) -> None:
        harness = await Harness.start(on_vfio(), tmp_path)
        with pytest.raises(NotViable, match=r"0000:01:00\.0 .* no installed driver fits it"):
            await harness.fleet.find("").request(State.HOST)

    async def test_of_a_companion_only_its_own_driver_can_be_meant(self, tmp_path: Path) -> None:
        other = Module("snd_other", (PciDriver("snd_other", (alias(None, 0x04, 0x03),)),))
        harness = await Harness.start(on_vfio(Module("bochs", (_DRAWING,)), other), tmp_path)
        with pytest.raises(NotViable, match=r"0000:01:00\.1 .*\(snd_hda_intel, snd_other\): bind it to the right one"):
            await harness.fleet.find("").request(State.HOST)

    async def test_goes_to_nvidia_whose_table_another_module_carries(self, tmp_path: Path) -> None:
        harness = await Harness.of("reserved", tmp_path)
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, State.HOST)
        assert home(harness.machine, GPU)[:3] == ("nvidia", "nvidia", None)
        assert harness.pages == []

    @pytest.mark.parametrize("barred", ["", "nvidia_drm", "nvidia_modeset"])
    async def test_shows_a_picture_at_home_where_the_host_lets_it(self, barred: str, tmp_path: Path) -> None:
        """Without nvidia_drm there is no DRM device; who blacklists it, or has not installed it, wants none."""
        harness = await Harness.of("reserved", tmp_path)
        modules = dict(harness.machine.drivers.modules)
        if barred == "nvidia_drm":
            modules[barred] = replace(modules[barred], blacklisted=True)
        elif barred:
            del modules[barred]
        harness.machine.drivers.modules = modules
        actor = harness.fleet.find("01:00.0")
        plan = await actor.plan(State.HOST)
        assert ("load nvidia_drm" in [step.title for step in plan.steps]) is (not barred)
        await harness.moved(actor, State.HOST)
        assert any("/dri/" in node for node in harness.machine.look().functions[GPU].nodes) is (not barred)

    async def test_says_why_where_no_module_can_be_loaded(self, tmp_path: Path) -> None:
        harness = await Harness.of("reserved", tmp_path)
        harness.machine.drivers.modules = {}
        harness.machine.changed(None)
        with pytest.raises(NotViable, match=r"0000:01:00\.0 .* not on disk .*: restart the machine first"):
            await harness.fleet.find("01:00.0").request(State.HOST)

    @pytest.mark.parametrize("name", ["NovaCore", "nova-core"])
    async def test_goes_to_a_driver_whose_name_shows_once_its_module_is_loaded(self, name: str, tmp_path: Path) -> None:
        nova = Module("nova_core", (PciDriver(name, (alias(NVIDIA, 0x03),), makes="drm"),))
        harness = await Harness.start(on_vfio(nova), tmp_path)
        actor = harness.fleet.find("")
        await actor.plan(State.HOST)
        assert harness.machine.drivers.loaded("nova_core") is None
        await harness.moved(actor, State.HOST)
        assert home(harness.machine, GPU)[:3] == (name, name, None)

    @pytest.mark.parametrize(("name", "result"), [("nvidia", Result.DONE), ("something", Result.REVERTED)])
    async def test_goes_to_the_driver_of_a_renamed_file(self, name: str, result: Result, tmp_path: Path) -> None:
        """It loads for a free card only, and finds none where it brings another driver than the card is aimed at."""
        driver = PciDriver(name, (alias(NVIDIA, 0x03),), makes="drm")
        host = on_vfio(Module("nvidia_current", (driver,), needs_device=True))
        harness = await Harness.start(host, tmp_path, config(**GENTLE))
        actor, before = harness.fleet.find(""), harness.snapshot()
        switch = await harness.switch(actor, State.HOST)
        assert switch.result is result
        if result is Result.DONE:
            assert home(harness.machine, GPU)[:3] == ("nvidia", "nvidia", None)
        else:
            assert switch.reason == "cannot load nvidia_current: No such device"
            assert harness.snapshot() == before

    async def test_shows_a_picture_by_a_module_of_a_renamed_file(self, tmp_path: Path) -> None:
        driver = PciDriver("nvidia", (alias(NVIDIA, 0x03),), makes="nvidia")
        own = Module("nvidia_current", (driver,), needs_device=True)
        drm = Module("nvidia_current_drm", requires=(own.name,), aliases=driver.aliases, above="nvidia", makes="drm")
        harness = await Harness.start(on_vfio(own, drm), tmp_path)
        await harness.moved(harness.fleet.find(""), State.HOST)
        assert any("/dri/" in node for node in harness.machine.look().functions[GPU].nodes)

    @pytest.mark.parametrize("name", ["bochs-drm", "simple", "bochs"])
    async def test_goes_to_the_driver_that_the_config_names(self, name: str, tmp_path: Path) -> None:
        modules = Module("bochs", (_DRAWING,)), Module("simple", (_DRAWING_TOO,))
        gpu = GpuConfig(GPU, managed=True, host_driver=name)
        harness = await Harness.start(on_vfio(*modules), tmp_path, Config(gpus=(gpu,)))
        actor = harness.fleet.find("")
        assert actor.record.host_driver == name
        await harness.moved(actor, State.HOST)
        assert home(harness.machine, GPU).bound == ("bochs-drm" if name == "bochs" else name)

    async def test_stays_where_the_configured_driver_does_not_exist(self, tmp_path: Path) -> None:
        gpu = GpuConfig(GPU, managed=True, host_driver="nothing")
        harness = await Harness.start(on_vfio(), tmp_path, Config(gpus=(gpu,)))
        actor, before = harness.fleet.find(""), harness.snapshot()
        for ask in (actor.plan, actor.request):
            with pytest.raises(
                NotViable, match=r"`host_driver` of 0000:01:00\.0 is nothing, .* finds no module for it"
            ):
                await ask(State.HOST)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_comes_back_to_vfio_where_nobody_can_tell_and_it_does_not_exist(self, tmp_path: Path) -> None:
        gpu = GpuConfig(GPU, managed=True, host_driver="nothing")
        harness = await Harness.start(on_vfio(), tmp_path, Config(gpus=(gpu,)))
        actor, before = harness.fleet.find(""), harness.snapshot()
        harness.host.faults.add(Errno(2), operation="loadable", subject="nothing")
        switch = await harness.switch(actor, State.HOST)
        assert (str(switch.result), actor.state) == ("reverted", State.VFIO)
        assert "nothing" in switch.reason
        assert harness.snapshot() == before
        assert actor.record.stays_out == switch.reason

    async def test_a_companion_that_no_driver_fits_gets_none(self, tmp_path: Path) -> None:
        host = on_vfio(Module("bochs", (_DRAWING,)))
        host.machine.drivers.modules = {n: m for n, m in host.machine.drivers.modules.items() if n != "snd_hda_intel"}
        harness = await Harness.start(host, tmp_path)
        await harness.moved(harness.fleet.find(""), State.HOST)
        assert home(harness.machine, SOUND)[:3] == (None, None, None)


class TestHalfWay:
    """Somebody moved single functions by hand."""

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        host = plain()
        kernel = host.kernel("somebody")
        await kernel.load(VFIO_MODULE)
        await kernel.unbind(SOUND, "snd_hda_intel")
        await kernel.set_override({SOUND: "vfio-pci"})
        await kernel.probe(SOUND)
        return await Harness.start(host, tmp_path)

    async def test_is_unknown_and_says_why(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        assert actor.state is State.UNKNOWN
        assert actor.reason.startswith("neither host nor vfio: 0000:01:00.0 is on nvidia, 0000:01:00.1 is on vfio-pci")
        kernel = harness.host.kernel("somebody")
        await kernel.unbind(GPU, "nvidia")
        harness.fleet.look()
        assert actor.state is State.UNKNOWN
        assert actor.reason.startswith("neither host nor vfio: 0000:01:00.0 is on no driver")

    @pytest.mark.parametrize("target", [State.VFIO, State.HOST], ids=str)
    async def test_goes_wherever_it_is_sent(self, target: State, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        await harness.moved(actor, target)
        assert actor.reason == ""
        await harness.moved(actor, State.HOST)
        assert home(harness.machine, SOUND)[:3] == ("snd_hda_intel", "snd_hda_intel", None)


class TestRestoreState:
    """Somebody else brought the functions home: on their drivers, but still with our overrides."""

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        harness = await Harness.of("plain", tmp_path)
        actor = harness.fleet.find("01:00.0")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        kernel = harness.host.kernel("somebody")
        for function, driver in (("0", "nvidia"), ("1", "snd_hda_intel"), ("2", "xhci_hcd"), ("3", "nvidia-gpu")):
            address = PciAddress.parse(f"0000:01:00.{function}")
            await kernel.unbind(address, "vfio-pci")
            await kernel.set_override({address: driver})
            await kernel.load(driver.replace("xhci_hcd", "xhci_pci").replace("nvidia-gpu", "i2c_nvidia_gpu"))
            await kernel.probe(address)
        assert harness.snapshot() != before
        return harness

    async def test_are_paid_at_once(self, harness: Harness) -> None:
        actor = harness.fleet.find("01:00.0")
        harness.fleet.look()
        assert "0000:01:00.0 drifted from vfio to host" in harness.witness.words
        await harness.witness.until(lambda: actor.state is State.HOST and not actor.bound)
        assert harness.pages == []
        assert snapshot(harness.machine) | harness.witness.home == snapshot(harness.machine)

    async def test_are_not_forgotten_when_that_fails(self, harness: Harness) -> None:
        actor, before = harness.fleet.find("01:00.0"), harness.snapshot()
        harness.host.faults.add(Errno(5), operation="set_override")
        harness.fleet.look()
        await harness.witness.until(lambda: bool(actor.switch and actor.switch.result is Result.REVERTED))
        assert (actor.state, harness.snapshot()) == (State.HOST, before)
        assert harness.pages
        await harness.moved(actor, State.HOST)
        assert harness.pages == []

    async def test_are_paid_by_the_next_service(self, harness: Harness) -> None:
        await harness.host.close()
        again = await Harness.start(SimulatedHost(harness.machine), harness.directory)
        assert again.fleet.find("01:00.0").state is State.HOST
        assert again.pages == []
        assert snapshot(harness.machine) | harness.witness.home == snapshot(harness.machine)


async def test_a_function_with_another_host_driver_by_now_is_left_there(tmp_path: Path) -> None:
    harness = await Harness.of("plain", tmp_path)
    actor = harness.fleet.find("01:00.0")
    await harness.moved(actor, State.VFIO)
    kernel = harness.host.kernel("somebody")
    await kernel.load("nouveau")
    await kernel.unbind(GPU, "vfio-pci")
    await kernel.set_override({GPU: "nouveau"})
    await kernel.probe(GPU)
    harness.fleet.look()
    assert actor.state is State.UNKNOWN
    del harness.witness.home[GPU]
    await harness.moved(actor, State.HOST)
    assert home(harness.machine, GPU)[:3] == ("nouveau", "nouveau", None)
    assert home(harness.machine, SOUND)[:3] == ("snd_hda_intel", "snd_hda_intel", None)
    assert harness.pages == []
