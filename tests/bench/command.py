"""How long the commands take to start and end, beside a Python that does nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from tests.bench.builds import DEVELOPED, Build
from tests.bench.here import Service, children_at_work, serving, timed
from tests.bench.rounds import Experiment, Quantity, figures, ratios
from tests.bench.table import Compared, Row
from tests.harness.service.services import environment

_COMPLETE = ("__complete", "to-vfio", "")


def measure() -> Iterator[Row]:
    with serving(DEVELOPED) as service:
        yield from figures(COMMANDS, service)


def compare(this: Build, base: Build) -> Iterator[Compared]:
    with serving(this) as ours, serving(base) as theirs:
        yield from ratios(COMMANDS, ours, theirs)


def _times(factor: float) -> str:
    return f"{factor:.2f} x"


def _beside_python(program: str, *arguments: str, target: str) -> Experiment[Service]:
    def sample(service: Service) -> Iterable[float]:
        build = service.place.build
        environ = environment(GPUSWITCH_BUS=service.place.bus)
        run = partial(subprocess.run, env=environ, capture_output=True, check=False)
        nothing, idle = _spent(partial(run, [str(build.python), "-E", "-c", "pass"]))
        ours, busy = _spent(partial(run, [*build.command(program), *arguments]))
        yield from (ours, ours / nothing, busy / idle)

    shown = " ".join((program, *filter(None, arguments)))
    in_all, factor = (target, "") if target.endswith("ms") else ("", target)
    quantities = (
        Quantity(shown, target=in_all),
        Quantity("  / python3 -c pass", _times, factor),
        Quantity("  the same of what both are at work, which a busy machine changes less", _times, factor),
    )
    return Experiment(quantities, sample, times=20, pairs=20)


def _spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that it took, and those of a processor that its programs had."""
    before = children_at_work()
    (seconds,) = timed(1, work)
    return seconds, children_at_work() - before


COMMANDS = (
    _beside_python("gpuswitchctl", "status", target="5 x"),
    _beside_python("gpuswitchctl", "--help", target="3 x"),
    _beside_python("gpuswitchctl", *_COMPLETE, target="< 100 ms"),
    _beside_python("gpuswitchd", "--help", target="4 x"),
)
