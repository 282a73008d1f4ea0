"""Prometheus on this machine: whether it asks the service for its metrics, and whether it has the alerts.

Of its configuration only what is written as people write it is understood: a list of words a line each, or in brackets.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.seen import Prometheus

CONFIGURATION = "/etc/prometheus/prometheus.yml"
"""Where the packages of Debian, Fedora and Arch have it."""
_RULES = "share/gpuswitch/prometheus/gpuswitch.rules.yml"
_JOB = re.compile(r"""^\s*(?:-\s+)?job_name:\s*(["']?)gpuswitch\1\s*(?:#.*)?$""", re.MULTILINE)
_ALERT = re.compile(r"^\s*-\s+alert:\s*GpuswitchDown\b", re.MULTILINE)
"""One of our alerts, in whatever file somebody has them."""


def look(files: Files) -> Prometheus:
    text = files.text(CONFIGURATION)
    return Prometheus(files.there(CONFIGURATION), has_job(files, text), has_alerts(files, text))


def has_job(files: Files, text: str) -> bool:
    """Whether a configuration with this text, or a file that it names, has a job `gpuswitch`."""
    texts = (files.text(place) for place in _matched(files, listed(text, "scrape_config_files")))
    return any(_JOB.search(each) for each in (text, *texts))


def has_alerts(files: Files, text: str) -> bool:
    """Whether a configuration with this text names a file that has our alerts."""
    return any(_ALERT.search(files.text(place)) for place in _matched(files, listed(text, "rule_files")))


def rules(files: Files) -> str:
    """Where the alerts of this installation lie (contrib/install.sh); "" nowhere."""
    prefix = Path(sys.prefix)
    folders = (prefix, *prefix.parents, Path("/usr/local"), Path("/usr"))
    return next((str(each / _RULES) for each in folders if files.there(str(each / _RULES))), "")


def listed(text: str, key: str) -> Iterator[str]:
    """The words in the list of a key at the left margin."""
    inside = False
    for line in text.splitlines():
        if line[:1] not in {" ", "\t", "-", "#", ""}:
            name, _, rest = line.partition(":")
            inside = name.strip() == key
            if inside and (brackets := re.match(r"\s*\[(.*)\]", rest)):
                yield from filter(None, (each.strip().strip("\"'") for each in brackets[1].split(",")))
        elif inside and (item := re.match(r"\s*-\s+([^#]+)", line)):
            yield item[1].strip().strip("\"'")


def _matched(files: Files, patterns: Iterable[str]) -> Iterator[str]:
    """The files that are meant: their names count from the folder of the configuration (config.go, SetDirectory)."""
    root = files.machine.root
    for pattern in patterns:
        whole = pattern if pattern.startswith("/") else str(Path(CONFIGURATION).parent / pattern)
        yield from (place.removeprefix(root) for place in sorted(glob.glob(f"{root}{whole}")))  # noqa: PTH207 -- of the places that the looks have
