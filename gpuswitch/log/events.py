"""The events that the log tells, each with the id that journald's catalog explains it by (`journalctl -x`).

units/gpuswitch.catalog is made of this table. An id is for ever: whoever watches for one, watches for its meaning.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuswitch.sentence import template


class LogEvent(NamedTuple):
    """One event. In `subject` and `text`, `@FIELD@` is what that field of the line says (systemd.catalog(7))."""

    message_id: str
    subject: str
    text: str


STATE = LogEvent(
    "7d6a1c0c1d2f4b6f9a5e3a0c6f1e8b21",
    template("GPU @GPU@ is in state @STATE@"),
    template(
        "The service has looked at the GPU, or has moved it. The line says why, where that is not where somebody "
        "wanted it. What the states mean: gpuswitchctl help states. How it is now: gpuswitchctl status @GPU@"
    ),
)
SWITCH_DONE = LogEvent(
    "0b7f6f2f7c3d4a1f8f0d5a9c2e4b7d12",
    template("GPU @GPU@ is where it was to go: @TARGET@"),
    template("Switch @SWITCH_ID@ is done. Its steps, and how long each took: gpuswitchctl show @SWITCH_ID@"),
)
SWITCH_REVERTED = LogEvent(
    "c5e1a94be0a2447b9d7a4f6b1d3c8e53",
    template("The switch of GPU @GPU@ to @TARGET@ did not work, and was taken back"),
    template(
        "A step of switch @SWITCH_ID@ failed. All that was changed before is as it was. The line says what went wrong "
        "and, where there is one, what to do. Its steps, and what the kernel said: gpuswitchctl show @SWITCH_ID@"
    ),
)
SWITCH_FAILED = LogEvent(
    "2f98d3c7a6b84e0c8c1b7e5d9f0a6364",
    template("The switch of GPU @GPU@ to @TARGET@ failed, and could not be taken back as a whole"),
    template(
        "A step of switch @SWITCH_ID@ failed, and so did the way back, or the GPU ended elsewhere than was asked for. "
        "Where it is: gpuswitchctl status @GPU@. What the kernel said: gpuswitchctl show @SWITCH_ID@. Where it is "
        "failed, put right what is named there, then: gpuswitchctl recover @GPU@"
    ),
)
SWITCH_CANCELLED = LogEvent(
    "94d04f0e5b674c2eb3a8d1f7c6025e75",
    template("The switch of GPU @GPU@ to @TARGET@ was cancelled"),
    template("Somebody cancelled switch @SWITCH_ID@, or the service was stopped. What it had done was taken back."),
)
SWITCH_WEDGED = LogEvent(
    "e8a2c64d1b3f45d79b6c0f2e7d519a86",
    template("The switch of GPU @GPU@ to @TARGET@ waits for the kernel"),
    template(
        "The kernel has not returned from an operation of switch @SWITCH_ID@. Nothing more is written to this GPU. "
        "When the kernel returns after all, what was begun is taken back."
    ),
)
WEDGED = LogEvent(
    "5a1e7b90c4d24f83a6f92b8d0c7e3197",
    template("The kernel does not return from an operation on GPU @GPU@"),
    template(
        "The kernel has taken longer than the deadline of the step. The GPU is wedged: nothing more is written to it, "
        "all others go on. Who could make the kernel return, and how to reboot if nobody can: "
        "gpuswitchctl status @GPU@"
    ),
)
DRIFT = LogEvent(
    "b36f0d82e95a4c17a4d3c2b1f8e607a8",
    template("Somebody else moved GPU @GPU@"),
    template(
        "A look showed the GPU in another state, and no switch of gpuswitch was under way: a script, a driver that was "
        "loaded or unloaded, or a hand on sysfs. gpuswitch believes the kernel, and takes it as it is now: @STATE@"
    ),
)
RECOVERED = LogEvent(
    "16c9e5a7f2d84b3d8e7f1a0b4c5d62b9",
    template("The recovery of GPU @GPU@ is over"),
    template("After a failure or a crash, the GPU is in state @STATE@. More: gpuswitchctl status @GPU@"),
)
STALLED = LogEvent(
    "d4b8e1f3607a4952b1c6d7e8f9a03cca",
    template("The part of gpuswitch that is for GPU @GPU@ stands still"),
    template(
        "It has not moved for longer than its deadlines allow, and waits for nothing of the kernel, of systemd or of "
        "people: a fault of gpuswitch itself. The watchdog of systemd is told no more, so systemd starts the service "
        "anew, which brings the GPU to a known-good state. The line has the place in the program. Please report it, "
        "with the file that this makes: gpuswitchctl report"
    ),
)
FAULT = LogEvent(
    "8ec37a5d40f14b6c9f2a1d0e5b7c48db",
    template("A fault of gpuswitch itself"),
    template(
        "Something happened that the program did not expect. What was begun is taken back, and the rest goes on. The "
        "line has the place in the program. Please report it, with the file that this makes: gpuswitchctl report"
    ),
)

EVENTS = (
    *(STATE, SWITCH_DONE, SWITCH_REVERTED, SWITCH_FAILED, SWITCH_CANCELLED, SWITCH_WEDGED),
    *(WEDGED, DRIFT, RECOVERED, STALLED, FAULT),
)
"""All of them; the catalog has them in this order."""
