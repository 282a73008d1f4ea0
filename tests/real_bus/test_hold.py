"""`gpuswitchctl hold`: a GPU is on vfio as long as it runs. The real command, the real service, a simulated host."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.harness.service.services import ANY_PORT, ROOT, Service
from tests.real_bus.conftest import CTL, Ctl, Start

CARD = "0000:01:00.0"
DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
CONFIG = f'{ANY_PORT}[[gpu]]\naddress = "{CARD}"\nname = "rtx-3070"\n'
TITLE = f"rtx-3070 ({CARD})"
HOLDS = f"{TITLE} is on vfio; it comes home when this ends\n"

Process = asyncio.subprocess.Process
Begin = Callable[..., Awaitable[Process]]


@pytest.fixture
async def begin(environ: dict[str, str]) -> AsyncIterator[Begin]:
    """Start gpuswitchctl hold; it has said that it has the GPU when this returns."""
    begun: list[Process] = []

    async def begin(*arguments: str) -> Process:
        pipe = asyncio.subprocess.PIPE
        command = (CTL, "hold", *arguments)
        process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=pipe, stderr=pipe)
        begun.append(process)
        assert process.stdout is not None
        assert (await process.stdout.readline()).decode() == HOLDS
        return process

    yield begin
    for process in begun:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def look(service: Service) -> tuple[str, str]:
    """Its state, and whose it is, without the number of the process."""
    properties = await service.properties(DISCRETE)
    return str(properties["State"]), str(properties["Owner"][0]).partition(" (pid ")[0]


async def pid_of_owner(service: Service) -> int:
    return int(str((await service.properties(DISCRETE))["Owner"][0]).rpartition("(pid ")[2].rstrip(")"))


async def ended(process: Process) -> tuple[int | None, str]:
    _said, told = await process.communicate()
    return process.returncode, told.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_it_is_on_vfio_meanwhile_and_home_afterwards(number: int, start: Start, begin: Begin) -> None:
    service = await start("laptop", config=CONFIG)
    process = await begin("rtx-3070")
    assert await look(service) == ("vfio", "gpuswitchctl hold")
    process.send_signal(number)
    assert await ended(process) == (0, "")
    assert await look(service) == ("host", "")


async def test_it_is_killed(start: Start, begin: Begin) -> None:
    service = await start("laptop", config=CONFIG)
    process = await begin()
    process.kill()
    await service.until_state(DISCRETE, "host")


async def test_what_the_service_names_as_remedy_ends_it_in_order(start: Start, begin: Begin, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    process = await begin()
    pid = await pid_of_owner(service)
    refused = ctl("to-host")
    assert (refused.returncode, f"end that first: kill {pid}" in refused.stderr) == (3, True)
    os.kill(pid, signal.SIGTERM)
    assert await ended(process) == (0, f"gpuswitchctl: process {pid}, which has {TITLE}, was ended\n")
    assert await look(service) == ("host", "")


async def test_one_that_is_lost_ends_it(start: Start, begin: Begin) -> None:
    """A simulated host begins anew with its service: there the GPU is on nvidia."""
    first = await start("laptop", config=CONFIG)
    process = await begin()
    first.process.kill()
    await first.process.wait()
    second = await start("laptop", config=CONFIG)
    status, told = await ended(process)
    [*gone, lost] = told.splitlines()
    # Whoever looks only when the second is there has not heard of the end of the first.
    assert (status, tuple(gone)) in {(1, ()), (1, (f"gpuswitchctl: the service has ended; {TITLE} stays on vfio",))}
    # What it had changed is given back meanwhile.
    assert lost in {f"gpuswitchctl: lost {TITLE}: it is {state} now" for state in ("reattaching", "host")}
    await second.until_state(DISCRETE, "host")


async def test_it_ends_while_there_is_no_service(start: Start, begin: Begin) -> None:
    service = await start("laptop", config=CONFIG)
    process = await begin()
    service.process.kill()
    await service.process.wait()
    process.terminate()
    status, told = await ended(process)
    assert status == 0
    assert told.endswith("the service does not run; the service brings home what it had as soon as it can\n")


async def test_a_unit_names_its_gpu(start: Start, begin: Begin, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    for instance in (r"rtx\x2d3070", "rtx-3070", "0000:01:00.0"):
        process = await begin("--unit", f"gpuswitch-vfio@{instance}.service")
        assert await look(service) == ("vfio", f"gpuswitch-vfio@{instance}.service")
        second = ctl("hold", "--unit", "gpuswitch-vfio@01:00.1.service")
        assert second.returncode == 3
        assert f"{CARD} belongs to process gpuswitch-vfio@{instance}.service (pid " in second.stderr
        process.terminate()
        assert await ended(process) == (0, "")


REFUSED = {
    "no such GPU": (["radeon"], 2, "cannot keep radeon on vfio: no GPU is named 'radeon'"),
    "no instance": (["--unit", "gpuswitch-vfio@.service"], 2, "write it like gpuswitch-vfio@rtx3070.service"),
    "an instance that is no GPU": (["--unit", r"gpuswitch-vfio@a\x20b.service"], 2, "no GPU is named 'a b'"),
    "no unit to stop": (["--stop-unit", "x y"], 2, "'x y' is not the name of a unit"),
    "a GPU and a unit": (["rtx-3070", "--unit", "gpuswitch-vfio@x.service"], 2, "leave one of them out"),
    "JSON": (["--json"], 2, "hold prints nothing for programs: leave --json out"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_done_changes_nothing(case: str, start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=CONFIG)
    arguments, status, words = REFUSED[case]
    refused = ctl("hold", *arguments)
    assert (refused.returncode, words in refused.stderr) == (status, True), refused.stderr
    assert "Traceback" not in refused.stderr
    assert await look(service) == ("host", "")
    assert json.loads(ctl("history", "--json").stdout)["switches"] == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_one_that_is_ended_before_it_has_it_takes_all_back(
    number: int, status: int, start: Start, environ: dict[str, str]
) -> None:
    service = await start("laptop", "unbind=1s", config=CONFIG)
    process = await asyncio.create_subprocess_exec(CTL, "hold", env=environ, stderr=asyncio.subprocess.PIPE)
    await service.until_state(DISCRETE, "detaching")
    process.send_signal(number)
    assert (await ended(process))[0] == status
    await service.until_state(DISCRETE, "host")


async def test_systemd_is_told(start: Start, environ: dict[str, str], tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        more = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        process = await asyncio.create_subprocess_exec(
            CTL, "hold", env={**environ, **more}, stdout=asyncio.subprocess.DEVNULL
        )
        told: list[str] = []
        while not told or not told[-1].startswith("READY=1\n"):
            told.append((await asyncio.get_running_loop().sock_recv(systemd, 4096)).decode())
        assert told[0] == f"STATUS=waiting for {TITLE}"
        assert [each for each in told if each.startswith(f"STATUS={TITLE}: [ 1/")] != []
        assert told[-1] == f"READY=1\nSTATUS={TITLE} is on vfio"
        process.terminate()
        assert await process.wait() == 0
        while told[-1] != f"STATUS={TITLE} is on its way home":
            told.append((await asyncio.get_running_loop().sock_recv(systemd, 4096)).decode())
