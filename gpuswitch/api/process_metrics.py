"""What the service itself uses: the client library's process metrics, and the processes below this one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuswitch.api.families import PROCESSES, PROCESSES_MEMORY

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def with_processes(registry: CollectorRegistry) -> CollectorRegistry:
    """Another registry, of all that this one has and of what the service uses."""
    everything = CollectorRegistry()
    everything.register(registry)
    ProcessCollector(registry=everything)
    GCCollector(registry=everything)
    PlatformCollector(registry=everything)
    everything.register(_ProcessTree())
    return everything


class _ProcessTree(Collector):
    """This process and those below it, from /proc.

    What is read there takes no lock that a process stuck in the kernel may have (proc_pid_statm in fs/proc/array.c,
    children_seq_show in the same). Where a kernel has no CONFIG_PROC_CHILDREN, this process is all that is seen.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def collect(self) -> Iterable[Metric]:
        sizes = list(self._sizes(os.getpid()))
        return [
            GaugeMetricFamily(PROCESSES.name, PROCESSES.help, value=len(sizes)),
            GaugeMetricFamily(PROCESSES_MEMORY.name, PROCESSES_MEMORY.help, value=sum(sizes)),
        ]

    def _sizes(self, pid: int) -> Iterator[int]:
        """The resident bytes of each; one that ends meanwhile is none any more."""
        folder = self._proc / str(pid)
        try:
            yield int((folder / "statm").read_text().split()[1]) * _PAGE_BYTES
            children = [child for file in folder.glob("task/*/children") for child in file.read_text().split()]
        except OSError:
            return
        for child in children:
            yield from self._sizes(int(child))
