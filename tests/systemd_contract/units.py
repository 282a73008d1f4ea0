"""The units that the cases are about: as files for a real systemd, as traits for the one in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MENDED = "mended"
"""A file in the manager's runtime folder: with it, `tired.service` can be started."""
STOPPING = "stopping"
"""A FIFO there: somebody writes to it when the stop of `hangs.service`, or `lingers.service`, is under way."""

_FOREVER: Final = "ExecStart=/bin/sleep infinity\n"


@dataclass(frozen=True, slots=True)
class Sample:
    """One unit: the text of its file (`%t` is the runtime folder; "" for a mask), and what is special about it."""

    text: str
    refuses: bool = False
    hangs: bool = False
    fails: bool = False
    tires: bool = False
    after: str = ""
    triggered_by: tuple[str, ...] = ()


_HANGS: Final = Sample(
    f"[Service]\n{_FOREVER}TimeoutStopSec=infinity\nExecStop=/bin/sh -c 'echo >%t/{STOPPING}; exec sleep infinity'\n",
    hangs=True,
)
SAMPLES: Final = {
    "plain.service": Sample(f"[Service]\n{_FOREVER}"),
    "refuses.service": Sample(f"[Unit]\nRefuseManualStop=yes\n[Service]\n{_FOREVER}", refuses=True),
    "masked.service": Sample(""),
    "fails.service": Sample("[Service]\nType=oneshot\nExecStart=/bin/sh -c 'exit 3'\n", fails=True),
    "tired.service": Sample(
        "[Unit]\nStartLimitBurst=1\nStartLimitIntervalSec=1h\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/test -e %t/{MENDED}\n",
        tires=True,
    ),
    "hangs.service": _HANGS,
    "lingers.service": _HANGS,
    "triggered.service": Sample(
        f"[Service]\n{_FOREVER}", triggered_by=("triggered.path", "triggered.socket", "triggered.timer")
    ),
    "triggered.socket": Sample("[Socket]\nListenStream=%t/triggered\n"),
    "triggered.path": Sample("[Path]\nPathExists=%t/never\n"),
    "triggered.timer": Sample("[Timer]\nOnActiveSec=1y\n"),
    "slow.service": Sample(f"[Service]\nType=oneshot\n{_FOREVER}", hangs=True),
    "queued.service": Sample(f"[Unit]\nAfter=slow.service\n[Service]\n{_FOREVER}", after="slow.service"),
}
ALIASES: Final = {"alias.service": "plain.service"}
RUNNING: Final = (
    *("plain.service", "refuses.service", "hangs.service", "lingers.service"),
    *("triggered.socket", "triggered.timer", "triggered.service"),
)
"""Those that are started before a case begins, in this order."""
