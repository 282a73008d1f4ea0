"""What stands on terminals of some widths: the command's own output, of a service with long names and much to tell.

`python -m tests.harness.screens` writes the files anew that `tests/unit/test_cli_screens.py` compares with. Look at
what changed in them: it is what people see.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpuswitch.cli.client import Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.main import main
from tests.harness.service.fixed import CARD, fixed, function, gpu, remedy, switch
from tests.harness.service.terminal import words

FOLDER = Path(__file__).parents[1] / "unit" / "screens"
WIDTHS = (40, 80, 200)
OTHER, THIRD = "0000:41:00.0", "0000:c1:00.0"
WHEN = 1_700_000_000.0

RTX = "NVIDIA Corporation AD102GL [L6 / RTX 6000 Ada Generation] (rev a1, Lenovo ThinkStation P620)"
REASON = (
    "cannot bind 0000:41:00.1 to vfio-pci: Invalid argument\nthe way back failed too: cannot bind 0000:41:00.1 to "
    "snd_hda_intel: Invalid argument\nin the end it is on vfio-pci now"
)
WAITS = (
    "blender (pid 4711, session 2 of alice) has /dev/dri/renderD129, /dev/nvidia0, /dev/nvidiactl and /dev/nvidia-uvm "
    "open; close it, or: kill 4711"
)
GPUS = (
    gpu(
        Address=CARD,
        Name="workstation-left",
        Model=RTX,
        Managed=True,
        Owner=("win11-spiele", "3f2504e0-4f89-41d3-9a0c-0305e82c3301"),
        State="vfio",
        Driver="vfio-pci",
        Functions=[(CARD, "display", "vfio-pci"), ("0000:01:00.1", "audio", "vfio-pci")],
        Adds=["8 virtual functions", "reserved region"],
        Switch=switch(id="5f0c3a1b", started=WHEN, finished=WHEN + 1.25),
    ),
    gpu(
        Address=OTHER,
        Name="right",
        Model="景嘉微电子股份有限公司 JM9271 独立显卡 (工作站版本) 国产图形处理器",
        Vendor="other",
        State="detaching",
        Managed=True,
        Switch=switch(
            id="a0000001",
            index=4,
            count=19,
            title="wait until nobody has it open",
            waiting_for=WAITS,
            waiting_until=WHEN + 300,
            started=WHEN,
            finished=0.0,
            result="",
        ),
    ),
    gpu(
        Address=THIRD,
        State="failed",
        Driver="",
        Reason=f"{REASON}\nand since then: {REASON}",
        StaysOut=True,
        Remedies=[
            remedy(
                "rescan_on_failure",
                "to have it removed from the PCI bus and found again on its way home by {command}, {set}",
                set="add to /etc/gpuswitch/config.toml, by gpuswitchctl config edit: `[[gpu]]`, "
                f'`address = "{THIRD}"`, `rescan_on_failure = true`',
                command=f"gpuswitchctl recover {THIRD}",
            ),
            remedy(
                "reboot",
                "the last way is to restart the machine: {command}; where that is not enough, switch it off for a "
                "minute",
                command="systemctl reboot",
            ),
        ],
    ),
)
HOLDERS = (
    {
        "pid": 4711,
        "command": "blender",
        "uid": 1000,
        "user": "alice",
        "unit": "app-org.blender.Blender-4711.scope",
        "user_unit": True,
        "session": "2",
        "nodes": ["/dev/dri/renderD129", "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"],
        "doubt": "",
        "machine": False,
        "remedy": "systemctl --user --machine=alice@ stop app-org.blender.Blender-4711.scope",
        "goes_by_itself": False,
    },
    {
        "pid": 0,
        "command": "渲染器",
        "uid": 0,
        "user": "",
        "unit": "",
        "user_unit": False,
        "session": "",
        "nodes": [],
        "doubt": "its descriptors cannot be read",
        "machine": False,
        "remedy": "echo 0 > /sys/class/vtconsole/vtcon1/bind",
        "goes_by_itself": False,
    },
    {
        "pid": 912,
        "command": "Xorg",
        "uid": 0,
        "user": "root",
        "unit": "display-manager.service",
        "user_unit": False,
        "session": "",
        "nodes": ["/dev/nvidiactl"],
        "doubt": "",
        "machine": False,
        "remedy": "stop it: systemctl stop display-manager.service",
        "goes_by_itself": True,
    },
)
FUNCTIONS = (
    {**function(CARD, 13, "display", CARD, "vfio-pci"), "model": RTX.partition(" C")[2], "adds": ["reserved region"]},
    {**function("0000:01:00.1", 13, "audio", CARD, "vfio-pci"), "class": 0x040300, "model": "AD102 HD Audio"},
    {**function("0000:00:01.1", 13, "bridge", "", "pcieport"), "class": 0x060400, "maker": "AMD", "model": "桥 GPP"},
    {
        **function(OTHER, 40, "display", OTHER),
        "maker": "景嘉微",
        "model": "JM9271 独立显卡 (工作站版本) 国产图形处理器",
    },
    {**function("0000:42:00.0", 40, "network", "", "r8169"), "class": 0x020000, "maker": "Realtek", "model": "RTL8125"},
)
STEPS = (
    ("load vfio-pci", "done", 0.0, 0.3),
    ("stop nvidia-persistenced.service", "done", 0.3, 0.05),
    ("unbind 0000:41:00.1 from snd_hda_intel", "done", 0.4, 0.1),
    ("bind 0000:41:00.1 to vfio-pci", "failed", 0.5, 0.15),
    ("unbind 0000:41:00.1 from snd_hda_intel", "reverted", 0.65, 0.1),
)
HISTORY = tuple(
    {
        "id": identity,
        "gpu": address,
        "target": target,
        "count": 5,
        "started": WHEN,
        "finished": WHEN + 0.8,
        "result": result,
        "reason": reason,
        "options": {"busy": "wait", "wait_seconds": 300.0, "stop_units": ["display-manager.service"]},
        "asker": {
            "service": False, "uid": 4_000_000_000, "pid": 42, "unit": "session-2.scope", "command": "gpuswitchctl",
            "vm": machine,
        },
        "steps": [
            {
                "plan": 1, "index": n, "kind": "x", "title": title, "status": status, "started": WHEN + begun,
                "seconds": seconds,
            }
            for n, (title, status, begun, seconds) in enumerate(STEPS, 1)
        ],
    }
    for identity, address, target, result, reason, machine in (
        ("5f0c3a1b", CARD, "vfio", "done", "", "win11-spiele"),
        ("a0000001", OTHER, "vfio", "reverted", REASON, ""),
    )
)  # fmt: skip  # the requester on few lines
KILLED: dict[str, Any] = {
    **HISTORY[1],
    "id": "4aed1188",
    "reason": "the service ended at step 3 of 5, 'unbind 0000:41:00.1 from snd_hda_intel'; it is on the host now",
    "steps": [
        {"index": n, "kind": "x", "title": title, "status": status, "started": WHEN + begun, "seconds": seconds}
        | {"before_restart": earlier, "plan": 1 if earlier else 2}
        for n, title, status, begun, seconds, earlier in (
            (1, "load vfio-pci", "done", 0.0, 0.2, True),
            (2, "keep it awake", "done", 0.2, 0.1, True),
            (3, "unbind it", "interrupted", 0.3, 0.0, True),
            (1, "keep it awake", "done", 0.7, 0.1, False),
        )
    ],
}
"""A service was killed in it. Its steps have short titles, so that there is room for bars where others have none."""
CONFIG = (
    {"key": "defaults.busy", "value": '"wait"', "origin": "/etc/gpuswitch/conf.d/50-workstation.toml"},
    {"key": "deadlines.unbind", "value": "600.0", "origin": "default"},
    {
        "key": "gpu[0000:01:00.0].stop_units",
        "value": '["display-manager.service", "nvidia-persistenced.service"]',
        "origin": "/etc/gpuswitch/config.toml",
    },
)
PLAN: list[dict[str, Any]] = [
    {"kind": "x", "title": title, "deadline": 30.0, "stops": [], "starts": [], "ends_programs": False}
    for title in (
        "keep all 4 functions awake",
        "aim the driver override of all 4 functions at vfio-pci",
        "unload nvidia_drm, nvidia_modeset, nvidia_uvm, nvidia",
        "unbind 0000:01:00.1 from snd_hda_intel",
    )
]
REFUSAL = CtlError(
    f"{WAITS}\n0000:42:00.0 (Realtek RTL8125) is in IOMMU group 40 too and stays on r8169: put it into another slot",
    3,
    name="NotViable",
)
SCREENS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("list", {}),
    ("list", {"gpus": (gpu(Name="left", Managed=True),)}),
    ("list", {"gpus": (gpu(Model="NVIDIA Corporation GA104 [GeForce RTX 3070]"),)}),
    ("status", {}),
    ("holders", {}),
    ("holders 41:00.0", {"gpus": GPUS[1:2]}),
    ("groups", {}),
    ("history", {}),
    ("show a0000001", {"history": HISTORY[1:]}),
    ("show 4aed1188", {"history": (KILLED,)}),
    ("config", {"warnings": ["the [[gpu]] table of geforce (0000:09:00.0) is about no GPU: take it out"]}),
    ("plan 01:00.0 vfio", {}),
    ("plan 41:00.0 vfio", {"plan": REFUSAL}),
    ("plan c1:00.0 host", {"gpus": GPUS[2:]}),
    ("to-vfio 41:00.0", {"gpus": GPUS[1:2], "outcomes": {OTHER: switch(result="reverted", reason=REASON)}}),
    ("to-vfio 01:00.0", {"outcomes": {CARD: switch()}}),
)
_KNOWN: Mapping[str, Any] = {
    "functions": FUNCTIONS,
    "holders": HOLDERS,
    "history": HISTORY,
    "config": CONFIG,
    "plan": PLAN,
}


class _Screen(io.StringIO):
    """A terminal on which everything stays."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@contextmanager
def _terminal(columns: int, zone: str) -> Iterator[_Screen]:
    """Both outputs are a terminal as wide as that, without colours; the clock is that zone's."""
    variables = {"TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": "1", "TZ": zone}
    with ExitStack() as stack:
        stack.callback(time.tzset)
        stack.enter_context(patch.dict(os.environ, variables))
        time.tzset()
        screen = _Screen()
        stack.enter_context(redirect_stdout(screen))
        stack.enter_context(redirect_stderr(screen))
        stack.enter_context(patch.object(sys, "stdin", io.StringIO()))
        yield screen


def shown(command: str, columns: int, *, zone: str = "UTC", **knows: Any) -> str:
    """What a command leaves on a terminal of so many columns, in a time zone (tzset(3))."""
    knows = {**_KNOWN, **knows}
    service = fixed(*knows.pop("gpus", GPUS), **knows)
    with _terminal(columns, zone) as screen, patch.object(Service, "connect", lambda _address, _seconds: service):
        main(shlex.split(command))
    return "".join(f"{line.rstrip()}\n" for line in words(screen.getvalue()).splitlines())


def screens(columns: int) -> str:
    """All of them, one below the other."""
    return "\n".join(f"$ gpuswitchctl {command}\n{shown(command, columns, **knows)}" for command, knows in SCREENS)


def file(columns: int) -> Path:
    return FOLDER / f"{columns}.txt"


if __name__ == "__main__":
    for width in WIDTHS:
        file(width).write_text(screens(width))
