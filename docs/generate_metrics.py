"""Write docs/metrics.md from gpuswitch/api/families.py: `python docs/generate_metrics.py [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from gpuswitch.api.families import BUCKETS, FAMILIES, LABELS, PROCESS_FAMILIES, Family
from gpuswitch.config.schema import LONGEST_DEADLINE, LONGEST_WAIT

_INTRODUCTION = """\
# Metrics

<!-- Made by docs/generate_metrics.py from gpuswitch/api/families.py; change those, then run `make docs`. -->

What the service tells Prometheus. How to have it scraped, over HTTPS as well, by way of node_exporter, and with alerts:
[monitoring.md](monitoring.md). A series exists, with 0 where it counts, from the moment on that its GPU is known; sets
of labels are bounded by the GPUs of the host.

## Of the GPUs

"""
_PROCESSES = """
## Of the service itself

Over HTTP alone, not in the file for node_exporter. Beside these, all `process_*` and `python_*` metrics that the client
library has for every program in Python: `process_cpu_seconds_total`, `process_resident_memory_bytes`,
`process_start_time_seconds`, `process_open_fds`, `process_max_fds`, `python_gc_collections_total`, `python_info`.

"""
_LABELS = """
## Labels

"""
_LIMITS = ", ".join(f"{limit:g}" for limit in BUCKETS)
_BUCKETS = f"""
## Buckets

Both histograms have these upper limits, in seconds: {_LIMITS}, and none.
No deadline of a step is longer than {LONGEST_DEADLINE}, and nobody is waited for longer than {LONGEST_WAIT}.
"""


def page() -> str:
    """The whole page."""
    return "".join(
        [
            _INTRODUCTION,
            *_table(("metric", "type", "labels", ""), map(_row, FAMILIES)),
            _PROCESSES,
            *_table(("metric", "type", "labels", ""), map(_row, PROCESS_FAMILIES)),
            _LABELS,
            *_table(("label", ""), ((f"`{label}`", meaning) for label, meaning in LABELS.items())),
            _BUCKETS,
        ]
    )


def _row(family: Family) -> tuple[str, ...]:
    return f"`{family.name}`", str(family.type), ", ".join(f"`{label}`" for label in family.labels), family.help


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(line)} |\n" for line in lines]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("metrics.md")
    target.write_text(page())
