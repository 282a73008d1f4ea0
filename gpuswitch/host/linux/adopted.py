"""A worker of an earlier run of the service, which the kernel has not let go."""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Callable

from gpuswitch.host.linux import procfs
from gpuswitch.model.holders import Process


class AdoptedWorker:
    """It, and what it does. It ends when the kernel returns: its answer finds nobody. `ended` is called then, once."""

    def __init__(self, what: str, worker: Process, ended: Callable[[], None]) -> None:
        """Find it.

        Raises:
            ProcessLookupError: it has ended, whoever has its number now.
            OSError: nobody can tell.
        """
        self.what = what
        self.worker = worker
        self._told = ended
        try:
            self._pidfd = os.pidfd_open(worker.pid)
        except OverflowError:  # nobody can have had this number
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOENT}:  # a thread has this number now; ENOENT: newer kernels
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
            raise
        # Looked at through /proc only now, so both are the same process. A dead one is there until it is reaped.
        try:
            same = procfs.process(worker.pid) == worker and not _has_ended(self._pidfd)
        except OSError:
            os.close(self._pidfd)
            raise
        if not same:
            os.close(self._pidfd)
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._end)

    def _end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._told()


def _has_ended(pidfd: int) -> bool:
    """A pidfd is readable from then on."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
