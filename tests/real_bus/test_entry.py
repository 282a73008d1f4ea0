"""What tests from outside may import does what it says: `tests/entry.py`."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from gpuswitch.api.paths import NAME, path_of
from tests.entry import PciAddress, Tree, link, linux_host, serve, simulated_host
from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import Peer

_DBUS = "org.freedesktop.DBus"
_GPU = PciAddress.parse("0000:01:00.0")


async def served(peer: Peer, running: asyncio.Task[None]) -> None:
    """Wait until the service has its name."""
    async with peer.hear(_DBUS) as heard:
        while not await peer.call(_DBUS, "/org/freedesktop/DBus", f"{_DBUS}.NameHasOwner", "s", NAME):
            news = asyncio.create_task(heard.get())
            await asyncio.wait([news, running], return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            assert not running.done(), running.exception()


async def driver(peer: Peer) -> object:
    _, value = await peer.call(
        NAME, path_of(_GPU), "org.freedesktop.DBus.Properties.Get", "ss", f"{NAME}.Gpu", "HostDriver"
    )
    return value


def quiet(folder: Path) -> None:
    """Without the port for metrics, which there is only one of."""
    (folder / "etc").mkdir()
    (folder / "etc/config.toml").write_text("[metrics]\nenabled = false\n")


async def test_the_service_on_a_sysfs_tree(private_bus: PrivateBus, peer: Peer, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "machine")
    tree.driver("nouveau")
    path = tree.function(str(_GPU), driver="nouveau", group=1)
    link(path / "subsystem", tree.sys / "bus/pci")
    quiet(tmp_path)
    running = asyncio.create_task(serve(linux_host(tree), private_bus.address, tmp_path))
    await served(peer, running)
    assert await driver(peer) == "nouveau"
    os.kill(os.getpid(), signal.SIGTERM)
    await running


async def test_the_service_on_a_machine_in_memory(private_bus: PrivateBus, peer: Peer, tmp_path: Path) -> None:
    quiet(tmp_path)
    running = asyncio.create_task(serve(simulated_host("laptop"), private_bus.address, tmp_path))
    await served(peer, running)
    assert await driver(peer) == "nvidia"
    os.kill(os.getpid(), signal.SIGTERM)
    await running
