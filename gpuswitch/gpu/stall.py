"""A kernel that does not return from what one GPU's worker sent it: told, explained, and waited for."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from gpuswitch.errors import Failed, KernelError
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.gpu.wedged import first_words, report
from gpuswitch.host.port import Host, Kernel, Pending
from gpuswitch.log.events import WEDGED
from gpuswitch.log.fields import told
from gpuswitch.model.holders import Holder, HolderQuery
from gpuswitch.runtime.pause import Pause
from gpuswitch.switch.engine import StuckError
from gpuswitch.switch.journal.journal import Entry

_log = logging.getLogger(__name__)


class Stall:
    """Of one GPU, as often as it comes to that."""

    def __init__(self, record: GpuRecord, host: Host, kernel: Kernel) -> None:
        self._record = record
        self._processes = host.processes
        self._kernel = kernel
        self._explaining: asyncio.Task[None] | None = None
        self._in_doubt: Pending | None = None
        """What an earlier run of the service had sent, while nobody can tell whether it is over."""

    def begin(self, stuck: StuckError, numbers: tuple[str, ...]) -> None:
        """It is wedged; `numbers` are those of its device nodes, which sysfs may not show any more."""
        record, gpu = self._record, self._record.gpu.address
        record.fire("stuck")
        record.facts = record.fresh_facts_if_possible()
        record.reason = first_words(gpu, stuck)
        stack = "".join(f"\n  {function}" for function in stuck.pending.stack)
        _log.critical("%s: %s%s", gpu, stuck, stack, extra=told(WEDGED, GPU=gpu))
        try:
            record.page.write(replace(record.page.entry, stuck=stuck.pending))
        except Failed as error:
            _log.error(
                "a service that starts anew will not know that %s is wedged: %s", gpu, error, extra=told(GPU=gpu)
            )
        self._explaining = asyncio.create_task(self._explain(stuck, numbers))

    async def _explain(self, stuck: StuckError, numbers: tuple[str, ...]) -> None:
        """Find out who could make it return."""
        record, gpu = self._record, self._record.gpu
        holders: tuple[Holder, ...] | None = None
        try:
            async with asyncio.timeout(record.config.deadlines.holders):
                holders = (await self._processes.scan(HolderQuery(gpu.functions, numbers=numbers))).holders
        except (KernelError, TimeoutError) as error:
            _log.warning("cannot tell who has %s open: %s", gpu.address, error, extra=told(GPU=gpu.address))
        nvidia = record.facts.modules.get("nvidia")
        version = nvidia.version if nvidia else ""
        record.say_why(report(gpu.address, stuck, holders, version, record.restore_state.units))

    def left_behind(self, entry: Entry) -> Pending | None:
        """What an earlier run of the service had sent, and the kernel still has or may have."""
        if (pending := self._kernel.pending) is not None:
            return pending
        left, unfinished = entry.stuck, entry.unfinished
        if left is None and unfinished is not None and unfinished.worker is not None:
            left = Pending(unfinished.title, worker=unfinished.worker)
        if left is None:
            return None
        try:
            return (self._kernel.pending or left) if self._kernel.adopt(left) else None
        except KernelError as error:
            gpu = self._record.gpu.address
            _log.error("%s: cannot tell whether '%s' is over: %s", gpu, left.what, error, extra=told(GPU=gpu))
            self._in_doubt = left
            return left

    async def until_returned(self) -> None:
        """Until the kernel has returned; nobody looks for who is in its way any more."""
        await self._until_certain()
        await self._kernel.returned()
        if self._explaining is not None:
            self._explaining.cancel()

    async def _until_certain(self) -> None:
        """Until it is known whether what is in doubt is over."""
        pause = Pause()
        while self._in_doubt is not None:
            await pause.wait()
            with suppress(KernelError):
                self._kernel.adopt(self._in_doubt)
                self._in_doubt = None
