"""Who called: what the bus says of a caller, and what /proc shows of its process."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from gpuswitch.api.bus import Bus
from gpuswitch.api.serving import caller
from gpuswitch.aside import aside
from gpuswitch.errors import GpuswitchError
from gpuswitch.model.holders import placed
from gpuswitch.switch.record import Asker

SECONDS = 1.0
"""How long a switch waits until it is known who asked for it: long enough on a machine that is very busy."""


class Callers:
    """Tells callers on this bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def asker(self) -> Asker:
        """Who called the method that is being served, without what cannot be told. Raises LookupError outside of one.

        It has to be asked before the answer is sent: afterwards the caller may be gone.
        """
        name, asker = caller(), Asker()
        with suppress(GpuswitchError, TimeoutError):
            async with asyncio.timeout(SECONDS):
                known = await self._bus.credentials(name)
                asker = Asker(uid=_number(known.get("UnixUserID")), pid=_number(known.get("ProcessID")))
                if asker.pid:
                    unit, command = await aside(partial(_process, asker.pid))
                    asker = replace(asker, unit=unit, command=command)
        return asker


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _process(pid: int) -> tuple[str, str]:
    """The unit and the name of a process; empty where it is gone. /proc/PID/cgroup waits for a lock of the kernel's."""
    texts = []
    for file in ("cgroup", "comm"):
        try:
            texts.append(Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace"))
        except OSError:
            texts.append("")
    unit, _ = placed(texts[0])
    return str(unit or ""), texts[1].rstrip("\n")
