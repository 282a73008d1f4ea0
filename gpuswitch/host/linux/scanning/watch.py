"""Work on one process after the other, watched: one that cannot be looked at is left behind, and the rest goes on.

To read the mappings or the command line of a process takes its mmap lock (fs/proc/task_mmu.c, mm/memory.c), which
somebody may hold who sits in the kernel; to learn a user's name may take a server.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

STUCK_SECONDS = 2.0
"""Without any progress: to look at one descriptor takes microseconds."""
_Found = TypeVar("_Found")
_Told_co = TypeVar("_Told_co", covariant=True)


class Looker(Protocol[_Told_co]):
    """Looks at one process after the other; `ticks` grow all the while."""

    ticks: int

    def process(self, pid: str, tell: Callable[[_Told_co], None]) -> None:
        """Look at it, and tell what was found, if anything."""


class _Run(threading.Thread, Generic[_Found]):
    """`reached` of the processes are done; `fault` is what went wrong with the one after them."""

    def __init__(self, looker: Looker[_Found], pids: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self._looker = looker
        self._pids = pids
        self.found: list[_Found] = []
        self.reached = 0
        self.fault: Exception | None = None
        self.given_up = False

    def run(self) -> None:
        try:
            for pid in self._pids:
                if self.given_up:
                    return
                self._looker.process(pid, self.found.append)
                self.reached += 1
        except Exception as fault:  # noqa: BLE001 -- whatever it is, it is told to who started this
            self.fault = fault

    def watch(self) -> None:
        """Until it is over, or gets stuck."""
        while self.is_alive():
            before = self._looker.ticks
            self.join(STUCK_SECONDS)
            if self.is_alive() and self._looker.ticks == before:
                self.given_up = True
                return


def in_turn(looker: Callable[[], Looker[_Found]], pids: Sequence[str]) -> tuple[list[_Found], list[str]]:
    """What was found, and the processes that did not let themselves be looked at. Raises what a look raised."""
    found: list[_Found] = []
    stuck: list[str] = []
    left = list(pids)
    while left:
        run = _Run(looker(), left)
        run.start()
        run.watch()
        if run.fault is not None:
            raise run.fault
        reached = run.reached
        found += run.found
        stuck += left[reached : reached + 1]
        left = left[reached + 1 :]
    return found, stuck
