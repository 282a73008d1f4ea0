"""The nine states of a GPU and every edge between them: what may follow what, and what a crash in each one means.

This is the table only. The `transitions` machine that holds it is built in `gpu/machine.py`; `docs/states.md` is
generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Where a GPU is. `value` is the word on D-Bus, in metrics and in JSON.

    `meaning` says it to a person; `after_crash` is what a daemon that starts anew does with it; `stable` states are
    known-good, `latched` ones wait for somebody to act (or, `wedged`, for the kernel to return).
    """

    meaning: str
    after_crash: str

    def __new__(cls, word: str, meaning: str, after_crash: str) -> State:
        member = object.__new__(cls)
        member._value_ = word
        member.meaning = meaning
        member.after_crash = after_crash
        return member

    UNKNOWN = (
        "unknown",
        "what sysfs shows is neither host nor vfio, or nobody has looked yet; to-host and to-vfio are allowed",
        "look again",
    )
    HOST = ("host", "no function on a vfio driver, each on its baseline driver, possibly none", "adopt")
    DETACHING = ("detaching", "host → vfio under way", "revert to the captured drivers")
    VFIO = ("vfio", "every function is on a vfio driver, with or without an owner", "adopt, owner included")
    REATTACHING = ("reattaching", "vfio → host under way", "finish to host, else back to vfio")
    RECOVERING = ("recovering", "getting to a known-good state after a failure or a crash", "run recovery again")
    FAILED = (
        "failed",
        "no known-good state could be reached, the kernel still answers",
        "stay failed",
    )
    WEDGED = (
        "wedged",
        "a kernel operation has not returned; nothing is written to this GPU",
        "stay wedged, find the worker again",
    )
    ABSENT = ("absent", "the device left the bus", "look again")

    @property
    def stable(self) -> bool:
        return self in (State.HOST, State.VFIO)

    @property
    def latched(self) -> bool:
        return self in (State.FAILED, State.WEDGED)

    @property
    def moving(self) -> bool:
        """A switch or a recovery is at work."""
        return self in (State.DETACHING, State.REATTACHING, State.RECOVERING)

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Edge:
    """`trigger` takes a GPU from `source` to `target`."""

    trigger: str
    source: State
    target: State


def _edges(trigger: str, target: State, *sources: State) -> list[Edge]:
    return [Edge(trigger, source, target) for source in sources]


EDGES: tuple[Edge, ...] = (
    # A look at the kernel, while nothing of ours is under way.
    *_edges("seen_host", State.HOST, State.UNKNOWN, State.VFIO, State.FAILED, State.ABSENT),
    *_edges("seen_vfio", State.VFIO, State.UNKNOWN, State.HOST, State.FAILED, State.ABSENT),
    *_edges("seen_mixed", State.UNKNOWN, State.HOST, State.VFIO, State.ABSENT),
    *_edges("seen_gone", State.ABSENT, *(s for s in State if s not in (State.WEDGED, State.ABSENT))),
    # A switch.
    # From vfio too: where somebody else put it there, the firmware's frame buffer may still be in its memory.
    *_edges("detach", State.DETACHING, State.HOST, State.UNKNOWN, State.VFIO),
    *_edges("detached", State.VFIO, State.DETACHING),
    # From host too: where somebody else brought the functions home, what we changed besides is still to be undone.
    *_edges("reattach", State.REATTACHING, State.VFIO, State.UNKNOWN, State.HOST),
    *_edges("reattached", State.HOST, State.REATTACHING),
    # The way back to a known-good state.
    *_edges("fault", State.RECOVERING, State.DETACHING, State.REATTACHING),
    *_edges("recover", State.RECOVERING, State.FAILED, State.UNKNOWN, State.HOST, State.VFIO, State.ABSENT),
    *_edges("left_failed", State.FAILED, State.UNKNOWN),
    *_edges("recovered_host", State.HOST, State.RECOVERING),
    *_edges("recovered_vfio", State.VFIO, State.RECOVERING),
    *_edges("give_up", State.FAILED, State.RECOVERING),
    # A kernel operation that does not return, and the moment it does. A device may leave the bus meanwhile.
    *_edges("stuck", State.WEDGED, *(s for s in State if s is not State.WEDGED)),
    *_edges("unstuck", State.RECOVERING, State.WEDGED),
)
