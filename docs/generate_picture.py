"""Write docs/switch.svg, a switch as a terminal shows it: `python -m docs.generate_picture [FILE]`.

The service's own fleet moves the GPU of a simulated host, and the command's own display draws the steps. The clock
jumps from timer to timer, so each step takes as long as the simulated kernel was told, and the picture is the same each
time.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gpuswitch.cli.client import Gpu
from gpuswitch.cli.follow import StepChange
from gpuswitch.cli.output import duration
from gpuswitch.cli.terminal import StepsInPlace
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faultspec import inject
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.engine import StepEvent
from tests.harness.simulated.clock import VirtualClockLoop
from tests.harness.simulated.harness import Harness, config

ADDRESS, NAME = "0000:01:00.0", "rtx3070"
PACE = ("load=0.3s", "unload=0.12s", "unbind=0.1s", "probe=0.05s", "keep_awake=0.02s", "set_override=0.01s")
"""How long the operations of the simulated kernel take: about as long as those of a real one."""
COLUMNS = 80
MOTION = re.compile(r"\r|\n|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[hl]")
FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>gpuswitchctl to-vfio, step by step</title>
<!-- Made by docs/generate_picture.py; run `make docs`. -->
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""As rich has it, without fonts that a reader would have to fetch from somewhere."""


class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def left(self) -> list[str]:
        """The lines that stand there at the end, with their colours: what was redrawn in place is gone."""
        lines, row, text = [""], 0, self.getvalue()
        for word in re.split(f"({MOTION.pattern})", text):
            if word == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif word.endswith("A") and MOTION.fullmatch(word):
                row -= int(word[2:-1] or 1)
            elif word == "\x1b[2K":
                lines[row] = ""
            elif not MOTION.fullmatch(word):
                lines[row] += word
        return [line for line in lines if line]


async def steps() -> list[StepChange]:
    """All that is told of the steps of a switch to vfio."""
    host = SCENARIOS["plain"]()
    for fault in PACE:
        inject(host, fault)
    told: list[StepChange] = []

    def stepped(_: Actor, event: StepEvent) -> None:
        step = event.step
        told.append(StepChange(event.index, event.count, step.kind, step.title, str(event.status), event.seconds))

    with TemporaryDirectory() as folder:
        harness = await Harness.start(host, Path(folder), config())
        harness.witness.on_step = stepped
        await harness.moved(harness.fleet.actors[PciAddress.parse(ADDRESS)], State.VFIO)
    return told


def drawn(changes: list[StepChange]) -> list[str]:
    """The lines that the command leaves on a terminal."""
    screen = Screen()
    variables = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LC_ALL": "C.UTF-8"}
    gpu = cast("Gpu", SimpleNamespace(title=f"{NAME} ({ADDRESS})"))
    # No thread draws in between: what it draws would be another thing each time.
    still = patch("gpuswitch.cli.terminal.Live", partial(Live, auto_refresh=False))
    with patch.dict(os.environ, variables, clear=True), redirect_stdout(screen), still, StepsInPlace() as display:
        for change in changes:
            display.step(gpu, "", change)
    return screen.left()


def picture() -> str:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        changes = runner.run(steps())
    took = duration(sum(change.seconds for change in changes))
    console = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, color_system="truecolor")
    said = f"{NAME} ({ADDRESS}) is on vfio-pci now, after {took}"
    for line in (f"# gpuswitchctl to-vfio {NAME}", *drawn(changes), said):
        console.print(Text.from_ansi(line))
    return console.export_svg(title="gpuswitchctl", code_format=FORMAT, unique_id="switch")


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("switch.svg")
    file.write_text(picture())
