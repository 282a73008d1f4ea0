"""What the documents show is what people type: their commands are run on a simulated host, and compared."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.cli.parser import EXIT_STATUSES, parse
from tests.harness.buses.private import PrivateBus
from tests.harness.pages import PAGES, ROOT, Block, all_blocks, unchanging, with_id
from tests.harness.service.services import ANY_PORT, BIN, environment
from tests.real_bus.conftest import CTL, Start

PLAYED = [block for block in all_blocks() if block.scenario and not block.needs_systemd]
COMMAND = re.compile(r"(?:^[#$] |`|^)(gpuswitchctl [^`#|\n]+)", re.MULTILINE)


def said_by(command: str, environ: dict[str, str]) -> tuple[int, str]:
    """Its exit status, and all that it says, in its order."""
    ended = subprocess.run(
        ["sh", "-c", command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return ended.returncode, ended.stdout


def told(environ: dict[str, str], *arguments: str) -> Any:
    return json.loads(
        subprocess.run([CTL, *arguments, "--json"], env=environ, stdout=subprocess.PIPE, check=True).stdout
    )


def state(environ: dict[str, str]) -> str:
    return str(told(environ, "status", "01:00.0")["gpus"][0]["state"])


def last_switch(environ: dict[str, str]) -> str:
    return next((str(entry["id"]) for entry in told(environ, "history")["switches"]), "")


@pytest.mark.parametrize("block", PLAYED, ids=str)
async def test_what_a_page_shows_goes_as_it_is_shown(block: Block, start: Start, private_bus: PrivateBus) -> None:
    situation = block.situation
    await start(block.scenario, *situation.faults, config=f"{ANY_PORT}{situation.config}{block.config}")
    environ = environment(
        GPUSWITCH_BUS=private_bus.address,
        PATH=f"{BIN}:{os.environ['PATH']}",
        TZ="UTC",
    )
    said_by(situation.before, environ)
    assert state(environ) == situation.state
    for number, (typed, shown) in enumerate(block.commands):
        command = with_id(typed, last_switch(environ)) if block.language == "sh" else typed
        status, said = said_by(command, environ)
        if shown is not None:
            assert unchanging(said) == unchanging(shown), command
        else:
            expected = situation.statuses[number] if situation.statuses else 0
            assert status == expected, f"{command}: {said}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_page_is_understood(page: Path) -> None:
    """Words in capitals stand for something that the reader knows; a verb alone is only spoken of."""
    for command in COMMAND.findall(page.read_text()):
        words = shlex.split(command, comments=True)[1:]
        if len(words) > 1 and words[0] != "COMMAND" and "..." not in words:
            with suppress(SystemExit):  # it has printed its help
                parse(words)


def test_the_readme_has_every_exit_status() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [(int(status), text.replace("`", "")) for status, text in rows] == list(EXIT_STATUSES)
