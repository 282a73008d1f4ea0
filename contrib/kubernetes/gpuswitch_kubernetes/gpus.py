"""GPUs and switches as `gpuswitchctl --json` tells them: docs/json.md has the forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOVING = frozenset({"detaching", "reattaching", "recovering"})
LOST = frozenset({"wedged", "failed"})
"""No known-good state could be reached, or nothing can be done: no pod shall come to the node. One that is `unknown`
may be moved as any other: drivers that somebody mixed, or a service that has not looked yet."""


@dataclass(frozen=True)
class Switch:
    """One that is under way (`result` is ""), or over."""

    id: str
    target: str
    result: str
    reason: str = ""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Switch:
        return cls(record["id"], record["target"], record["result"] or "", record["reason"])


@dataclass(frozen=True)
class Gpu:
    """`switch` is the one under way, or the last since the service started. `past` are the finished ones, newest
    first.
    """

    address: str
    vendor: str
    state: str
    reason: str = ""
    switch: Switch | None = None
    past: tuple[Switch, ...] = ()

    @classmethod
    def read(cls, record: Mapping[str, Any], past: tuple[Switch, ...]) -> Gpu:
        switch = None if record["switch"] is None else Switch.read(record["switch"])
        return cls(record["address"], record["vendor"], record["state"], record["reason"], switch, past)

    @property
    def moving(self) -> bool:
        return self.state in MOVING or (self.switch is not None and not self.switch.result)

    @property
    def known(self) -> tuple[str, ...]:
        """The ids by which a later switch is told from those that there are."""
        last = () if self.switch is None else (self.switch.id,)
        return tuple(dict.fromkeys((*last, *(entry.id for entry in self.past[:1]))))

    def since(self, known: tuple[str, ...], target: str) -> Switch | None:
        """The newest finished switch to `target` that is none of `known` nor older; None: there is none."""
        last = self.switch
        if last is not None and last.result and last.id not in known and last.target == target:
            return last
        for entry in self.past:
            if entry.id in known:
                break
            if entry.target == target and entry.result != "drifted":
                return entry
        return None


@dataclass(frozen=True)
class Refusal:
    """Why the service does not begin. `for_use`: the GPU is in use, and nothing else is in the way. `unanswered`: it
    was asked, and gave no plan.
    """

    text: str
    for_use: bool = False
    unanswered: bool = False
