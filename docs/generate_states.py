"""Write docs/states.md from the table in gpuswitch/model/states.py: `python docs/generate_states.py [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from transitions.extensions import GraphMachine

from gpuswitch.model.states import EDGES, State

_INTRODUCTION = """\
# The states of a GPU

<!-- Made by docs/generate_states.py from gpuswitch/model/states.py; change those, then run `make docs`. -->

The state of a GPU is what the kernel shows, never what somebody last wished. It is one of these nine words on D-Bus, in
metrics and in JSON.

"""
_EDGES = """
## What may follow what

`seen_...` is a look at the kernel while nothing of ours is under way. Whatever is not listed cannot happen.

"""
_DIAGRAM = """
## The same as a picture

"""


def page() -> str:
    """The whole page."""
    states = ((f"`{state}`", _rest(state), state.meaning, state.after_crash) for state in State)
    edges = ((f"`{edge.source}`", f"`{edge.trigger}`", f"`{edge.target}`") for edge in EDGES)
    return "".join(
        [
            _INTRODUCTION,
            *_table(("state", "rest", "means", "if the service dies here"), states),
            _EDGES,
            *_table(("from", "by", "to"), edges),
            _DIAGRAM,
            f"```mermaid\n{_diagram()}\n```\n",
        ]
    )


def _rest(state: State) -> str:
    if state.stable:
        return "stable"
    if state.latched:
        return "latched"
    return "moving" if state.moving else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(line)} |\n" for line in lines]


def _diagram() -> str:
    machine = GraphMachine(
        states=[str(state) for state in State],
        initial=str(State.UNKNOWN),
        transitions=[[edge.trigger, str(edge.source), str(edge.target)] for edge in EDGES],
        auto_transitions=False,
        graph_engine="mermaid",
    )
    drawn = str(machine.get_combined_graph().draw(None))
    # Without its title and its colours: the page has a title, and the reader a theme.
    lines = drawn[drawn.index("stateDiagram-v2") :].splitlines()
    return "\n".join(line for line in lines if line.strip() and not line.lower().lstrip().startswith("class"))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("states.md")
    target.write_text(page())
