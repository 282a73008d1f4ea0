"""`python -m tests.harness.simulation`: the whole service on machines in memory, with everything that can go wrong.

Prints what was covered; for what must never be, the seed and the shortest story that shows it.
"""

# ruff: noqa: T201 -- printing is what it does

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

from gpuswitch.model.states import EDGES, State
from tests.harness.simulation import process_pool
from tests.harness.simulation.exhaustive import Trial, tried
from tests.harness.simulation.play import Outcome, played
from tests.harness.simulation.process_pool import Found, Sum
from tests.harness.simulation.shrink import read, shrunk, written
from tests.harness.simulation.story import Story, told

_WRONG = ("error", "silent", "delay", "late", "hang", "crash", "crash while taken back")
_SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing was broken; 1: something was."""
    options = _options(arguments)
    if options.story is not None:
        return _replay(read(options.story))
    if options.seed is not None:
        return _replay(told(options.seed))
    if options.trial is not None:
        return _shown(tried(Trial.read(options.trial), trace=True).outcome)
    seeds = range(options.first, options.first + options.seeds)
    whole = (process_pool.everything if options.exhaustive else process_pool.stories)(seeds, options.jobs, _progress)
    print(file=sys.stderr)
    _covered(whole)
    for found in _first_of_each(whole.found):
        _tell(found)
    print(f"{len(whole.found)} broke an invariant" if whole.found else "no invariant was broken")
    return 1 if whole.found else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.harness.simulation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=2000, metavar="N", help="how many stories (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="J", help="default: one for each core")
    parser.add_argument(
        "--no-exhaustive", dest="exhaustive", action="store_false", help="leave out what is tried at every single step"
    )
    parser.add_argument("--seed", type=int, metavar="SEED", help="play this one again, and tell everything")
    parser.add_argument("--trial", metavar="WORDS", help="try this one, as it was printed, and tell everything")
    parser.add_argument("--story", metavar="JSON", help="play this one, as it was printed, and tell everything")
    return parser.parse_args(arguments)


def _progress(whole: Sum, done: float) -> None:
    outcome = whole.outcome
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    print(
        f"{start}{done:4.0%}  {outcome.stories} schedules ({outcome.stories / whole.seconds:.0f}/s), "
        f"{outcome.steps} steps ({outcome.steps / whole.seconds:.0f}/s), {len(whole.found)} broke an invariant ",
        end=end,
        file=sys.stderr,
        flush=True,
    )


def _covered(whole: Sum) -> None:
    outcome = whole.outcome
    print(
        f"{outcome.stories} schedules in {whole.seconds:.1f} s ({outcome.stories / whole.seconds:.0f} a second), "
        f"{outcome.steps} steps of plans begun, forward or back ({outcome.steps / whole.seconds:.0f} a second)"
    )
    edges = {(edge.trigger, edge.source) for edge in EDGES}
    print(f"states: {len(outcome.states)} of {len(State)}{_but(set(State) - outcome.states)}")
    missing = {f"{trigger} from {source}" for trigger, source in edges - outcome.edges.keys()}
    print(f"edges: {len(edges & outcome.edges.keys())} of {len(edges)}{_but(missing)}")
    print("switches: " + ", ".join(f"to {to} {result} {n}" for (to, result), n in sorted(outcome.ends.items())))
    _hits(outcome)


def _hits(outcome: Outcome) -> None:
    """How often what went wrong at which step."""
    steps = sorted({step for step, _ in outcome.hits})
    covered = sum(outcome.hits[step, wrong] > 0 for step in steps for wrong in _WRONG)
    print(f"steps and what went wrong at them: {covered} of {len(steps) * len(_WRONG)} pairs")
    print(f"  {'':24}" + "".join(f"{wrong:>{max(8, len(wrong) + 2)}}" for wrong in _WRONG))
    for step in steps:
        counts = "".join(f"{outcome.hits[step, wrong] or '-':>{max(8, len(wrong) + 2)}}" for wrong in _WRONG)
        print(f"  {step:24}{counts}")


def _but(missing: Iterable[object]) -> str:
    words = sorted(map(str, missing))
    return f" (not: {', '.join(words)})" if words else ""


def _first_of_each(found: Iterable[Found]) -> list[Found]:
    """One for each way in which an invariant was broken."""
    known: dict[str, Found] = {}
    for each in found:
        known.setdefault(each.violation.kind, each)
    return list(known.values())[:_SHOWN]


def _tell(found: Found) -> None:
    if isinstance(found.by, Trial):
        print(f"\n{found.violation}\n  --trial '{found.by}'")
        return
    print(f"\n{found.violation}\n  --seed {found.by}")
    story = shrunk(told(found.by), found.violation.kind)
    print(f"  --story '{written(story)}'")


def _replay(story: Story) -> int:
    print(f"machine {story.machine_name}, rules {story.rules}")
    return _shown(played(story, trace=True))


def _shown(outcome: Outcome) -> int:
    for line in outcome.trace:
        print(f"  {line}")
    for violation in outcome.violations:
        print(violation)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
