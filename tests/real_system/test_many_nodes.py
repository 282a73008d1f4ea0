"""Many nodes under one Prometheus of the release, with our rules and the queries of the dashboard."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.prometheus import Prometheus, find_prometheus, hasty, read
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, INSIDE, ctl, simulated, until
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.promtool import RULES, dashboard_queries
from tests.real_system.conftest import RELEASE, Boot

pytestmark = pytest.mark.beside

GPUS = 8
"""Of each node; beside them it has the one of the chipset."""
PORT = 9760
NOBODY = "127.0.0.1:9"
TEXTS = "/srv/nodes"
WEDGED, DOWN = "node0007", "node0011"
AT_ONCE = 50
"""The most series that a panel shows as the dashboard opens."""

FIGURES = (
    *("prometheus_tsdb_head_series", "prometheus_tsdb_head_samples_appended_total", "process_resident_memory_bytes"),
    *("process_cpu_seconds_total", "prometheus_rule_group_last_duration_seconds"),
)


@pytest.fixture
def machine(boot: Boot, system: System, request: pytest.FixtureRequest) -> Container:
    """It has Prometheus, and the service on a simulated host that has been there and back."""
    prometheus = find_prometheus(Cache(default_folder(), progress(request.config)), find_release(RELEASE))
    machine = boot((*system.installed, prometheus), simulated(scenario="plain"))
    ctl(machine, f"to-vfio {GPU}")
    ctl(machine, f"to-host {GPU}")
    return machine


def address(number: int) -> str:
    return f"{number:04x}:01:00.0"


def with_gpus(told: str) -> str:
    """What a service tells that has as many graphics cards as a node of ours, of which this told of one."""
    lines = []
    for line in told.splitlines(keepends=True):
        lines += [line.replace(GPU, address(number)) for number in range(GPUS)] if GPU in line else [line]
    return "".join(lines)


def wedge(told: str, gpu: str) -> str:
    """The same, but for one GPU."""
    for state, value in (("host", 0), ("wedged", 1)):
        series = f'gpuswitch_gpu_state{{gpu="{gpu}",state="{state}"}} '
        assert f"{series}{1 - value}.0\n" in told
        told = told.replace(f"{series}{1 - value}.0\n", f"{series}{value}.0\n")
    return told


def serve(machine: Container, count: int) -> list[object]:
    """Begin to tell of so many nodes; gives Prometheus' targets."""
    told = with_gpus(read(machine, "http://127.0.0.1:9752/metrics"))
    machine.push(told, f"{TEXTS}/all")
    machine.push(wedge(told, address(3)), f"{TEXTS}/{WEDGED}")
    machine.push((INSIDE / "nodes.py").read_text(), "/srv/nodes.py")
    machine.sh(f"systemd-run --quiet --unit=nodes python3 -ISE /srv/nodes.py {PORT} {TEXTS}")
    until(machine, f"bash -c 'exec 3<>/dev/tcp/127.0.0.1/{PORT}' 2>/dev/null")
    names = [f"node{number:04}" for number in range(count)]
    return [
        {
            "targets": [NOBODY if name == DOWN else f"127.0.0.1:{PORT}"],
            "labels": {"instance": name, "__metrics_path__": f"/{name}"},
        }
        for name in names
    ]


@pytest.mark.parametrize(
    ("count", "interval", "rules"),
    [(20, "500ms", hasty), pytest.param(1000, "1m", str, marks=pytest.mark.campaign)],
    ids=["20", "1000"],
)
def test_alerts_name_the_host_and_no_panel_grows_with_the_hosts(
    machine: Container, count: int, interval: str, rules: Callable[[str], str]
) -> None:
    prometheus = Prometheus(
        machine, {"static_configs": serve(machine, count)}, interval=interval, rules=rules(RULES.read_text())
    )
    for alert in "GpuswitchWedged", "GpuswitchDown":
        prometheus.until(f'ALERTS{{alertname="{alert}", alertstate="firing"}}', timeout=1800)
    assert prometheus.value('count(up{job="gpuswitch"} == 1)') == count - 1
    firing = [labels for labels, _ in prometheus.ask('ALERTS{alertstate="firing"}')]
    assert {(labels["alertname"], labels["instance"], labels.get("gpu")) for labels in firing} == {
        ("GpuswitchWedged", WEDGED, address(3)),
        ("GpuswitchDown", DOWN, None),
    }
    # the last ones fill the menus, which have every host
    for query in dashboard_queries(WEDGED):
        if query != "gpuswitch_build_info":
            assert len(prometheus.ask(query)) <= AT_ONCE, query
    assert prometheus.own("prometheus_rule_evaluation_failures_total") == 0
    for figure in FIGURES:
        print(f"{count} nodes: {figure} {prometheus.own(figure):,.0f}")  # noqa: T201 -- for docs/fleet.md: -rP shows it
