"""The Prometheus of a release, in a container of the same: scrapes the service, follows our rules, answers queries."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from tests.harness.containers.words import INSIDE, until
from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.downloads import find_downloads
from tests.harness.debian.releases import Release
from tests.harness.debian.roots import find_root
from tests.harness.machines.machine import COMMAND_SECONDS, Machine
from tests.harness.promtool import RULES

DOWNLOADED = "/srv/prometheus"
PROGRAMS = ("usr/bin/prometheus", "usr/bin/promtool")
FOLDER = "/run/prometheus"
DATA = "/srv/prometheus-data"
"""On a disk: of many nodes it is much."""
ASK = f"{FOLDER}/ask.py"

SECONDS = {"1m": "0s", "5m": "3s", "15m": "2s", "1h": "2s"}
"""How long a test waits for what `for` says in our rules."""
WINDOWS = {"15m": "10s", "1h": "10s", "7d": "1m"}
"""What a test has the ranges of our rules for."""


def find_prometheus(cache: Cache, release: Release) -> Path:
    """A layer with its programs, out of the package and all that it needs, which is unpacked first: about a minute."""
    with cache.lock():
        root = find_root(cache, "prometheus", release, ("prometheus",))

        def build(folder: Path) -> None:
            for program in PROGRAMS:
                (folder / program).parent.mkdir(parents=True, exist_ok=True)
                os.link(root / program, folder / program)

        return cache.make(f"prometheus-programs-{release.name}", content_key(root.parent.name, Path(__file__)), build)


def find_downloaded(cache: Cache, release: Release) -> Path:
    """A layer with its packages in the folder DOWNLOADED: what it takes on top of a bare system."""
    with cache.lock():
        return find_downloads(cache, "prometheus-packages", release, ("prometheus",), place=DOWNLOADED[1:])


def hasty(rules: str) -> str:
    """These rules for somebody in a hurry: shorter ranges and delays, three switches are many, a second is slow."""
    rules = re.sub(r"for: (\w+)", lambda found: f"for: {SECONDS[found[1]]}", rules)
    rules = re.sub(r"\[(\w+)\]", lambda found: f"[{WINDOWS[found[1]]}]", rules)
    for often, seldom in (
        ("> 20\n", "> 2\n"),
        ("mean7d > 5\n", "mean7d > 1\n"),
        ("interval: 4m\n", "interval: 500ms\n"),
    ):
        assert often in rules
        rules = rules.replace(often, seldom)
    return rules


def read(machine: Machine, url: str) -> str:
    """What is to be had there, for a program in this machine."""
    program = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"
    return machine.sh(f"python3 -ISE -c '{program}' {url}").stdout


class Queries:
    """What a Prometheus that runs in this machine answers."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.push((INSIDE / "ask.py").read_text(), ASK)
        until(machine, f"python3 -ISE {ASK} 'up' >/dev/null 2>&1")

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The series of an instant query, with their labels and values."""
        said = self._machine.sh(f"python3 -ISE {ASK} '{query}'", check=False).stdout
        return [(series["metric"], float(series["value"][1])) for series in json.loads(said)]

    def value(self, query: str) -> float:
        """Of a query that has one series."""
        [(_, value)] = self.ask(query)
        return value

    def until(self, query: str, *, timeout: float = COMMAND_SECONDS) -> None:
        """Wait until a query has a series."""
        until(self._machine, f"python3 -ISE {ASK} '{query}' >/dev/null", timeout=timeout)

    def until_not(self, query: str) -> None:
        until(self._machine, f"! python3 -ISE {ASK} '{query}' >/dev/null")


class Prometheus(Queries):
    """One that is started in this machine, and has scraped the service once when this returns."""

    def __init__(
        self,
        machine: Machine,
        scrape: Mapping[str, object] | None = None,
        *,
        interval: str = "500ms",
        rules: str = hasty(RULES.read_text()),
    ) -> None:
        """`scrape` are further keys of its job, such as `tls_config`."""
        job = {"job_name": "gpuswitch", "static_configs": [{"targets": ["127.0.0.1:9752"]}], **(scrape or {})}
        settings = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [f"{FOLDER}/rules.yml"],
            "scrape_configs": [job],
        }
        machine.push(json.dumps(settings), f"{FOLDER}/prometheus.yml")  # which is YAML
        machine.push(rules, f"{FOLDER}/rules.yml")
        options = f"--config.file={FOLDER}/prometheus.yml --storage.tsdb.path={DATA}"
        machine.sh(f"systemd-run --quiet --unit=prometheus prometheus {options} --web.listen-address=127.0.0.1:9090")
        super().__init__(machine)
        self.until('up{job="gpuswitch"} == 1')

    def own(self, name: str) -> float:
        """One of its own metrics; all series of it together."""
        told = read(self._machine, "http://127.0.0.1:9090/metrics")
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", told, re.MULTILINE))
