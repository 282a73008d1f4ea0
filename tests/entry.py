"""What tests from outside this repository may import. These names stay, wherever the things behind them move.

`Tree` builds a sysfs tree, `link` a symbolic link in it; `linux_host` is the Linux host on such a tree,
`simulated_host` a machine in memory; `serve` runs the service on a host and a bus; `PciAddress` names a function.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpuswitch.api.bus import Bus
from gpuswitch.config.loading import load
from gpuswitch.daemon import Daemon
from gpuswitch.host.linux.host import LinuxHost
from gpuswitch.host.port import Host
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from tests.harness.sysfs_tree import Tree, link

__all__ = ["PciAddress", "Tree", "link", "linux_host", "serve", "simulated_host"]

_DEVICES = """Character devices:
  1 mem
226 drm

Block devices:
259 blkext
"""


def linux_host(tree: Tree) -> LinuxHost:
    """The Linux host on this tree, where no process runs: those of this machine play no part."""
    proc = tree.sys.parent / "proc"
    proc.mkdir(exist_ok=True)
    (proc / "devices").write_text(_DEVICES)
    (proc / "swaps").write_text("Filename Type Size Used Priority\n")
    return LinuxHost(replace(tree.roots, proc=str(proc)))


def simulated_host(scenario: str) -> SimulatedHost:
    """A machine in memory, by the name that `gpuswitchd --simulate` knows it by."""
    return SCENARIOS[scenario]()


async def serve(host: Host, bus: str, folder: Path) -> None:
    """Run the service on the bus of this address, until SIGTERM or the end of the bus.

    Its configuration is in `folder`/etc, where there is one; what it keeps is in `folder`/run and `folder`/state.
    """
    for name in ("run", "state"):
        (folder / name).mkdir(exist_ok=True)
    config = folder / "etc"
    connection = await Bus.connect(bus)
    await Daemon(host, load(config), config, connection, runtime=folder / "run", state=folder / "state").run()
