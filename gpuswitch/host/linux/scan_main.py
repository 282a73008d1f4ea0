r"""The scanner: a small program that looks who has a device open, which may block for ever.

Run as `python -ISE scan_main.py SYSFS DEV PROC` with a SOCK_SEQPACKET socket as its standard input. One message is one
request, an object in JSON: `functions`, `nodes` and `numbers` as in `gpuswitch.model.holders.HolderQuery`; `modules`,
each with the nodes that all its devices share. The answer is an object too, in as many messages as it needs: the last
one begins with `.`, the others with `+`. It has the `numbers` that were looked for, and `holders`, each with `pid` (0:
the kernel), `started`, `command`, `uid`, `user`, `cgroup` (the text of /proc/PID/cgroup), `nodes`, `doubt` and
`machine`; or an `error`, its number and its text. The program ends at end-of-file, that is when the service let it go
or died. The service itself and its workers, that is its parent and its siblings, are no holders.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TypedDict

# The options leave out every folder but the standard library's. Ours comes last, so that nothing beside it hides that.
sys.path.append(__file__.rsplit("/", 4)[0])

from gpuswitch.host.linux.scanning.devices import Devices
from gpuswitch.host.linux.scanning.files import is_gone
from gpuswitch.host.linux.scanning.identity import Who, who
from gpuswitch.host.linux.scanning.kernel import Client, mounted
from gpuswitch.host.linux.scanning.modules import Modules
from gpuswitch.host.linux.scanning.open_files import MACHINE_NODES, Opened, Seen, Wanted, look
from gpuswitch.host.linux.scanning.split import in_two

LONGEST_REQUEST = 1 << 18
MOST_LOOKS = 5
"""For one request, while what uses a module changes."""
_PIECE = 1 << 15
_WORKER = f"{__file__.rpartition('/')[0]}/worker_main.py"


class _Found(TypedDict):
    opened: list[tuple[str, int, int]]
    mapped: list[str]
    holders: list[dict[str, Any]]


class Scan:
    """One look at everybody."""

    def __init__(self, sysfs: str, dev: str, proc: str, request: dict[str, Any]) -> None:
        self._proc = proc
        self._devices = Devices(sysfs, dev, proc)
        self._modules = Modules(sysfs, self._devices, request["modules"])
        self._numbers = self._devices.of_nodes(request["nodes"]).union(
            request["numbers"], *map(self._devices.of_function, request["functions"])
        )
        # Those whose users are no holders, but explain who holds a module.
        self._others = self._modules.numbers - self._numbers
        wanted = frozenset(self._numbers | self._others)
        machines = frozenset(self._devices.of_nodes(MACHINE_NODES))
        vfio = any(node.startswith("vfio/") for node in request["nodes"])
        self._wanted = Wanted(proc, sysfs, wanted, frozenset(request["functions"]), machines, vfio)
        self._service = os.getppid()
        self.unexplained = False
        """Whether a module had more users than there were processes that have it open."""

    @property
    def moved(self) -> bool:
        """Whether a module has other users than when this look began."""
        return self._modules.moved

    def run(self) -> dict[str, object]:
        pids = self._pids()
        looks = [*in_two(self._look, sorted(pids))]
        # What one of them had open may be open in a child alone by now.
        looks.append(self._look(sorted(self._pids() - pids)))
        opened = [Opened(*row) for found in looks for row in found["opened"]]
        clients = mounted(self._proc, self._numbers)
        unexplained = {*self._modules.unexplained(opened, {number for found in looks for number in found["mapped"]})}
        self.unexplained = bool(unexplained)
        clients.update(unexplained)
        holders = [*map(_client, clients), *(holder for found in looks for holder in found["holders"])]
        names = self._devices.names({number for holder in holders for number in holder["nodes"]})
        for holder in holders:
            holder["nodes"] = sorted(names.get(number, number) for number in holder["nodes"])
        return {"numbers": sorted(self._numbers), "holders": holders}

    def _pids(self) -> set[str]:
        """All processes, but this one and the service."""
        names = {entry.name for entry in os.scandir(self._proc) if entry.name.isdigit()}
        return names - {str(os.getpid()), str(self._service)}

    def _look(self, pids: Sequence[str]) -> _Found:
        """Who of these has something, the nodes still being numbers; and what explains who holds a module."""
        found, stuck = look(self._wanted, pids, self._judged)
        holders = [holder for _, holder in found] + [self._stuck(pid) for pid in stuck]
        return {
            "opened": [(it.number, it.task, it.descriptor) for seen, _ in found for it in seen.opened],
            "mapped": [number for seen, _ in found for number in seen.mapped],
            "holders": [holder for holder in holders if holder is not None],
        }

    def _judged(self, seen: Seen) -> tuple[Seen, dict[str, Any] | None]:
        """With who it is, where it is a holder."""
        numbers = ({it.number for it in seen.opened} | seen.mapped) - self._others
        if not numbers and not seen.doubt:
            return seen, None
        return seen, self._holder(seen, numbers, who(seen.folder))

    def _holder(self, seen: Seen, numbers: set[str], it: Who | None) -> dict[str, Any] | None:
        if it is None or it.empty or (it.parent == self._service and _WORKER in it.arguments):
            return None
        said = {key: getattr(it, key) for key in ("started", "command", "uid", "user", "cgroup")}
        return {"pid": seen.pid, **said, "nodes": list(numbers), "doubt": seen.doubt, "machine": seen.machine}

    def _stuck(self, pid: str) -> dict[str, Any] | None:
        """One that did not let itself be looked at: what it has mapped is nowhere else to be seen."""
        try:
            folder = os.open(f"{self._proc}/{pid}", os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if is_gone(error):
                return None
            raise
        try:
            doubt = "it is stuck in the kernel, or was looked at for too long"
            it = who(folder, sparing=True)
            ours = it is not None and it.parent == self._service
            return None if ours else self._holder(Seen(int(pid), folder, doubt=doubt), set(), it)
        finally:
            os.close(folder)


def _client(client: Client) -> dict[str, Any]:
    nobody = {"pid": 0, "started": 0, "uid": 0, "user": "", "cgroup": ""}
    return {
        **nobody,
        "command": client.command,
        "nodes": [client.number] if client.number else [],
        "doubt": client.doubt,
        "machine": False,
    }


def scanned(sysfs: str, dev: str, proc: str, request: dict[str, Any]) -> dict[str, object]:
    """Who has what was asked for.

    Who opened or closed a device meanwhile looks like a user of the kernel's own: a second look tells, or a further one
    where somebody still does, as a WirePlumber that has just started does for a second with each card.
    """
    looks = 0
    while True:
        scan = Scan(sysfs, dev, proc, request)
        found = scan.run()
        looks += 1
        if not scan.unexplained or (looks > 1 and not scan.moved) or looks == MOST_LOOKS:
            return found


def answer(sysfs: str, dev: str, proc: str, request: bytes) -> bytes:
    try:
        return json.dumps(scanned(sysfs, dev, proc, json.loads(request))).encode()
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return json.dumps({"error": [error.errno, text]}).encode()


def main() -> None:
    sysfs, dev, proc = sys.argv[1:4]
    try:
        while request := os.read(0, LONGEST_REQUEST):
            rest = answer(sysfs, dev, proc, request)
            while len(rest) > _PIECE:
                os.write(0, b"+" + rest[:_PIECE])
                rest = rest[_PIECE:]
            os.write(0, b"." + rest)
    except ConnectionError:  # the service went away, or does not wait for this any longer
        return


if __name__ == "__main__":
    main()
