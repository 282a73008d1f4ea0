"""The page of metrics: made from what there is, with a word for each label."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpuswitch.api.families import BUCKETS, FAMILIES, LABELS, PROCESS_FAMILIES, Type
from gpuswitch.config.schema import LONGEST_DEADLINE, LONGEST_WAIT, Deadlines

ROOT = Path(__file__).parents[2]


def test_the_page_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "metrics.md"
    subprocess.run([sys.executable, "docs/generate_metrics.py", fresh], cwd=ROOT, check=True)
    assert (ROOT / "docs/metrics.md").read_text() == fresh.read_text(), "run `make docs`"


def test_each_label_is_explained_and_each_explanation_used() -> None:
    assert {label for family in FAMILIES for label in family.labels} == LABELS.keys()


def test_names_are_as_prometheus_wants_them() -> None:
    """https://prometheus.io/docs/practices/naming/: the unit last, in base units; `_total` for what counts."""
    for family in (*FAMILIES, *PROCESS_FAMILIES):
        assert family.name.startswith("gpuswitch_")
        assert family.name.endswith("_total") is (family.type is Type.COUNTER)
        assert family.name.endswith("_info") is (family.type is Type.INFO)
        assert "epoch" not in family.help or family.name.endswith("_timestamp_seconds")


def test_the_buckets_reach_as_far_as_a_step_may_take() -> None:
    assert sorted(BUCKETS) == list(BUCKETS)
    assert {LONGEST_DEADLINE, LONGEST_WAIT} <= set(BUCKETS)
    assert max(Deadlines().by_kind().values()) <= LONGEST_DEADLINE
