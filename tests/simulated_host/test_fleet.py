"""The fleet: which GPUs there are, how they are named, and who a function belongs to."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.config.kinds import checked_table
from gpuswitch.config.schema import Defaults, GpuTable
from gpuswitch.config.settings import Config, GpuConfig, Sought
from gpuswitch.errors import Failed, GpuswitchError, InvalidArgument, NoSuchGpu, NotViable
from gpuswitch.fleet.host_drivers import missing_host_drivers
from gpuswitch.fleet.matching import found
from gpuswitch.host.simulated.catalogue import AUDIO, DISPLAY_3D, NVIDIA, VGA, Slot, port
from gpuswitch.host.simulated.faults import Hang
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import SCENARIOS, boot
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import HostFacts
from gpuswitch.model.match import Match
from gpuswitch.model.policy import Busy
from gpuswitch.model.states import State
from tests.harness.simulated.harness import Harness, config

FIRST, SECOND = PciAddress.parse("0000:11:00.0"), PciAddress.parse("0000:21:00.0")
GEFORCE = PciAddress.parse("0000:01:00.0")
NIC = PciAddress.parse("0000:a2:00.0")
GONE = (
    "the [[gpu]] table of gone (0000:09:00.0) is about no GPU: there is no such function on the PCI bus; give it the "
    "address of one, as gpuswitchctl list shows it, or take it out"
)


def managed(address: PciAddress, name: str = "", *members: PciAddress) -> GpuConfig:
    return GpuConfig(address, managed=True, name=name, members=members)


async def server(directory: Path, *gpus: GpuConfig) -> Harness:
    return await Harness.start(SCENARIOS["server"](), directory, Config(gpus=gpus))


class TestFind:
    @pytest.mark.parametrize(
        "selector",
        ["0000:01:00.0", "01:00.0", "pci_0000_01_00_0", "PCI_0000_01_00_0", "01:00.1", "01:00.3", "card", "CARD"],
    )
    async def test_by_every_name(self, selector: str, tmp_path: Path) -> None:
        settings = Config(gpus=(managed(PciAddress.parse("0000:01:00.0"), "card"),))
        harness = await Harness.start(SCENARIOS["laptop"](), tmp_path, settings)
        assert str(harness.fleet.find(selector).gpu.address) == "0000:01:00.0"

    async def test_the_only_one_needs_no_name(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["single"](), tmp_path)
        assert str(harness.fleet.find("").gpu.address) == "0000:01:00.0"

    async def test_the_only_one_of_the_configuration_needs_none_either(self, tmp_path: Path) -> None:
        settings = Config(gpus=(managed(PciAddress.parse("0000:01:00.0"), "card"),))
        harness = await Harness.start(SCENARIOS["laptop"](), tmp_path / "one", settings)
        assert str(harness.fleet.find("").gpu.address) == "0000:01:00.0"
        harness = await Harness.start(SCENARIOS["laptop"](), tmp_path / "none")
        with pytest.raises(InvalidArgument, match=r"^this host has 2 GPUs; name one of 0000:00:02.0, 0000:01:00.0$"):
            harness.fleet.find("")

    async def test_an_accelerator_is_never_the_only_one(self, tmp_path: Path) -> None:
        """It may be the processor's own, which nobody means: Intel's NPUs are of the same class."""
        harness = await Harness.start(SCENARIOS["instinct"](), tmp_path / "both")
        assert str(harness.fleet.find("").gpu.address) == "0000:c4:00.0"
        lone = await Harness.start(
            boot([d for d in harness.machine.devices.values() if d.address.bus == 5]), tmp_path / "lone"
        )
        with pytest.raises(InvalidArgument, match=r"has 1 GPU; name one of 0000:05:00\.0"):
            lone.fleet.find("")

    @pytest.mark.parametrize(
        ("selector", "error", "sentence"),
        [
            ("cart", NoSuchGpu, "no GPU is named 'cart'; this host has 0000:00:02.0, card (0000:01:00.0)"),
            ("gone", NoSuchGpu, GONE),
            ("1:0.0", NoSuchGpu, "no GPU is named '1:0.0'; this host has 0000:00:02.0, card (0000:01:00.0)"),
            ("09:00.0", NoSuchGpu, GONE),
            (
                "08:00.0",
                NoSuchGpu,
                "0000:08:00.0 is not a GPU of this host; this host has 0000:00:02.0, card (0000:01:00.0)",
            ),
            (
                "02:00.0",
                NoSuchGpu,
                "0000:02:00.0 is not a GPU of this host; this host has 0000:00:02.0, card (0000:01:00.0)",
            ),
        ],
    )
    async def test_says_what_would_do(
        self, selector: str, error: type[GpuswitchError], sentence: str, tmp_path: Path
    ) -> None:
        gpus = managed(PciAddress.parse("0000:01:00.0"), "card"), managed(PciAddress.parse("0000:09:00.0"), "gone")
        harness = await Harness.start(SCENARIOS["laptop"](), tmp_path, Config(gpus=gpus))
        with pytest.raises(error) as refusal:
            harness.fleet.find(selector)
        assert str(refusal.value) == sentence

    async def test_on_a_host_without_gpus(self, tmp_path: Path) -> None:
        harness = await Harness.start(boot([]), tmp_path)
        with pytest.raises(NoSuchGpu, match="this host has no GPU"):
            harness.fleet.find("")
        with pytest.raises(NoSuchGpu, match="this host has none"):
            harness.fleet.find("01:00.0")


@pytest.mark.parametrize(
    ("scenario", "unknown"), [("server", False), ("laptop", False), ("unlit", True), ("cuda", False)]
)
async def test_a_screen_that_nobody_knows_of_is_told_once(
    scenario: str, unknown: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cards of class 0302 have no outputs."""
    if scenario in SCENARIOS:
        host = SCENARIOS[scenario]()
    else:
        host = boot([Slot("0000:01:00", 1).function(0, NVIDIA, 0x20F1, VGA if unknown else DISPLAY_3D)])
    harness = await Harness.start(host, tmp_path)
    harness.fleet.look()
    told = [record.message for record in caplog.records if "which display this machine booted on" in record.message]
    assert len(told) == unknown


class TestMembers:
    async def test_a_gpu_that_another_takes_vanishes(self, tmp_path: Path) -> None:
        harness = await server(tmp_path)
        assert len(harness.fleet.actors) == 8
        harness.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND),)))
        assert harness.witness.words[8:10] == ["0000:21:00.0 vanished", "0000:11:00.0 host"]
        assert len(harness.fleet.actors) == 7
        assert harness.fleet.find("21:00.0") is harness.fleet.find("11:00.0")

    async def test_and_who_asked_it_too_late_is_refused(self, tmp_path: Path) -> None:
        harness = await server(tmp_path)
        second, before = harness.fleet.find("21:00.0"), harness.snapshot()
        harness.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND),)))
        for ask in (second.request, second.plan):
            with pytest.raises(Failed, match=r"cannot switch 0000:21:00\.0: its functions belong to another GPU now"):
                await ask(State.VFIO)
        assert (harness.snapshot(), harness.pages) == (before, [])

    async def test_and_comes_back_when_it_is_let_go(self, tmp_path: Path) -> None:
        harness = await server(tmp_path, managed(FIRST, "", SECOND))
        harness.fleet.reconfigure(Config())
        assert harness.witness.words[-9] == "0000:21:00.0 appeared host"
        assert harness.fleet.find("21:00.0").gpu.functions == (SECOND,)
        assert harness.fleet.find("11:00.0").gpu.functions == (FIRST,)

    async def test_move_along(self, tmp_path: Path) -> None:
        harness = await server(tmp_path, managed(FIRST, "both", SECOND, NIC))
        actor = harness.fleet.find("both")
        before = harness.snapshot()
        await harness.moved(actor, State.VFIO)
        assert {harness.machine.devices[a].seen().driver_name for a in (FIRST, SECOND, NIC)} == {"vfio-pci"}
        await harness.moved(actor, State.HOST)
        assert harness.snapshot() == before

    async def test_also_when_the_service_was_restarted_meanwhile(self, tmp_path: Path) -> None:
        """What it set out with comes home, whatever the config says by then."""
        harness = await server(tmp_path, managed(FIRST, "", SECOND, NIC))
        before = harness.snapshot()
        await harness.moved(harness.fleet.find("11:00.0"), State.VFIO)
        harness.fleet.reconfigure(Config())
        again = await harness.again()
        first = again.fleet.find("11:00.0")
        assert first.gpu.functions == tuple(sorted((FIRST, SECOND, NIC)))
        assert SECOND not in again.fleet.actors
        await again.moved(first, State.HOST)
        assert again.snapshot() == before
        await again.witness.until(lambda: SECOND in again.fleet.actors)

    async def test_a_gpu_away_from_home_keeps_its_own_until_it_is_back(self, tmp_path: Path) -> None:
        """Else nobody would remember what the functions had."""
        harness = await server(tmp_path, managed(SECOND, "", NIC))
        second, before = harness.fleet.find("21:00.0"), harness.snapshot()
        await harness.moved(second, State.VFIO)
        harness.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND, NIC),)))
        assert harness.fleet.find("21:00.0") is second
        assert second.gpu.functions == (SECOND, NIC)
        assert harness.fleet.find("11:00.0").gpu.functions == (FIRST,)
        await harness.moved(second, State.HOST)
        assert harness.snapshot() == before
        await harness.witness.until(lambda: SECOND not in harness.fleet.actors)
        assert harness.fleet.find("11:00.0").gpu.functions == (FIRST, SECOND, NIC)

    async def test_a_gpu_under_way_keeps_its_own_too(self, tmp_path: Path) -> None:
        harness = await server(tmp_path, managed(FIRST, "", SECOND))
        first = harness.fleet.find("11:00.0")
        hang = harness.host.faults.add(Hang(), operation="unbind")
        switch = await first.request(State.VFIO)
        await hang.reached.wait()
        harness.fleet.reconfigure(Config())
        assert harness.fleet.find("21:00.0") is first
        hang.release()
        await switch.wait()
        await harness.moved(first, State.HOST)
        await harness.witness.until(lambda: SECOND in harness.fleet.actors)
        assert first.gpu.functions == (FIRST,)

    async def test_a_switch_right_after_the_way_home_is_of_the_new_members(self, tmp_path: Path) -> None:
        """Whoever comes home is looked at in a while only, and the next switch does not wait for that."""
        harness = await server(tmp_path, managed(FIRST))
        first = harness.fleet.find("11:00.0")
        await harness.moved(first, State.VFIO)
        harness.fleet.reconfigure(Config(gpus=(managed(FIRST, "", SECOND),)))
        await harness.moved(first, State.HOST)
        await harness.moved(first, State.VFIO)
        assert first.gpu.functions == (FIRST, SECOND)
        assert {str(each.driver_name) for each in first.gpu.present(first.record.facts)} == {"vfio-pci"}


async def test_a_fleet_that_has_stopped_looks_at_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even after a switch that was taken back since it stops: the host is closed then."""
    harness = await server(tmp_path, managed(FIRST))
    actor, half_way, looks = harness.fleet.find("11:00.0"), asyncio.Event(), [0]
    harness.witness.on_step = lambda _actor, event: half_way.set() if event.index == 5 else None
    await actor.request(State.VFIO)
    await half_way.wait()
    await harness.fleet.stop("the service stops")
    assert actor.state is State.HOST
    look = harness.machine.look

    def counted(*only: Any) -> HostFacts:
        looks[0] += 1
        return look(*only)

    monkeypatch.setattr(harness.machine, "look", counted)
    # Of the simulated clock, which jumps: whatever was put off comes by then.
    await asyncio.sleep(1)
    assert looks == [0]


class TestConfigurationThatFitsNothing:
    def table(self, address: str, name: str = "", *members: str) -> GpuConfig:
        return managed(PciAddress.parse(address), name, *map(PciAddress.parse, members))

    async def plain(self, directory: Path, *tables: GpuConfig) -> Harness:
        """A GeForce at 0000:01:00, an NVMe disk at 0000:02:00.0."""
        return await Harness.start(SCENARIOS["plain"](), directory, Config(gpus=tables))

    async def test_any_function_of_a_gpu_means_the_gpu(self, tmp_path: Path) -> None:
        harness = await self.plain(tmp_path, self.table("0000:01:00.1", "card"))
        actor = harness.fleet.find("card")
        assert (str(actor.gpu.address), actor.record.own_config.managed) == ("0000:01:00.0", True)
        assert harness.fleet.misfits == ()

    async def test_and_brings_its_members(self, tmp_path: Path) -> None:
        harness = await self.plain(tmp_path, self.table("0000:01:00.3", "card", "0000:02:00.0"))
        assert str(harness.fleet.find("card").gpu.functions[-1]) == "0000:02:00.0"

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            (("0000:02:00.0",), "the storage controller 0000:02:00.0 (Intel Corporation SSD 660P Series), which is"),
            (("0000:09:00.0",), "there is no such function on the PCI bus"),
            (("0000:01:00.0", "card", "0000:09:00.1"), "has the member 0000:09:00.1, and there is no such function"),
        ],
    )
    async def test_is_told_at_start_and_at_reload_and_once_each(
        self, table: tuple[str, ...], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        harness = await self.plain(tmp_path, self.table(*table))
        for _ in range(2):
            harness.fleet.look()
            told = [record.message for record in caplog.records if words in record.message]
            assert told == [misfit.sentence for misfit in harness.fleet.misfits]
            assert len(told) == 1
            caplog.clear()
            harness.fleet.reconfigure(Config(gpus=(self.table(*table),)))

    async def test_of_two_tables_for_one_gpu_its_own_address_holds(self, tmp_path: Path) -> None:
        harness = await self.plain(tmp_path, self.table("0000:01:00.1", "sound"), self.table("0000:01:00.0", "card"))
        assert harness.fleet.find("card").record.config.gpu(PciAddress.parse("0000:01:00.0")).name == "card"
        [misfit] = harness.fleet.misfits
        assert "the [[gpu]] table of sound (0000:01:00.1) counts for nothing" in misfit.sentence

    async def test_a_gpu_that_was_pulled_has_its_table_still(self, tmp_path: Path) -> None:
        harness = await self.plain(tmp_path, self.table("0000:01:00.1", "card", "0000:02:00.0"))
        await harness.machine.unplug("0000:01:00")
        harness.fleet.look()
        assert harness.fleet.misfits == ()
        assert harness.fleet.find("card").state is State.ABSENT

    async def test_a_gpu_that_comes_later_is_managed_then(self, tmp_path: Path) -> None:
        host = SCENARIOS["plain"]()
        await host.machine.unplug("0000:01:00")
        harness = await Harness.start(host, tmp_path, Config(gpus=(self.table("0000:01:00.1", "card"),)))
        assert [misfit.table for misfit in harness.fleet.misfits] == ["0000:01:00.1"]
        harness.replug("0000:01:00")
        harness.fleet.look()
        assert harness.fleet.misfits == ()
        actor = harness.fleet.find("card")
        assert actor.record.own_config.managed

    async def test_a_machine_that_asks_for_it_is_refused(self, tmp_path: Path) -> None:
        harness = await self.plain(tmp_path, self.table("0000:09:00.0", "moved", "0000:02:00.0"))
        for asked in ("0000:09:00.0", "0000:02:00.0"):
            with pytest.raises(NotViable, match=r"table of moved \(0000:09:00\.0\) is about no GPU"):
                harness.fleet.refuse_misfits({PciAddress.parse(asked)})
        harness.fleet.refuse_misfits({PciAddress.parse("0000:01:00.0")})


class TestMatching:
    """Tables that say what their GPU is told by, and not where it is."""

    def table(self, match: Match, name: str = "card", address: str | None = None) -> Config:
        own = checked_table(GpuTable, {"match": match.says(), "address": address, "name": name})
        return Config(sought=(Sought(match, own.address, own, Defaults(busy=Busy.WAIT)),))

    def host(self) -> SimulatedHost:
        """Two equal GeForces, behind the ports 0000:00:11.0 and 0000:00:12.0."""
        cards = []
        for number in (1, 2):
            slot = Slot(f"0000:0{number}:00", 10 + number, f"0000:00:1{number}.0")
            sound = slot.function(1, NVIDIA, 0x228B, AUDIO)
            cards += [port(f"0000:00:1{number}.0", number), slot.function(0, NVIDIA, 0x2484, VGA), sound]
        return boot(cards)

    async def twins(self, directory: Path, config: Config) -> Harness:
        return await Harness.start(self.host(), directory, config)

    async def test_a_gpu_is_found_by_the_port_above_it(self, tmp_path: Path) -> None:
        harness = await self.twins(tmp_path, self.table(Match(vendor="10de", port="0000:00:12.0")))
        record = harness.fleet.find("card").record
        assert (str(record.gpu.address), record.own_config.managed, record.rules.busy) == (
            "0000:02:00.0",
            True,
            Busy.WAIT,
        )
        assert harness.fleet.misfits == ()

    async def test_what_fits_two_is_about_none_and_a_machine_does_not_get_either(self, tmp_path: Path) -> None:
        harness = await self.twins(tmp_path, self.table(Match(vendor="10de", device="2484")))
        [misfit] = harness.fleet.misfits
        assert "card (vendor=10de,device=2484) fits 0000:01:00.0 and 0000:02:00.0" in misfit.sentence
        assert "is about none of them: add slot, port" in misfit.sentence
        assert not any(actor.record.own_config.managed for actor in harness.fleet.actors.values())
        for asked in ("0000:01:00.1", "0000:02:00.0"):
            with pytest.raises(NotViable, match=r"fits 0000:01:00\.0 and 0000:02:00\.0"):
                harness.fleet.refuse_misfits({PciAddress.parse(asked)})
        with pytest.raises(NoSuchGpu, match="is about none of them"):
            harness.fleet.find("card")

    async def test_of_several_the_address_says_which(self, tmp_path: Path) -> None:
        both = self.table(Match(vendor="10de", device="2484"), address="0000:02:00.1")
        harness = await self.twins(tmp_path, both)
        assert str(harness.fleet.find("card").gpu.address) == "0000:02:00.0"
        assert harness.fleet.misfits == ()

    async def test_an_address_that_it_is_not_at_any_more_is_no_matter(self, tmp_path: Path) -> None:
        harness = await self.twins(tmp_path, self.table(Match(port="0000:00:12.0"), address="0000:01:00.0"))
        assert str(harness.fleet.find("card").gpu.address) == "0000:02:00.0"

    @pytest.mark.parametrize(
        ("match", "why"),
        [
            (Match(vendor="1002"), "no GPU of this host is like that"),
            (Match(serial="00-80-ee-00-00-00-41-80"), "the kernel tells no serial number of any GPU"),
            (Match(slot="7"), "there is no 7 in /sys/bus/pci/slots"),
        ],
        ids=str,
    )
    async def test_what_fits_nothing_is_told(self, match: Match, why: str, tmp_path: Path) -> None:
        harness = await self.twins(tmp_path, self.table(match, address="0000:09:00.0"))
        [misfit] = harness.fleet.misfits
        assert f"the [[gpu]] table of card (0000:09:00.0) is about no GPU: {why}" in misfit.sentence
        with pytest.raises(NotViable, match="is about no GPU"):
            harness.fleet.refuse_misfits({PciAddress.parse("0000:09:00.0")})

    async def test_a_gpu_that_comes_later_is_managed_then(self, tmp_path: Path) -> None:
        host = self.host()
        await host.machine.unplug("0000:02:00")
        harness = await Harness.start(host, tmp_path, self.table(Match(port="0000:00:12.0")))
        assert [misfit.name for misfit in harness.fleet.misfits] == ["card"]
        harness.replug("0000:02:00")
        harness.fleet.look()
        assert harness.fleet.misfits == ()
        assert harness.fleet.find("card").record.own_config.managed

    @pytest.mark.parametrize(
        ("number", "asleep", "why"),
        [
            (errno.EACCES, False, "the kernel tells serial numbers to root alone: ask again as root"),
            (
                errno.EIO,
                True,
                "no GPU tells a serial number now; 0000:01:00.0 may have one, and cannot tell it while asleep",
            ),
            (errno.EIO, False, "the kernel tells no serial number of any GPU"),
        ],
    )
    async def test_a_serial_number_that_nobody_tells_now(self, number: int, asleep: bool, why: str) -> None:
        facts = self.host().look()
        card = replace(facts.functions[GEFORCE], serial_errno=number, asleep=asleep)
        facts = replace(facts, functions={**facts.functions, GEFORCE: card})
        _, _, [misfit] = found(self.table(Match(serial="00-80-ee-00-00-00-41-80")), facts)
        assert why in misfit.sentence

    async def test_of_two_tables_for_one_gpu_the_first_is_there_once(self, tmp_path: Path) -> None:
        told = self.table(Match(port="0000:00:11.0"))
        harness = await self.twins(tmp_path, replace(told, gpus=(managed(GEFORCE, "first"),)))
        [misfit] = harness.fleet.misfits
        assert misfit.sentence == (
            "the [[gpu]] table of card (port=0000:00:11.0) counts for nothing: it is about GPU 0000:01:00.0, and that "
            "has the table of first (0000:01:00.0) already; make one of them"
        )
        assert [table.name for table in harness.fleet.config.gpus] == ["first"]

    async def test_a_gpu_that_was_pulled_has_its_table_still(self, tmp_path: Path) -> None:
        harness = await self.twins(tmp_path, self.table(Match(port="0000:00:12.0")))
        await harness.machine.unplug("0000:02:00")
        harness.fleet.look()
        assert harness.fleet.misfits == ()
        assert (harness.fleet.find("card").state, harness.fleet.find("card").record.own_config.managed) == (
            State.ABSENT,
            True,
        )

    async def test_a_second_card_that_comes_takes_nothing_from_the_first(self, tmp_path: Path) -> None:
        host = self.host()
        await host.machine.unplug("0000:02:00")
        harness = await Harness.start(host, tmp_path, self.table(Match(vendor="10de")))
        assert str(harness.fleet.find("card").gpu.address) == "0000:01:00.0"
        harness.replug("0000:02:00")
        harness.fleet.look()
        [misfit] = harness.fleet.misfits
        assert "stays that of 0000:01:00.0 until the service starts anew" in misfit.sentence
        assert str(harness.fleet.find("card").gpu.address) == "0000:01:00.0"
        harness.fleet.refuse_misfits({PciAddress.parse("0000:01:00.0")})

    async def test_a_new_configuration_is_looked_for_anew(self, tmp_path: Path) -> None:
        harness = await self.twins(tmp_path, self.table(Match(port="0000:00:12.0")))
        harness.fleet.reconfigure(self.table(Match(port="0000:00:11.0")))
        assert str(harness.fleet.find("card").gpu.address) == "0000:01:00.0"


class TestWarnings:
    """What is no matter of one GPU, or is none yet."""

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (
                "nvida",
                "no module nvida is installed for this kernel; did you mean nvidia? Correct it, or install the driver",
            ),
            (
                "quite-another",
                "no module quite_another is installed for this kernel; correct it, or install the driver",
            ),
            ("nvidia_drm", "which is a module around the driver nvidia and no driver of the PCI bus: write nvidia"),
        ],
    )
    async def test_a_host_driver_that_nothing_brings_is_told_and_changes_nothing(
        self, name: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        table = GpuConfig(PciAddress.parse("0000:01:00.0"), managed=True, host_driver=name)
        harness = await Harness.start(SCENARIOS["reserved"](), tmp_path, Config(gpus=(table,)))
        [sentence] = harness.fleet.warnings
        assert sentence.startswith(f'the [[gpu]] table of 0000:01:00.0 has host_driver = "{name}", ')
        assert sentence.endswith(words)
        harness.fleet.look()
        assert [record.message for record in caplog.records].count(sentence) == 1
        assert harness.fleet.find("01:00.0").state is State.VFIO

    @pytest.mark.parametrize("name", ["nvidia", "amdgpu", "nouveau"])
    async def test_one_that_is_registered_or_installed_is_none(self, name: str, tmp_path: Path) -> None:
        table = GpuConfig(PciAddress.parse("0000:01:00.0"), managed=True, host_driver=name)
        harness = await Harness.start(SCENARIOS["reserved"](), tmp_path, Config(gpus=(table,)))
        assert harness.fleet.warnings == ()

    async def test_where_no_module_is_on_disk_nobody_can_tell(self) -> None:
        table = GpuConfig(PciAddress.parse("0000:01:00.0"), managed=True, host_driver="quite-another")
        facts = replace(SCENARIOS["reserved"]().look(), modules_on_disk=False)
        assert list(missing_host_drivers(Config(gpus=(table,)), facts, lambda _: False)) == []

    async def test_those_of_the_files_are_told_at_start_and_at_reload(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = Config(warnings=("x is not read",))
        harness = await Harness.start(SCENARIOS["plain"](), tmp_path, config)
        assert harness.fleet.warnings == config.warnings
        harness.fleet.reconfigure(config)
        assert [record.message for record in caplog.records].count("x is not read") == 2
        harness.fleet.reconfigure(Config())
        assert harness.fleet.warnings == ()


class TestReconfigure:
    async def test_reaches_every_gpu(self, tmp_path: Path) -> None:
        harness = await Harness.start(SCENARIOS["single"](), tmp_path, Config())
        actor = harness.fleet.find("")
        with pytest.raises(GpuswitchError, match="allow_boot_display"):
            await actor.request(State.VFIO)
        harness.fleet.reconfigure(config("single"))
        await harness.moved(actor, State.VFIO)

    async def test_leaves_a_switch_under_way_alone(self, tmp_path: Path) -> None:
        harness = await Harness.of("laptop", tmp_path)
        actor = harness.fleet.find("01:00.0")
        harness.witness.on_step = lambda *_: harness.fleet.reconfigure(Config())
        await harness.moved(actor, State.VFIO)


async def test_hears_nothing_after_stop(tmp_path: Path) -> None:
    harness = await Harness.of("plain", tmp_path)
    await harness.fleet.stop("the service is stopping")
    harness.witness.words.clear()
    await harness.machine.unplug("0000:01:00")
    told = asyncio.Event()
    harness.host.watch(told.set)
    harness.machine.replug("0000:01:00")
    await told.wait()
    assert harness.witness.words == []
