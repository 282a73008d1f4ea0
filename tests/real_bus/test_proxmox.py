"""The hookscript for Proxmox VE and the real service, with a simulated host: a virtual machine's whole life.

What stands in for qemu-server records what it would have taken by force: of a managed GPU that never is.
"""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.domains import table
from tests.harness.proxmox import NODE, WIN11, Node
from tests.harness.service.peers import Peer
from tests.harness.service.services import ANY_PORT, NAME, Service
from tests.harness.service.services import GPU as GPU_INTERFACE
from tests.real_bus.conftest import Start

GPU = "/org/gpuswitch1/gpu/0000_01_00_0"
MANAGED = ANY_PORT + table("0000:01:00.0")
ARCH = "name: arch\nhookscript: local:snippets/gpuswitch-hookscript\nhostpci0: 0000:01:00.0;0000:01:00.1,pcie=1\n"


@pytest.fixture
async def node(tmp_path: Path, private_bus: PrivateBus) -> AsyncIterator[Node]:
    """It reads the configuration that the service has, and sees its devices on their drivers."""

    async def driver_of(function: str) -> str:
        gpu = f"/org/gpuswitch1/gpu/{re.sub('[:.]', '_', function[:-1] + '0')}"
        async with Peer.on(private_bus.address) as peer:
            got = await peer.call(NAME, gpu, "org.freedesktop.DBus.Properties.Get", "ss", GPU_INTERFACE, "Functions")
        return str(next(driver for address, _, driver in got[1] if address == function))

    node = Node(tmp_path / "node", private_bus.address, driver_of)
    (node.folder / "etc/gpuswitch").rmdir()
    (node.folder / "etc/gpuswitch").symlink_to(tmp_path / "service/etc")
    node.device("0000:01:00.0", "0000:01:00.1")
    node.machine("101", WIN11)
    node.machine("102", ARCH)
    yield node
    await node.crash()


async def where(service: Service) -> tuple[str, str]:
    """State, and the name of the owner."""
    properties = await service.properties(GPU)
    return properties["State"], properties["Owner"][0]


async def test_a_machine_gets_the_gpu_and_gives_it_back(start: Start, node: Node) -> None:
    service = await start("laptop", config=MANAGED)
    for _ in range(2):
        assert await node.start("101") == "TASK OK\n"
        assert await where(service) == ("vfio", "win11 (101)")
        assert await node.stop("101") == ""
        await service.until_state(GPU, "host")
        assert await where(service) == ("host", "")
    assert node.forced == []
    assert node.log == ["pre-start", "post-start", "pre-stop", "post-stop"] * 2


async def test_one_whose_process_is_killed_gives_it_back(start: Start, node: Node) -> None:
    service = await start("laptop", config=MANAGED)
    assert await node.start("101") == "TASK OK\n"
    assert await node.dies("101") == ""
    await service.until_state(GPU, "host")


async def test_where_qemu_does_not_start_nobody_says_so_and_it_comes_home(start: Start, node: Node) -> None:
    """Nothing is run after a start that failed: who has not opened it within start_grace does not get it."""
    service = await start("laptop", config=f"{MANAGED}start_grace = 0.5\n")
    assert "TASK ERROR: start failed" in await node.start("101", qemu_fails=True)
    await service.until_state(GPU, "host")
    assert await where(service) == ("host", "")
    assert (node.log, node.forced) == (["pre-start"], [])


async def test_another_machine_is_refused_and_told_who_has_it(start: Start, node: Node) -> None:
    service = await start("laptop", config=MANAGED)
    assert await node.start("101") == "TASK OK\n"
    said = await node.start("102")
    assert said.startswith("gpuswitch: 0000:01:00.0 belongs to the virtual machine win11 (101): shut that down first\n")
    assert said.endswith("TASK ERROR: hookscript error for 102 on pre-start: exit code 1\n")
    assert await where(service) == ("vfio", "win11 (101)")
    assert node.forced == []


async def test_what_is_in_the_way_is_said_in_the_log_of_the_task(start: Start, node: Node) -> None:
    service = await start("single", config=f"{MANAGED}allow_boot_display = true\n")
    said = await node.start("101")
    assert said.startswith("gpuswitch: Xorg (pid ")
    assert said.count("\n") == 2
    assert await where(service) == ("host", "")
    assert node.forced == []


async def test_suspended_to_disk_it_goes_where_it_is_to_go_then(start: Start, node: Node) -> None:
    service = await start("laptop", config=f'{MANAGED}on_saved = "stay"\n')
    assert await node.start("101") == "TASK OK\n"
    assert await node.suspend("101") == ""
    while (await where(service))[1]:
        await service.signal()
    assert await where(service) == ("vfio", "")
    node.machine("101", WIN11)  # resumed: the lock is gone
    assert await node.start("101") == "TASK OK\n"
    assert await node.stop("101") == ""
    await service.until_state(GPU, "host")


async def test_after_a_crash_of_the_host_nothing_is_needed(start: Start, node: Node, tmp_path: Path) -> None:
    """/run is gone with it, so nobody has the GPU; its machine is started as ever."""
    service = await start("laptop", config=MANAGED)
    assert await node.start("101") == "TASK OK\n"
    await service.end(signal.SIGKILL)
    await node.crash()
    for page in sorted((tmp_path / "service/run").rglob("*"), reverse=True):
        page.rmdir() if page.is_dir() else page.unlink()
    service = await start("laptop", config=MANAGED)
    assert await where(service) == ("host", "")
    assert await node.start("101") == "TASK OK\n"
    assert await where(service) == ("vfio", "win11 (101)")
    assert await node.stop("101") == ""
    await service.until_state(GPU, "host")
    assert node.forced == []


async def test_the_service_ends_and_its_gpus_are_not_given_away(start: Start, node: Node) -> None:
    service = await start("laptop", config=MANAGED)
    await service.end(signal.SIGTERM)
    node.driver_of = None
    said = await node.start("101")
    assert said.startswith(
        "gpuswitch: cannot give 0000:01:00.0, 0000:01:00.1 to win11 (101): gpuswitchd is not running"
    )
    assert "run: systemctl start gpuswitchd\nTASK ERROR" in said
    node.device("0000:09:00.0")
    node.machine("103", ARCH.replace("0000:01:00.0;0000:01:00.1", "09:00.0"))
    assert (await node.start("103")).endswith("; run: systemctl start gpuswitchd\nTASK OK\n")


async def test_a_task_that_is_stopped_has_asked_for_nothing(start: Start, node: Node) -> None:
    service = await start("laptop", "unbind=0.5s", config=MANAGED)
    hook = await node.starting_hook("101", "pre-start")
    await service.until_state(GPU, "detaching")
    hook.kill()
    await hook.communicate()
    await service.until_state(GPU, "host")
    assert await where(service) == ("host", "")


async def test_a_mediated_device_leaves_the_gpu_on_its_driver(start: Start, node: Node) -> None:
    service = await start("laptop", config=MANAGED)
    node.machine("101", WIN11.replace("0000:01:00,pcie=1,x-vga=1", "0000:01:00.0,mdev=nvidia-63"))
    assert await node.start("101") == "TASK OK\n"
    assert await where(service) == ("host", "")


async def test_of_a_mapping_the_machines_get_different_cards(start: Start, node: Node) -> None:
    service = await start("plx", config=ANY_PORT + table("0000:27:00.0") + table("0000:28:00.0"))
    node.device("0000:27:00.0", "0000:28:00.0")
    node.mapping(
        f"gpu\n\tmap id=10de:2484,node={NODE},path=0000:27:00.0\n\tmap id=10de:2484,node={NODE},path=0000:28:00.0\n"
    )
    node.machine("101", "hookscript: x\nhostpci0: 0000:27:00,pcie=1\nhostpci1: 0000:28:00,pcie=1\n")
    assert await node.start("101") == "TASK OK\n"
    node.machine("102", "name: arch\nhookscript: x\nhostpci0: mapping=gpu\n")
    assert await node.start("102") == (
        "gpuswitch: cannot start arch (102): hostpci0: other machines have all devices of the mapping gpu\n"
        "TASK ERROR: hookscript error for 102 on pre-start: exit code 1\n"
    )
    assert await node.stop("101") == ""
    for gpu in (27, 28):
        while (await service.properties(f"/org/gpuswitch1/gpu/0000_{gpu}_00_0"))["State"] != "host":
            await service.signal()
    assert node.forced == []
