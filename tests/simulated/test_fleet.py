"""The fleet: which GPUs there are, how they are named, and who a function belongs to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuswitch.config import Config, GpuConfig
from gpuswitch.errors import Failed, GpuswitchError, InvalidArgument, NoSuchGpu
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.host.simulated.scenarios import SCENARIOS, boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from tests.simulated.bed import Bed, config

FIRST, SECOND = PciAddress.parse("0000:11:00.0"), PciAddress.parse("0000:21:00.0")
NIC = PciAddress.parse("0000:a2:00.0")


def managed(address: PciAddress, name: str = "", *members: PciAddress) -> GpuConfig:
    return GpuConfig(address, managed=True, name=name, members=members)


async def server(directory: Path, *gpus: GpuConfig) -> Bed:
    return await Bed.made(SCENARIOS["server"](), directory, Config(gpus=gpus))


class TestFind:
    @pytest.mark.parametrize(
        "selector",
        ["0000:01:00.0", "01:00.0", "pci_0000_01_00_0", "PCI_0000_01_00_0", "01:00.1", "01:00.3", "card"],
    )
    async def test_by_every_name(self, selector: str, tmp_path: Path) -> None:
        settings = Config(gpus=(managed(PciAddress.parse("0000:01:00.0"), "card"),))
        bed = await Bed.made(SCENARIOS["laptop"](), tmp_path, settings)
        assert str(bed.fleet.find(selector).gpu.address) == "0000:01:00.0"

    async def test_the_only_one_needs_no_name(self, tmp_path: Path) -> None:
        bed = await Bed.made(SCENARIOS["single"](), tmp_path)
        assert str(bed.fleet.find("").gpu.address) == "0000:01:00.0"

    @pytest.mark.parametrize(
        ("selector", "error", "sentence"),
        [
            ("", InvalidArgument, "this host has 2 GPUs; name one of 0000:00:02.0, 0000:01:00.0 (card)"),
            ("cart", NoSuchGpu, "no GPU is named 'cart'; this host has 0000:00:02.0, 0000:01:00.0 (card)"),
            ("gone", NoSuchGpu, "no GPU is named 'gone'; this host has 0000:00:02.0, 0000:01:00.0 (card)"),
            ("1:0.0", NoSuchGpu, "no GPU is named '1:0.0'; this host has 0000:00:02.0, 0000:01:00.0 (card)"),
            (
                "09:00.0",
                NoSuchGpu,
                "0000:09:00.0 is not a GPU of this host; this host has 0000:00:02.0, 0000:01:00.0 (card)",
            ),
            (
                "02:00.0",
                NoSuchGpu,
                "0000:02:00.0 is not a GPU of this host; this host has 0000:00:02.0, 0000:01:00.0 (card)",
            ),
        ],
    )
    async def test_says_what_would_do(
        self, selector: str, error: type[GpuswitchError], sentence: str, tmp_path: Path
    ) -> None:
        gpus = managed(PciAddress.parse("0000:01:00.0"), "card"), managed(PciAddress.parse("0000:09:00.0"), "gone")
        bed = await Bed.made(SCENARIOS["laptop"](), tmp_path, Config(gpus=gpus))
        with pytest.raises(error) as refusal:
            bed.fleet.find(selector)
        assert str(refusal.value) == sentence

    async def test_on_a_host_without_gpus(self, tmp_path: Path) -> None:
        bed = await Bed.made(boot([]), tmp_path)
        with pytest.raises(NoSuchGpu, match="this host has no GPU"):
            bed.fleet.find("")
        with pytest.raises(NoSuchGpu, match="this host has none"):
            bed.fleet.find("01:00.0")


class TestMembers:
    async def test_a_gpu_that_another_takes_vanishes(self, tmp_path: Path) -> None:
        bed = await server(tmp_path)
        assert len(bed.fleet.actors) == 8
        bed.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND),)))
        assert bed.witness.words[8:10] == ["0000:21:00.0 vanished", "0000:11:00.0 host"]
        assert len(bed.fleet.actors) == 7
        assert bed.fleet.find("21:00.0") is bed.fleet.find("11:00.0")

    async def test_and_who_asked_it_too_late_is_refused(self, tmp_path: Path) -> None:
        bed = await server(tmp_path)
        second, before = bed.fleet.find("21:00.0"), bed.snapshot()
        bed.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND),)))
        for ask in (second.request, second.plan):
            with pytest.raises(Failed, match=r"cannot switch 0000:21:00\.0: its functions belong to another GPU now"):
                await ask(State.VFIO)
        assert (bed.snapshot(), bed.debts) == (before, [])

    async def test_and_comes_back_when_it_is_let_go(self, tmp_path: Path) -> None:
        bed = await server(tmp_path, managed(FIRST, "", SECOND))
        bed.fleet.reconfigure(Config())
        assert bed.witness.words[-9] == "0000:21:00.0 appeared host"
        assert bed.fleet.find("21:00.0").gpu.functions == (SECOND,)
        assert bed.fleet.find("11:00.0").gpu.functions == (FIRST,)

    async def test_move_along(self, tmp_path: Path) -> None:
        bed = await server(tmp_path, managed(FIRST, "both", SECOND, NIC))
        actor = bed.fleet.find("both")
        before = bed.snapshot()
        await bed.moved(actor, State.VFIO)
        assert {bed.machine.devices[a].seen().driver_name for a in (FIRST, SECOND, NIC)} == {"vfio-pci"}
        await bed.moved(actor, State.HOST)
        assert bed.snapshot() == before

    async def test_also_when_the_service_was_restarted_meanwhile(self, tmp_path: Path) -> None:
        """What it set out with comes home, whatever the config says by then."""
        bed = await server(tmp_path, managed(FIRST, "", SECOND, NIC))
        before = bed.snapshot()
        await bed.moved(bed.fleet.find("11:00.0"), State.VFIO)
        bed.fleet.reconfigure(Config())
        again = await bed.again()
        first = again.fleet.find("11:00.0")
        assert first.gpu.functions == tuple(sorted((FIRST, SECOND, NIC)))
        assert SECOND not in again.fleet.actors
        await again.moved(first, State.HOST)
        assert again.snapshot() == before
        await again.witness.until(lambda: SECOND in again.fleet.actors)

    async def test_a_gpu_away_from_home_keeps_its_own_until_it_is_back(self, tmp_path: Path) -> None:
        """Else nobody would remember what the functions had."""
        bed = await server(tmp_path, managed(SECOND, "", NIC))
        second, before = bed.fleet.find("21:00.0"), bed.snapshot()
        await bed.moved(second, State.VFIO)
        bed.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND, NIC),)))
        assert bed.fleet.find("21:00.0") is second
        assert second.gpu.functions == (SECOND, NIC)
        assert bed.fleet.find("11:00.0").gpu.functions == (FIRST,)
        await bed.moved(second, State.HOST)
        assert bed.snapshot() == before
        await bed.witness.until(lambda: SECOND not in bed.fleet.actors)
        assert bed.fleet.find("11:00.0").gpu.functions == (FIRST, SECOND, NIC)

    async def test_a_gpu_under_way_keeps_its_own_too(self, tmp_path: Path) -> None:
        bed = await server(tmp_path, managed(FIRST, "", SECOND))
        first = bed.fleet.find("11:00.0")
        hang = bed.host.faults.add(Hang(), operation="unbind")
        switch = await first.request(State.VFIO)
        await hang.reached.wait()
        bed.fleet.reconfigure(Config())
        assert bed.fleet.find("21:00.0") is first
        hang.release()
        await switch.wait()
        await bed.moved(first, State.HOST)
        await bed.witness.until(lambda: SECOND in bed.fleet.actors)
        assert first.gpu.functions == (FIRST,)


class TestReconfigure:
    async def test_reaches_every_gpu(self, tmp_path: Path) -> None:
        bed = await Bed.made(SCENARIOS["single"](), tmp_path, Config())
        actor = bed.fleet.find("")
        with pytest.raises(GpuswitchError, match="allow_boot_display"):
            await actor.request(State.VFIO)
        bed.fleet.reconfigure(config("single"))
        await bed.moved(actor, State.VFIO)

    async def test_leaves_a_switch_under_way_alone(self, tmp_path: Path) -> None:
        bed = await Bed.of("laptop", tmp_path)
        actor = bed.fleet.find("01:00.0")
        bed.witness.on_step = lambda *_: bed.fleet.reconfigure(Config())
        await bed.moved(actor, State.VFIO)


async def test_hears_nothing_after_stop(tmp_path: Path) -> None:
    bed = await Bed.of("plain", tmp_path)
    await bed.fleet.stop("the service is stopping")
    bed.witness.words.clear()
    await bed.machine.unplug("0000:01:00")
    told = asyncio.Event()
    bed.host.watch(told.set)
    bed.machine.replug("0000:01:00")
    await told.wait()
    assert bed.witness.words == []
