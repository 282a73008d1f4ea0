"""What a refusal proposes leads there: applied as it stands, what was in the way is not in the way any more."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from signal import SIGTERM

import pytest

from gpuswitch.config.loading import load
from gpuswitch.config.settings import Config
from gpuswitch.errors import GpuswitchError
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.holders import Unit
from gpuswitch.model.states import State
from tests.harness.facts import at
from tests.harness.simulated.harness import Harness

MAY = "[defaults]\nallow_boot_display = true\n"


class Refused:
    """A GPU of a scenario that cannot go to vfio, under a configuration of files."""

    def __init__(self, scenario: str, gpu: str, directory: Path) -> None:
        self.host = SCENARIOS[scenario]()
        self.gpu = gpu
        self._directory = directory
        self._starts = 0

    def configure(self, text: str) -> None:
        """Add this to the file that the remedies name."""
        folder = self._directory / "etc"
        folder.mkdir(mode=0o755, exist_ok=True)
        with (folder / "config.toml").open("a") as file:
            file.write(text)
        (folder / "config.toml").chmod(0o644)

    async def blockers(self) -> list[tuple[str, str]]:
        """Kind and text of each, as a service that starts now has them."""
        self._starts += 1
        # What is wrong with the configuration ends the test here.
        config = load(self._directory / "etc", {}) if (self._directory / "etc").exists() else Config()
        host = SimulatedHost(self.host.machine)
        harness = await Harness.start(host, self._directory / str(self._starts), config)
        try:
            await harness.fleet.find(self.gpu).plan(State.VFIO)
        except GpuswitchError as error:
            return [(str(each["kind"]), str(each["text"])) for each in error.blockers]
        finally:
            await harness.again()
        return []


async def to_the_configuration(refused: Refused, remedy: str) -> None:
    assert "add to /etc/gpuswitch/config.toml, by " in remedy
    refused.configure("\n".join(re.findall(r"`([^`]+)`", remedy)) + "\n")


async def unbind(refused: Refused, remedy: str) -> None:
    found = re.search(r"echo (\S+) > /sys/bus/pci/drivers/(\S+)/unbind", remedy)
    assert found
    await refused.host.kernel("somebody").unbind(at(found[1]), found[2])


async def stop(refused: Refused, remedy: str) -> None:
    found = re.search(r"systemctl stop (\S+)", remedy)
    assert found
    refused.host.machine.units.stop(Unit(found[1]))


async def kill(refused: Refused, remedy: str) -> None:
    found = re.search(r"kill (\d+)", remedy)
    assert found
    [process] = [p.process for p in refused.host.machine.processes.running() if p.process.pid == int(found[1])]
    refused.host.machine.processes.signal(process, SIGTERM)


Apply = Callable[[Refused, str], Awaitable[None]]
WAYS: tuple[tuple[str, str, str, str, Apply], ...] = (
    ("laptop", "00:02.0", "boot_display", "add to ", to_the_configuration),
    ("shared", "01:00.0", "neighbour", "unbind it", unbind),
    ("shared", "01:00.0", "neighbour", "move both", to_the_configuration),
    ("plx", "27:00.0", "neighbour", "move both", to_the_configuration),
    ("hgx", "2a:00.0", "neighbour", "move both", to_the_configuration),
    ("single", "01:00.0", "boot_display", "add to ", to_the_configuration),
    ("single", "01:00.0", "busy", "stop it", stop),
    ("single", "01:00.0", "busy", "kill", kill),
    ("driverless", "01:00.0", "busy", "stop it", stop),
)


@pytest.mark.parametrize(("scenario", "gpu", "kind", "words", "apply"), WAYS, ids=lambda value: str(value)[:12])
async def test_a_remedy_removes_what_is_in_the_way(
    scenario: str, gpu: str, kind: str, words: str, apply: Apply, tmp_path: Path
) -> None:
    refused = Refused(scenario, gpu, tmp_path)
    before = await refused.blockers()
    [(_, text), *_] = [each for each in before if each[0] == kind and words in each[1]]
    # The others stand before it, and after "; or".
    [remedy] = [part for part in text.split("; or ") if words in part]
    await apply(refused, remedy)
    after = await refused.blockers()
    assert (kind, text) not in after
    assert len(after) < len(before)


async def test_nobody_is_told_to_unbind_another_gpu(tmp_path: Path) -> None:
    """Its driver may wait for ever for whoever has it open."""
    [(_, text)] = await Refused("plx", "27:00.0", tmp_path).blockers()
    assert "unbind" not in text
    assert "move both: " in text
