"""A network between containers: a bridge in a network namespace of its own, which nothing else is on."""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import Self

from tests.harness.containers.container import Container
from tests.harness.debian.tools import DIES_WITH_US, run

BRIDGE = "fleet"


def address_of(number: int) -> str:
    """That of a machine in the network: 1, 2 ..."""
    return f"10.97.{number >> 8}.{number & 255}"


class Network:
    """It is gone when this is closed, or with this process; so is each machine's end of it, with the machine."""

    def __init__(self) -> None:
        # It holds the namespace, and says when it is there.
        holder = ("unshare", "--net", "sh", "-c", "echo there; exec cat")
        self._holder = subprocess.Popen([*DIES_WITH_US, *holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"there\n"
        self._ip(self._holder.pid, "link", "add", BRIDGE, "type", "bridge")
        self._ip(self._holder.pid, "link", "set", BRIDGE, "up")

    def connect(self, machine: Container, number: int) -> str:
        """Give a machine an end of it; its address."""
        ours, address = f"host{number}", address_of(number)
        theirs = ("type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        self._ip(self._holder.pid, "link", "add", ours, *theirs)
        self._ip(self._holder.pid, "link", "set", ours, "master", BRIDGE, "up")
        self._ip(machine.pid, "address", "add", f"{address}/16", "dev", "eth0")
        self._ip(machine.pid, "link", "set", "eth0", "up")
        return address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.communicate()

    @staticmethod
    def _ip(pid: int, *words: str) -> None:
        """Run ip(8) in the network namespace of a process. Raises HarnessError."""
        run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *words])
