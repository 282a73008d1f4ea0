"""The queries of the dashboard and of the alerts, and Prometheus' own judgement of them, by promtool."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CONTRIB = Path(__file__).parents[2] / "contrib"
RULES = CONTRIB / "prometheus/gpuswitch.rules.yml"
RULES_TEST = CONTRIB / "prometheus/gpuswitch.rules.test.yml"
DASHBOARD = CONTRIB / "grafana/gpuswitch.json"

ALL = ".*"
_VARIABLES = {"$__rate_interval": "5m", "$gpu": ALL, "$target": ALL}
"""What Grafana puts in the place of each in a query."""
_NAME = re.compile(r"\b(?:gpuswitch|process|python|node)_\w+|\b\w+:gpuswitch_\w+:\w+|\bup\b|\bALERTS\b")
_IN_BRACES = re.compile(r"\{[^}]*\}")


def promtool(*words: str | Path) -> tuple[int, str]:
    """Its exit status, and what it says."""
    done = subprocess.run(["promtool", *words], check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def queries(dashboard: Mapping[str, Any], instance: str = ALL) -> Iterator[str]:
    """Each as Prometheus gets it from Grafana, those behind the menus too, where this is the host that was chosen."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield _filled_in(target["expr"], instance)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            told = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert told is not None
            yield _filled_in(told[1], instance)


def dashboard_queries(instance: str = ALL) -> list[str]:
    return list(queries(json.loads(DASHBOARD.read_text()), instance))


def _filled_in(query: str, instance: str) -> str:
    for variable, text in {**_VARIABLES, "$instance": instance}.items():
        query = query.replace(variable, text)
    assert "$" not in query, f"nobody knows what Grafana puts there: {query}"
    return query


def as_rules(all_queries: Sequence[str]) -> str:
    """A file of rules that has them all, for promtool to read: a rule is recorded from any query that gives series."""
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(all_queries)]
    return json.dumps({"groups": [{"name": "queries", "rules": rules}]})  # which is YAML


def metrics_in(query: str) -> set[str]:
    """The names of the series that it asks for."""
    return set(_NAME.findall(_IN_BRACES.sub("", query)))
