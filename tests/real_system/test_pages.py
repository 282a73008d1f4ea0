"""What the documents show of our service beside systemd's own commands, typed in the order of the pages."""

from __future__ import annotations

import itertools

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import ctl, simulated
from tests.harness.pages import Block, all_blocks, unchanging
from tests.real_system.conftest import Boot

SHOWN = [block for block in all_blocks() if block.needs_systemd]


@pytest.mark.parametrize("scenario", sorted({block.scenario for block in SHOWN}))
def test_what_the_pages_show_goes_as_it_is_shown(scenario: str, boot: Boot, system: System) -> None:
    shown = [block for block in SHOWN if block.scenario == scenario]
    [config] = {block.config for block in shown}
    machine = boot(system.installed, {**simulated(scenario=scenario), "/etc/gpuswitch/config.toml": config})
    for _, blocks in itertools.groupby(shown, lambda block: block.page):
        for block in blocks:
            play(block, machine)
        ctl(machine, "to-host 01:00.0")  # whatever the page has left, the next one begins with a GPU at home


def play(block: Block, machine: Container) -> None:
    situation = block.situation
    machine.sh(situation.before, check=False)
    assert f"state: {situation.state}" in ctl(machine, "status 01:00.0").stdout, block
    for number, (command, shown) in enumerate(block.commands):
        said = machine.sh(f"{command}\n", check=False)
        expected = situation.statuses[number] if situation.statuses else 0
        assert said.status == expected, f"{block}: {command}: {said.stdout}{said.stderr}"
        if shown is not None:
            assert unchanging(said.stdout) == unchanging(shown), f"{block}: {command}"
