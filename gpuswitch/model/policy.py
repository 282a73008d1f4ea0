"""What a person may choose about a switch: in the config for good, or on the call."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Busy(StrEnum):
    """What becomes of the processes that have the GPU open: tell who they are, wait, ask them to end, end them."""

    REFUSE = "refuse"
    WAIT = "wait"
    TERMINATE = "terminate"
    KILL = "kill"

    @property
    def ends_programs(self) -> bool:
        return self in {Busy.TERMINATE, Busy.KILL}


class ModulePolicy(StrEnum):
    """When a host driver's modules are unloaded: where that is the safe way to detach, whenever it can be, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Release(StrEnum):
    """Where a GPU goes when its virtual machine is gone: home to the host, or it stays on vfio."""

    HOST = "host"
    STAY = "stay"


class AtBoot(StrEnum):
    """Where a GPU is when the machine has started: on its host drivers, on vfio, or where it was found."""

    HOST = "host"
    VFIO = "vfio"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller asked for besides the target; None and empty: as the config says.

    `trial_seconds`, of a switch to vfio: so long after it came there, the GPU goes home by itself; None: it stays.
    """

    busy: Busy | None = None
    wait_seconds: float | None = None
    stop_units: tuple[str, ...] = ()
    trial_seconds: float | None = None

    def policy(self, configured: Busy) -> Busy:
        """What holds for this call: to say how long to wait is to ask to wait."""
        if self.busy is None and self.wait_seconds is not None:
            return Busy.WAIT
        return self.busy or configured

    def ends_more(self, busy: Busy, stop_units: Collection[str]) -> bool:
        """Whether this ends programs or stops units where a configuration with these two does not."""
        asked = self.policy(busy)
        harder = asked.ends_programs and asked is not busy and busy is not Busy.KILL
        return harder or not set(stop_units).issuperset(self.stop_units)

    def beyond(self, running: Options, configured: Options) -> tuple[str, ...]:
        """What this asks for in so many words, and a switch that runs with other options does not do: `busy=kill`.

        `configured` are the options that hold where a call says nothing.
        """
        more = []
        default = configured.busy or Busy.REFUSE
        if (self.busy or self.wait_seconds) and self.policy(default) is not running.policy(default):
            more.append(f"busy={self.policy(default)}")
        if self.wait_seconds and self.wait_seconds != (running.wait_seconds or configured.wait_seconds):
            more.append(f"wait_seconds={self.wait_seconds:g}")
        if units := [name for name in self.stop_units if name not in (*running.stop_units, *configured.stop_units)]:
            more.append(f"stop_units={','.join(units)}")
        if self.trial_seconds is not None and running.trial_seconds is None:
            more.append(f"trial_seconds={self.trial_seconds:g}")
        return tuple(more)


AS_CONFIGURED = Options()
