"""A trial: a GPU that was brought to vfio goes home by itself after a while, unless somebody keeps it there."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Trial:
    """The promise: `seconds` after it came to vfio, the GPU goes home. `ends` is when that is, on the clock of
    `Host.boottime`; None: it is not there yet.
    """

    seconds: float
    ends: float | None = None

    def begun(self, now: float) -> Trial:
        """The same, counted from now on; where it is counted already, from when it was."""
        return self if self.ends is not None else replace(self, ends=now + self.seconds)

    def is_over(self, now: float) -> bool:
        return self.ends is not None and self.ends <= now
