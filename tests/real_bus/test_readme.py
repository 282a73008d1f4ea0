"""What the README shows is what a new user sees: its sessions are played on a simulated host, and compared."""

from __future__ import annotations

import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from gpuswitch.cli.parser import EXIT_STATUSES, parser
from tests.harness.buses.private import PrivateBus
from tests.harness.service.services import BIN, environment
from tests.real_bus.conftest import Start

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SESSION = re.compile(r"^<!-- on: (\w+) -->\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG = '[metrics]\nport = 0\n[[gpu]]\naddress = "0000:01:00.0"\nname = "rtx3070"\nallow_boot_display = true\n'
COMMAND = re.compile(r"(?:^[#$] |`|^)(gpuswitchctl [^`#|\n]+)", re.MULTILINE)

CHANGING = (
    (re.compile(r"\b[\d.]+ m?s\b"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"), "MOMENT"),
    (re.compile(r"\b[0-9a-f]{8}\b"), "ID"),
)


def unchanging(text: str) -> str:
    for pattern, word in CHANGING:
        text = pattern.sub(word, text)
    return text


def commands(session: str) -> list[tuple[str, str]]:
    """Each command of a session, and what it is shown to say."""
    parts = re.split(r"^[#$] (.*)\n", session, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def said_by(command: list[str], environ: dict[str, str]) -> str:
    """All that it says, in its order."""
    ended = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return ended.stdout


@pytest.mark.parametrize(("scenario", "session"), SESSION.findall(README))
async def test_a_session_goes_as_it_is_shown(
    scenario: str, session: str, start: Start, private_bus: PrivateBus
) -> None:
    await start(scenario, config=CONFIG)
    environ = environment(GPUSWITCH_BUS=private_bus.address, TZ="UTC")
    for command, shown in commands(session):
        program, *arguments = shlex.split(command, comments=True)
        said = said_by([str(BIN / program), *arguments], environ)
        assert unchanging(said) == unchanging(shown), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_page_is_understood(page: Path) -> None:
    """Words in capitals stand for something that the reader knows; a verb alone is only spoken of."""
    for command in COMMAND.findall(page.read_text()):
        words = shlex.split(command, comments=True)[1:]
        if len(words) > 1 and words[0] != "COMMAND" and "..." not in words:
            with suppress(SystemExit):  # it has printed its help
                parser().parse_args(words)


def test_it_has_every_exit_status() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", README, re.MULTILINE)
    assert [(int(status), text.replace("`", "")) for status, text in rows] == list(EXIT_STATUSES)
