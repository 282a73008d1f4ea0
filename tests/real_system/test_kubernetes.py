"""The agent of a Kubernetes node over the bus of a whole system, as in a pod that has its socket mounted."""

from __future__ import annotations

from pathlib import Path

from gpuswitch_kubernetes.decide import tainted
from gpuswitch_kubernetes.names import STATE

from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, history, simulated
from tests.harness.kubernetes.campaign import node, pod
from tests.harness.kubernetes.program import agent, annotation, kubeconfig, until, until_handled, want, word
from tests.harness.kubernetes.server import ApiServer, serving
from tests.real_system.conftest import Boot

PART = "0000_01_00_0"
CONFIG = f'[[gpu]]\naddress = "{GPU}"\n'


def test_a_node_gives_a_gpu_away_and_gets_it_back(boot: Boot, system: System, tmp_path: Path) -> None:
    """Root may do it, though the bus is in other namespaces than the agent."""
    files = simulated(scenario="plain") | {"/etc/gpuswitch/config.toml": CONFIG}
    machine = boot(system.installed, files)
    socket = Path("/proc", str(machine.pid), "root", "run/dbus/system_bus_socket")
    api = ApiServer()
    api.ending = False
    api.add(node())
    api.add(pod("work"))
    with serving(api) as address, agent(kubeconfig(tmp_path, address), f"unix:path={socket}", tmp_path / "log"):
        want(api, PART, "vfio")
        there = until_handled(api, PART, "vfio done")
        assert annotation(there, STATE + PART) == "vfio"
        until(api, lambda node: not tainted(node))
        assert history(machine) == [("vfio", "done")]
        assert api.store.list("pods") == []
        machine.sh("systemctl restart gpuswitchd")
        want(api, PART, "host")
        until_handled(api, PART, "host done")
        until(api, lambda node: not tainted(node) and word(node) == "AsDesired")
        assert history(machine)[0] == ("host", "done")
