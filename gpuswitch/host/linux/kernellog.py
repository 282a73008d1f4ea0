"""What the kernel says, as journald has it: the service has no access to the kernel's own buffer (ProtectKernelLogs=).

journald keeps with each line the device that the kernel names for it (`_KERNEL_DEVICE=+pci:0000:01:00.0`, see
systemd.journal-fields(7) and create_syslog_header in drivers/base/core.c). Lines that drivers write without one name
their module, as in `[drm:bochs_pci_probe [bochs]] *ERROR* ...`, or the device by its address.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

from gpuswitch.host.linux import children
from gpuswitch.host.port import KernelLog
from gpuswitch.model.address import PciAddress

SYNC_SECONDS = 2.0
MOST_LINES = 4
LONGEST = 160
_ADDRESS = re.compile(r"\b[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]\b")
_ENVIRONMENT = {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
_log = logging.getLogger(__name__)


class LinuxKernelLog(KernelLog):
    """By journalctl; `tools` are the folders where that may be."""

    def __init__(self, tools: str) -> None:
        self._tools = tools

    def mark(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    async def said(self, functions: Collection[PciAddress], names: Collection[str], mark: float) -> tuple[str, ...]:
        try:
            journalctl = children.find(self._tools, "journalctl")
            # journald reads the kernel's buffer when it gets to it. Where it cannot be asked to, that has to do.
            with suppress(TimeoutError):
                async with asyncio.timeout(SYNC_SECONDS):
                    await children.run([journalctl, "--sync"], _ENVIRONMENT)
            fields = "--output-fields=MESSAGE,_KERNEL_DEVICE"
            query = ["--boot", f"--since=@{mark:.6f}", "--output=json", fields, "--no-pager", "--quiet", "--all"]
            status, output, errors = await children.run([journalctl, *query, "_TRANSPORT=kernel"], _ENVIRONMENT)
        except OSError as error:
            _log.debug("cannot read the kernel's log: %s", error)
            return ()
        if status:
            _log.debug("cannot read the kernel's log: %s", errors.strip())
        return tuple(dict.fromkeys(_about(output, functions, names)))[-MOST_LINES:]


def _about(output: str, functions: Collection[PciAddress], names: Collection[str]) -> Iterator[str]:
    """The lines of journalctl's output, one object each, that are about these functions, or have one of these names."""
    own = {str(function) for function in functions}
    # The kernel writes both in names, whichever a file has.
    words = "|".join("[-_]".join(map(re.escape, re.split("[-_]", name))) for name in names)
    named = re.compile(rf"\b({words})\b", re.IGNORECASE)
    for line in output.split("\n"):
        try:
            entry = json.loads(line)
            text, device = entry["MESSAGE"], entry.get("_KERNEL_DEVICE", "")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        # What is no text comes as numbers.
        if not isinstance(text, str) or not isinstance(device, str):
            continue
        devices = {*_ADDRESS.findall(text), device.removeprefix("+pci:")} - {""}
        if devices & own or (names and not devices and named.search(text)):
            yield "".join(letter if letter.isprintable() else " " for letter in text).strip()[:LONGEST]
