"""The agent of a Kubernetes node as a program: the real command and service below, a stand-in for the API above."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuswitch_kubernetes.decide import tainted
from gpuswitch_kubernetes.names import STATE

from tests.harness.buses.private import PrivateBus
from tests.harness.kubernetes.campaign import node, pod
from tests.harness.kubernetes.program import (
    agent,
    annotation,
    command,
    environ,
    kubeconfig,
    until,
    until_handled,
    want,
    word,
)
from tests.harness.kubernetes.server import ApiServer, serving
from tests.real_bus.conftest import Ctl, Start

PART = "0000_01_00_0"
CONFIG = '[metrics]\nenabled = false\n[[gpu]]\naddress = "0000:01:00.0"\n'


@pytest.fixture
def api() -> ApiServer:
    api = ApiServer()
    api.ending = False
    api.add(node())
    return api


@pytest.fixture
def config(api: ApiServer, tmp_path: Path) -> Iterator[Path]:
    with serving(api) as address:
        yield kubeconfig(tmp_path, address)


async def test_a_gpu_goes_where_the_annotation_wants_it(
    start: Start, private_bus: PrivateBus, api: ApiServer, config: Path, tmp_path: Path
) -> None:
    await start("plain", config=CONFIG)
    api.add(pod("work"))
    with agent(config, private_bus.address, tmp_path / "log"):
        want(api, PART, "vfio")
        there = await asyncio.to_thread(until_handled, api, PART, "vfio done")
        assert annotation(there, STATE + PART) == "vfio"
        assert api.store.list("pods") == []
        await asyncio.to_thread(until, api, lambda node: not tainted(node) and word(node) == "AsDesired")
        want(api, PART, "host")
        await asyncio.to_thread(until_handled, api, PART, "host done")


async def test_an_agent_and_a_service_that_are_killed_in_the_midst_move_no_gpu_twice(
    start: Start, ctl: Ctl, private_bus: PrivateBus, api: ApiServer, config: Path, tmp_path: Path
) -> None:
    service = await start("plain", "unbind=hang", config=CONFIG + "[deadlines]\nunbind = 600\n")
    with agent(config, private_bus.address, tmp_path / "log"):
        want(api, PART, "vfio")
        await asyncio.to_thread(until, api, lambda node: word(node) == "Switching")
    await service.end(signal.SIGKILL)
    await start("plain", config=CONFIG)
    with agent(config, private_bus.address, tmp_path / "log"):
        there = await asyncio.to_thread(
            until, api, lambda node: not tainted(node) and word(node) in ("Failed", "AsDesired")
        )
    assert word(there) == "Failed", "the new service has taken it back, and that is not tried again by itself"
    past = json.loads(ctl("history", "--json").stdout)["switches"]
    assert [entry["target"] for entry in past] == ["vfio"]


async def test_what_would_be_done_can_be_asked_for(
    start: Start, private_bus: PrivateBus, api: ApiServer, config: Path
) -> None:
    await start("plain", config=CONFIG)
    want(api, PART, "vfio")
    before = api.store.version
    done = await asyncio.to_thread(
        subprocess.run, command(config, "--dry-run"), env=environ(private_bus.address), capture_output=True, check=True
    )
    told = json.loads(done.stdout)
    [text] = [gpu["text"] for gpu in told["gpus"] if gpu["address"] == "0000:01:00.0"]
    assert (told["tainted"], text) == (True, "waits for the taint of its node")
    assert api.store.version == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--deadline", "0"], "'0' is no number of seconds above 0"),
        (["--switches", "-1"], "'-1' is no number above 0"),
        (["--evict-label", "app"], "'app' is no label: write KEY=VALUE"),
        (["--kubeconfig", "/nonexistent/config"], "cannot tell where the API server is"),
    ],
)
def test_bad_input_is_one_sentence(config: Path, words: list[str], said: str) -> None:
    done = subprocess.run(command(config, *words), env=environ(""), capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
