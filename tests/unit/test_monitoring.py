"""Alerts, runbook and dashboard: Prometheus takes them, they ask for what there is, and each alert fires and ends."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpuswitch.api.families import FAMILIES, PROCESS_FAMILIES, Type
from tests.harness.promtool import (
    CONTRIB,
    RULES,
    RULES_TEST,
    as_rules,
    dashboard_queries,
    metrics_in,
    promtool,
    queries,
)

ROOT = CONTRIB.parent
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
ALERTS = re.findall(r"^ +- alert: (\w+)$", RULES.read_text(), re.MULTILINE)
RECORDED = re.findall(r"^ +- record: (\S+)$", RULES.read_text(), re.MULTILINE)
KNOWN = {
    *(family.name for family in (*FAMILIES, *PROCESS_FAMILIES) if family.type is not Type.HISTOGRAM),
    *(f"{each.name}_{of}" for each in FAMILIES if each.type is Type.HISTOGRAM for of in ("bucket", "sum", "count")),
    *RECORDED,
    *("process_resident_memory_bytes", "node_systemd_unit_state", "up", "ALERTS"),
}
"""What rules and dashboard may ask for: docs/metrics.md, the rules themselves, and what others have."""


def section(alert: str) -> str:
    """What the runbook says of it."""
    [text] = re.findall(rf"^## {alert}\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    return str(text)


def test_prometheus_takes_the_rules() -> None:
    status, said = promtool("check", "rules", RULES)
    assert (status, f"{len(ALERTS) + len(RECORDED)} rules found" in said) == (0, True), said


def test_each_alert_fires_and_ends_as_its_test_says() -> None:
    status, said = promtool("test", "rules", RULES_TEST)
    assert status == 0, said


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_test_in_which_it_begins_and_ends(alert: str) -> None:
    told = re.findall(rf"alertname: {alert}(?:, exp_alerts: (\[\])|$)", RULES_TEST.read_text(), re.MULTILINE)
    assert re.search("quiet fires quiet", " ".join("quiet" if quiet else "fires" for quiet in told))


def test_a_wrong_expectation_is_found(tmp_path: Path) -> None:
    wrong = RULES_TEST.read_text().replace("severity: critical", "severity: warning", 1)
    (tmp_path / RULES.name).write_text(RULES.read_text())
    (tmp_path / "test.yml").write_text(wrong)
    assert promtool("test", "rules", tmp_path / "test.yml")[0] != 0


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_tells_what_to_type(alert: str) -> None:
    text = section(alert)
    for part in ("**Symptom.**", "**Meaning.**", "**What to type.**", "```sh\n"):
        assert part in text
    assert f"runbook: docs/runbook.md#{alert.lower()}\n" in RULES.read_text()


def test_the_runbook_is_about_nothing_else() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == ALERTS


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^gpuswitchctl [^#\n]*[^#\n ]", RUNBOOK, re.MULTILINE))))
def test_what_the_runbook_says_to_type_is_a_command(command: str) -> None:
    program, *words = shlex.split(command)
    asked = [str(Path(sys.executable).with_name(program)), *words, "--help"]
    assert subprocess.run(asked, check=False, capture_output=True).returncode == 0


def test_prometheus_takes_each_query_of_the_dashboard(tmp_path: Path) -> None:
    (tmp_path / "queries.yml").write_text(as_rules(dashboard_queries()))
    status, said = promtool("check", "rules", tmp_path / "queries.yml")
    assert (status, f"{len(dashboard_queries())} rules found" in said) == (0, True), said


def test_rules_and_dashboard_ask_for_what_there_is() -> None:
    asked = set().union(*map(metrics_in, [*dashboard_queries(), *expressions()]))
    assert asked - KNOWN == set()
    # and the page of metrics, which is made from the same list, has them
    page = (ROOT / "docs/metrics.md").read_text()
    for name in asked & {family.name for family in FAMILIES}:
        assert f"| `{name}` |" in page


def expressions() -> list[str]:
    """The queries of the rules."""
    found = re.findall(r"^( +)expr: (?:\|\n((?:\1 +.*\n)+)|(.+)\n)", RULES.read_text(), re.MULTILINE)
    assert len(found) == len(ALERTS) + len(RECORDED)
    return [block or line for _, block, line in found]


def test_the_rules_can_fail(tmp_path: Path) -> None:
    assert metrics_in('gpuswitch_a{state="gpuswitch_b"} / gpu:gpuswitch_c:max > up') == {
        "gpuswitch_a",
        "gpu:gpuswitch_c:max",
        "up",
    }
    made_up = {"panels": [{"targets": [{"expr": "sum(("}]}], "templating": {"list": []}}
    (tmp_path / "queries.yml").write_text(as_rules(list(queries(made_up))))
    assert promtool("check", "rules", tmp_path / "queries.yml")[0] != 0
