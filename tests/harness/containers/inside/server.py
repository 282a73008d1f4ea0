"""gpuswitchd whose simulated `server` has many GPUs.

server.py COUNT OPTION...       the options as gpuswitchd takes them, --simulate=server among them
"""

from __future__ import annotations

import sys
from functools import partial

from gpuswitch import service
from gpuswitch.host.simulated import catalogue as parts
from gpuswitch.host.simulated.catalogue import NVIDIA, Slot, port
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import SCENARIOS, boot


def server(gpus: int) -> SimulatedHost:
    """So many data centre GPUs, each in a domain of its own: `0001:01:00.0` and so on."""
    devices = []
    for number in range(1, gpus + 1):
        root = f"{number:04x}:00:01.0"
        slot = Slot(f"{number:04x}:01:00", 1000 + number, root)
        devices += [port(root, number), slot.function(0, NVIDIA, 0x20F1, parts.DISPLAY_3D, "GA100 [A100 PCIe 40GB]")]
    return boot(devices)


def main() -> int:
    """Run the service; returns its exit status."""
    count, *options = sys.argv[1:]
    assert isinstance(SCENARIOS, dict)
    SCENARIOS["server"] = partial(server, int(count))
    return service.main(options)


if __name__ == "__main__":
    sys.exit(main())
