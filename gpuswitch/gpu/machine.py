"""The state machine of one GPU: the table of `model/states.py` in a flat, synchronous `transitions` machine.

It says what may follow what and nothing else: it schedules nothing, awaits nothing and has no callbacks of its own, so
the asynchronous hazards of the library (a second trigger cancels the first, deadlines are swallowed) cannot arise.
"""

from __future__ import annotations

from transitions import Machine

from gpuswitch.model.states import EDGES, State

TABLE = Machine(
    model=None,
    states=State,
    initial=State.UNKNOWN,
    transitions=[{"trigger": edge.trigger, "source": edge.source, "dest": edge.target} for edge in EDGES],
    auto_transitions=False,
)

START = {State.VFIO: "detach", State.HOST: "reattach"}
SEEN = {State.HOST: "seen_host", State.VFIO: "seen_vfio", State.ABSENT: "seen_gone", State.UNKNOWN: "seen_mixed"}
SETTLE = {
    (State.DETACHING, State.VFIO): "detached",
    (State.REATTACHING, State.HOST): "reattached",
    (State.RECOVERING, State.HOST): "recovered_host",
    (State.RECOVERING, State.VFIO): "recovered_vfio",
    (State.RECOVERING, State.UNKNOWN): "give_up",
}
"""Which edge ends a switch or a recovery, by the state it ran in and what a look shows then."""
_WAYS = frozenset((edge.trigger, edge.source) for edge in EDGES)


class GpuMachine:
    """Holds one GPU's `state`; `fire` moves it along an edge of the table."""

    def __init__(self) -> None:
        self.state = State.UNKNOWN

    def fire(self, trigger: str) -> None:
        """Take the edge of that name.

        Raises:
            transitions.MachineError: no such edge leaves this state; a fault of the caller, never of the user.
        """
        TABLE.events[trigger].trigger(self)

    def can(self, trigger: str) -> bool:
        """Whether an edge of that name leaves this state."""
        return (trigger, self.state) in _WAYS
