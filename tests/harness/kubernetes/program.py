"""The agent as a program, against the stand-in and the service behind some bus."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gpuswitch_kubernetes.cluster import condition_of
from gpuswitch_kubernetes.names import DESIRED, HANDLED

from tests.harness.debian.tools import PROJECT
from tests.harness.kubernetes.campaign import NODE
from tests.harness.kubernetes.fields import Object
from tests.harness.kubernetes.server import ApiServer
from tests.harness.service.services import BIN, environment

KEY = ("nodes", "", NODE)
LONGEST_SECONDS = 50.0
"""For what the agent does: less than a test has."""


def kubeconfig(folder: Path, address: str) -> Path:
    """A file that leads to the stand-in."""
    file = folder / "kubeconfig"
    context = {"name": "stand-in", "context": {"cluster": "stand-in", "user": "agent"}}
    cluster = {"name": "stand-in", "cluster": {"server": address}}
    users = [{"name": "agent", "user": {}}]
    whole = {"apiVersion": "v1", "kind": "Config", "current-context": "stand-in"}
    file.write_text(json.dumps(whole | {"contexts": [context], "clusters": [cluster], "users": users}))
    return file


def command(config: Path, *more: str) -> list[str]:
    program = [sys.executable, "-m", "gpuswitch_kubernetes", "--node", NODE, "--kubeconfig", str(config)]
    return [*program, "--gpuswitchctl", str(BIN / "gpuswitchctl"), *more]


def environ(bus: str) -> dict[str, str]:
    return environment(GPUSWITCH_BUS=bus, PYTHONPATH=str(PROJECT / "contrib/kubernetes"))


@contextmanager
def agent(config: Path, bus: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that runs, and is killed in the end."""
    with log.open("ab") as said, subprocess.Popen(command(config), env=environ(bus), stderr=said) as process:
        try:
            yield process
        finally:
            process.kill()


def want(api: ApiServer, part: str, desire: str) -> None:
    """Annotate the node as a person would."""
    api.change(KEY, lambda each: each["metadata"].setdefault("annotations", {}).update({DESIRED + part: desire}))


def until(api: ApiServer, holds: Callable[[Object], bool]) -> Object:
    """Wait until the node is so; as it is then. A test waits in a thread, which its own time limit cannot end."""
    with api.store.lock:
        if not api.store.lock.wait_for(lambda: holds(api.store.objects[KEY]), timeout=LONGEST_SECONDS):
            raise AssertionError(f"the node is not so after {LONGEST_SECONDS:g} s: {api.store.objects[KEY]}")
        return api.store.get(KEY)


def annotation(node: Mapping[str, Object], name: str) -> str:
    return str((node["metadata"].get("annotations") or {}).get(name, ""))


def until_handled(api: ApiServer, part: str, note: str) -> Object:
    return until(api, lambda node: annotation(node, HANDLED + part) == note)


def word(node: Object) -> str:
    """Why the condition is as it is."""
    condition = condition_of(node)
    return "" if condition is None else str(condition["reason"])
