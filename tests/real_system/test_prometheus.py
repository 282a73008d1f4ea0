"""The release's own Prometheus scrapes the service: what its query API says, and alerts that fire and end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.certificates import Authority
from tests.harness.containers.container import Container
from tests.harness.containers.packaged import APT, THIS, find_packaged
from tests.harness.containers.prometheus import (
    DOWNLOADED,
    Prometheus,
    Queries,
    find_downloaded,
    find_prometheus,
    hasty,
)
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    AS_NOBODY,
    DROP_INS,
    GPU,
    INSIDE,
    NAME,
    PYTHON,
    ROOT,
    ctl,
    path_of,
    prop,
    show,
    simulated,
    start_switch,
    until,
    until_restarted,
    until_state,
)
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.promtool import RULES, RULES_TEST, as_rules, dashboard_queries
from tests.real_system.conftest import BUS, RELEASE, Boot

pytestmark = pytest.mark.beside

SOUND = "0000:01:00.1"
MANAGED = f'[[gpu]]\naddress = "{GPU}"\nname = "spare"\n'
GENTLE = "[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n"
OF_THIS_GPU = f'gpu="{GPU}"'
WIN11 = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
MANAGER = f"{NAME} {ROOT} {NAME}.Manager"
CONFIGURATION = "/etc/prometheus/prometheus.yml"
INSTALLED_RULES = "/usr/share/gpuswitch/prometheus/gpuswitch.rules.yml"
TEXTFILES = "/var/lib/prometheus/node-exporter"

Start = Callable[..., Container]
"""`start(*faults, config=..., scenario=...)`: a machine that has Prometheus, and the service on a simulated host."""


@pytest.fixture(scope="session")
def prometheus_layer(request: pytest.FixtureRequest) -> Path:
    return find_prometheus(Cache(default_folder(), progress(request.config)), find_release(RELEASE))


@pytest.fixture
def start(boot: Boot, system: System, prometheus_layer: Path) -> Start:
    def start(*faults: str, config: str = "", scenario: str = "laptop") -> Container:
        settings = {"/etc/gpuswitch/config.toml": config, f"{TEXTFILES}/others.prom": ""}
        return boot((*system.installed, prometheus_layer), simulated(*faults, scenario=scenario) | settings)

    return start


def test_its_query_api_tells_what_the_service_does(start: Start) -> None:
    machine = start(config=MANAGED)
    prometheus = Prometheus(machine)
    [(info, one)] = prometheus.ask(f"gpuswitch_gpu_info{{{OF_THIS_GPU}}}")
    assert one == 1
    told = {name: info[name] for name in ("name", "vendor", "managed", "host_driver", "on_release")}
    assert told == {
        "name": "spare",
        "vendor": "nvidia",
        "managed": "true",
        "host_driver": "nvidia",
        "on_release": "host",
    }
    assert "GeForce" in info["model"]
    assert prometheus.value("sum(gpuswitch_gpu_state)") == 2
    assert prometheus.value(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="host"}}') == 1

    ctl(machine, f"to-vfio {GPU}")
    done = f'{{{OF_THIS_GPU}, target="vfio", result="done"}}'
    prometheus.until(f"gpuswitch_switches_total{done} == 1")
    assert prometheus.value(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="vfio"}}') == 1
    # The first event of all is an increase: the counter was there before it.
    assert prometheus.value(f"increase(gpuswitch_switches_total{done}[5m])") >= 1
    assert prometheus.value(f'gpuswitch_switch_duration_seconds_count{{{OF_THIS_GPU}, target="vfio"}}') == 1
    assert prometheus.value('gpuswitch_step_duration_seconds_count{step="unbind"}') == 3
    since = prometheus.value(f"gpuswitch_state_since_timestamp_seconds{{{OF_THIS_GPU}}}")
    assert since == pytest.approx(prop(machine, "StateSince"), abs=0.01)
    pid = show(machine, "MainPID")
    assert prometheus.value("process_open_fds") == pytest.approx(
        int(machine.sh(f"ls /proc/{pid}/fd | wc -l").stdout), abs=5
    )
    assert prometheus.value("gpuswitch_processes") >= 1
    assert prometheus.ask("gpuswitch_gpu_owner") == []


def test_a_switch_is_seen_while_it_runs_and_stops_no_scrape(start: Start) -> None:
    machine = start("unbind=2s")
    prometheus = Prometheus(machine)
    start_switch(machine, "ToVfio")
    prometheus.until(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="detaching"}} == 1')
    prometheus.until(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="vfio"}} == 1')
    seen = {
        labels["state"] for labels, _ in prometheus.ask(f"max_over_time(gpuswitch_gpu_state{{{OF_THIS_GPU}}}[5m]) == 1")
    }
    assert seen == {"host", "detaching", "vfio"}


def test_an_owner_is_told(start: Start) -> None:
    machine = start(config=MANAGED, scenario="plain")
    prometheus = Prometheus(machine)
    machine.sh(f"busctl call {MANAGER} AcquireForVm ssas win11 {WIN11} 1 {GPU}")
    prometheus.until(f'gpuswitch_gpu_owner{{{OF_THIS_GPU}, owner="win11", uuid="{WIN11}"}} == 1')
    machine.sh(f"busctl call {MANAGER} ReleaseFromVm sss win11 {WIN11} shutdown")
    prometheus.until_not("gpuswitch_gpu_owner")


def test_idle_scrapers_and_a_large_request_keep_prometheus_from_nothing(start: Start) -> None:
    machine = start()
    prometheus = Prometheus(machine)
    machine.push((INSIDE / "idle.py").read_text(), "/srv/idle.py")
    machine.start(f"{AS_NOBODY} python3 -ISE /srv/idle.py 50 >/run/idle", timeout=60)
    until(machine, "[ -s /run/idle ]")
    ctl(machine, f"to-vfio {GPU}")
    prometheus.until(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="vfio"}} == 1')


def test_it_scrapes_over_https_with_a_certificate_of_its_own(start: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, client = authority.signs("server"), authority.signs("prometheus")
    machine = start()
    folder = "/etc/gpuswitch/tls"
    for name, file in (("server.pem", server.certificate), ("ca.pem", authority.certificate), ("key", server.key)):
        machine.push(file.read_text(), f"{folder}/{name}")
    for name, file in (("client.pem", client.certificate), ("client.key", client.key)):
        machine.push(file.read_text(), f"/srv/{name}")
    machine.push(
        f'[metrics]\ncertificate = "{folder}/server.pem"\nkey = "{folder}/key"\nclient_ca = "{folder}/ca.pem"\n',
        "/etc/gpuswitch/config.toml",
    )
    machine.sh(f"chmod 644 {folder}/key")
    refused = machine.sh(f"busctl call {MANAGER} Reload", check=False)
    assert f"cannot use metrics.key: everybody may read {folder}/key" in refused.stderr
    machine.sh(f"chmod 600 {folder}/key; systemctl reload gpuswitchd")
    tls = {"ca_file": f"{folder}/ca.pem", "cert_file": "/srv/client.pem", "key_file": "/srv/client.key"}
    prometheus = Prometheus(machine, {"scheme": "https", "tls_config": tls})
    assert prometheus.value(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="host"}}') == 1


def test_the_file_for_node_exporter_is_kept_under_the_sandbox_of_the_unit(start: Start) -> None:
    """In Debian's directory. Another one is named, with what to put into the unit."""
    machine = start(config=f'[metrics]\naddress = ""\ntextfile_directory = "{TEXTFILES}"\n')
    file = f"{TEXTFILES}/gpuswitch.prom"
    until(machine, f"[ -s {file} ]")
    ctl(machine, f"to-vfio {GPU}")
    until(machine, f'grep -qxF \'gpuswitch_gpu_state{{gpu="{GPU}",state="vfio"}} 1.0\' {file}')
    assert machine.sh(f"{AS_NOBODY} promtool check metrics <{file}").stdout == ""
    machine.push('[metrics]\ntextfile_directory = "/srv"\n', "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    sentence = (
        "the metrics are not kept in /srv for now: Read-only file system; where that is for the service alone: "
        "ReadWritePaths=/srv in its unit"
    )
    until(machine, f"journalctl -u gpuswitchd -o cat | grep -qxF '{sentence}'")
    assert machine.sh(f"ls {TEXTFILES}").stdout == "others.prom\n"


def test_two_commands_make_a_service_that_is_scraped_and_alerts(boot: Boot, request: pytest.FixtureRequest) -> None:
    """With Debian's package of it as it comes, but for how often it looks, and for how long our alerts wait."""
    cache, release = Cache(default_folder(), progress(request.config)), find_release(RELEASE)
    systems, downloaded = find_packaged(cache, release, BUS), find_downloaded(cache, release)
    machine = boot((downloaded, *systems.bare), simulated(program="/usr/bin/gpuswitchd", scenario="laptop"))
    machine.sh(f"{APT} install {THIS} {DOWNLOADED}/*.deb 2>&1", timeout=300)
    machine.sh(f"sed -i 's/15s/500ms/; s/5s/500ms/' {CONFIGURATION}")
    machine.push(hasty(RULES.read_text()), INSTALLED_RULES)
    before = machine.read(CONFIGURATION)
    own = {each["kind"]: each["severity"] for each in json.loads(doctor(machine))["findings"]}
    assert own["prometheus"] == "warning"

    told = json.loads(ctl(machine, "setup prometheus --yes --json").stdout)
    assert (told["changed"], told["target"], told["rules"]) == (True, "127.0.0.1:9752", INSTALLED_RULES)
    assert told["commands"] == ["systemctl reload prometheus.service"]
    queries = Queries(machine)
    queries.until('up{job="gpuswitch"} == 1')
    queries.until(f'gpuswitch_gpu_state{{{OF_THIS_GPU}, state="host"}} == 1')
    fires_and_ends(
        queries,
        "GpuswitchDown",
        lambda: machine.sh("systemctl stop gpuswitchd"),
        lambda: machine.sh("systemctl start gpuswitchd"),
    )
    own = {each["kind"]: each["severity"] for each in json.loads(doctor(machine))["findings"]}
    assert own["prometheus"] == "ok"

    # With a mistake of somebody's own in it, nothing is changed.
    machine.sh(f"cp -a {CONFIGURATION} /srv/kept; echo 'no: such key' >>{CONFIGURATION}")
    broken = machine.read(CONFIGURATION)
    machine.push("[metrics]\nport = 9753\n", "/etc/gpuswitch/config.toml")
    machine.sh("systemctl restart gpuswitchd")
    refused = ctl(machine, "setup prometheus --yes", check=False)
    assert refused.status != 0
    assert "cannot set up Prometheus: it has faults as it is: FAILED: parsing YAML file" in refused.stderr
    assert machine.read(CONFIGURATION) == broken

    machine.sh(f"cp -a /srv/kept {CONFIGURATION}")
    assert f"{CONFIGURATION} is without our lines" in ctl(machine, "setup undo").stdout
    assert machine.read(CONFIGURATION) == before
    queries.until('time() - timestamp(up{job="gpuswitch"}) > 3')


def doctor(machine: Container) -> str:
    """What it says; its status says how bad a container is for GPUs."""
    return ctl(machine, "doctor --json", check=False).stdout


# Alerts


def test_rules_and_dashboard_pass_its_promtool(start: Start) -> None:
    machine = start()
    for file in RULES, RULES_TEST:
        machine.push(file.read_text(), f"/srv/{file.name}")
    machine.push(as_rules(dashboard_queries()), "/srv/queries.yml")
    assert "SUCCESS" in machine.sh(f"promtool test rules /srv/{RULES_TEST.name}").stdout
    assert "SUCCESS" in machine.sh(f"promtool check rules /srv/{RULES.name} /srv/queries.yml").stdout


def fires_and_ends(prometheus: Queries, name: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """It is silent, fires after `begin`, and is silent again after `end`."""
    prometheus.until_not(f'ALERTS{{alertname="{name}"}}')  # at its own start it has seen no service yet
    begin()
    prometheus.until(f'ALERTS{{alertname="{name}", alertstate="firing"}}')
    end()
    prometheus.until_not(f'ALERTS{{alertname="{name}"}}')


def nothing() -> None:
    """It ends by itself."""


def test_an_alert_for_a_gpu_that_was_left_on_vfio(start: Start) -> None:
    machine = start(config=MANAGED)
    fires_and_ends(
        Prometheus(machine),
        "GpuswitchOnVfioWithoutOwner",
        lambda: ctl(machine, f"to-vfio {GPU}"),
        lambda: ctl(machine, f"to-host {GPU}"),
    )


def test_alerts_for_a_switch_that_does_not_end_and_for_a_kernel_that_does_not_return(start: Start) -> None:
    """Each unbind takes four seconds: within its deadline, and then beyond it."""
    machine = start("unbind=4s")
    prometheus = Prometheus(machine)
    fires_and_ends(prometheus, "GpuswitchStuck", lambda: start_switch(machine, "ToVfio"), nothing)
    until_state(machine, "vfio")
    ctl(machine, f"to-host {GPU}")
    machine.push("[deadlines]\nunbind = 1\n", "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    fires_and_ends(prometheus, "GpuswitchWedged", lambda: start_switch(machine, "ToVfio"), nothing)
    until_state(machine, "host")


def test_an_alert_for_a_failed_gpu(start: Start) -> None:
    machine = start(*(f"probe@{SOUND}#{nth}=EINVAL" for nth in (1, 2, 3)), config=GENTLE)
    fires_and_ends(
        Prometheus(machine),
        "GpuswitchFailed",
        lambda: ctl(machine, f"to-vfio {GPU}", check=False),
        lambda: ctl(machine, f"recover {GPU}"),
    )


def test_an_alert_for_a_gpu_that_does_not_come_home(start: Start) -> None:
    machine = start(f"probe@{GPU}#2=EINVAL", config=GENTLE)
    ctl(machine, f"to-vfio {GPU}")
    fires_and_ends(
        Prometheus(machine),
        "GpuswitchStaysOut",
        lambda: ctl(machine, f"to-host {GPU}", check=False),
        lambda: ctl(machine, f"to-host {GPU}"),
    )


def test_an_alert_for_a_gpu_that_is_not_where_it_is_wanted_at_boot(start: Start) -> None:
    machine = start(f"unbind@{SOUND}#1=EIO", config=f'{MANAGED}at_boot = "vfio"\n', scenario="plain")
    prometheus = Prometheus(machine)
    alert = 'ALERTS{alertname="GpuswitchMissedAtBoot", alertstate="firing"}'
    prometheus.until(alert)
    ctl(machine, f"to-vfio {GPU}")
    prometheus.until_not(alert)


def test_an_alert_for_switches_that_take_longer_than_usual(start: Start) -> None:
    """The eighth one to vfio does: there are those of before to compare it with."""
    machine = start(f"unbind@{SOUND}#15=4s")
    prometheus = Prometheus(machine)
    machine.sh("gpuswitchctl to-vfio 01:00.0; gpuswitchctl to-host 01:00.0;" * 7)
    fires_and_ends(prometheus, "GpuswitchSlow", lambda: ctl(machine, f"to-vfio {GPU}"), nothing)


def test_an_alert_for_a_service_that_stands_still_in_its_own_code(start: Start) -> None:
    """Nothing but a fault of ours makes it: one is put in. The watchdog ends it, and the next service answers."""
    program = f"ExecStart={PYTHON} /srv/stalling.py"
    machine = start()
    prometheus = Prometheus(machine)
    machine.push((INSIDE / "stalling.py").read_text(), "/srv/stalling.py")
    machine.sh(
        f"sed -i 's|^ExecStart=/[^ ]*|{program}|; $aWatchdogSec=5' {DROP_INS}/simulated.conf;"
        "systemctl daemon-reload; systemctl restart gpuswitchd"
    )
    # It gets no answer, and has to be there for as long as the service looks at who asks.
    ask = f"systemd-run --quiet busctl call {NAME} {path_of()} {NAME}.Gpu ToVfio 'a{{sv}}' 0"
    fires_and_ends(prometheus, "GpuswitchStalled", lambda: machine.sh(ask), lambda: until_restarted(machine))
    assert prop(machine, "State") == "host"
    assert "Failed with result 'watchdog'" in machine.sh("journalctl -u gpuswitchd -o cat").stdout


def test_alerts_for_what_goes_to_and_fro_and_for_what_is_refused_again_and_again(start: Start) -> None:
    machine = start()
    prometheus = Prometheus(machine)
    moves = "gpuswitchctl to-vfio 01:00.0; gpuswitchctl to-host 01:00.0;"
    fires_and_ends(prometheus, "GpuswitchFlapping", lambda: machine.sh(moves * 3), nothing)
    refused = f"busctl call {NAME} {path_of()} {NAME}.Gpu ToVfio 'a{{sv}}' 1 busy s x"
    fires_and_ends(
        prometheus, "GpuswitchRefused", lambda: machine.sh(f"for n in 1 2 3 4 5 6; do {refused} || :; done"), nothing
    )


def test_an_alert_for_a_service_that_is_down(start: Start) -> None:
    machine = start()
    fires_and_ends(
        Prometheus(machine),
        "GpuswitchDown",
        lambda: machine.sh("systemctl stop gpuswitchd"),
        lambda: machine.sh("systemctl start gpuswitchd"),
    )
