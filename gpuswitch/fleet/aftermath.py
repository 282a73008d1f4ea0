"""What becomes of a GPU that went home while libvirt still has it in its books: libvirt could not be had in time.

libvirt resets it by the bus when it does start, under the host drivers (`books`), and nothing of the kernel's shows
that. So its registers are looked at, and whoever asks is told.
"""

from __future__ import annotations

import logging

from gpuswitch.errors import KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.operation import seconds_for
from gpuswitch.host.port import Host, Kernel
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.runtime.pause import LateError, Pause, answered
from gpuswitch.switch.shared.books import machines_with, watching

_log = logging.getLogger(__name__)


class Aftermath:
    """Of one GPU that is home."""

    def __init__(self, actor: Actor, host: Host) -> None:
        self._actor = actor
        self._host = host
        self._pause = Pause()
        self._said = ""

    async def follow(self) -> None:
        """Until libvirt is done with it. It may have left home by then: what is on vfio is not reset."""
        unread = False
        while True:
            with watching(self._host.libvirt, self._pause) as change:
                try:
                    machines = machines_with(self._host.libvirt, self._actor.gpu.functions)
                except KernelError as error:
                    if not unread:
                        unread = True
                        _log.warning("%s", error, extra=told(GPU=self._actor.gpu.address))
                    await change.come()
                    continue
                if not machines:
                    break
                if not self._said:
                    self._tell(
                        f"{self._actor.gpu.address} is on the host, and libvirt still has "
                        f"{next(iter(machines))} in its books: it resets the GPU by the bus when it clears up "
                        "after that"
                    )
                await change.come()
        if self._said and self._actor.state is State.HOST:
            await self._look()

    async def _look(self) -> None:
        gpu = self._actor.gpu
        try:
            async with answered(seconds_for(Kernel.lost, self._actor.record.config.deadlines)):
                lost = await self._host.reader(str(gpu.address)).lost(gpu.functions)
        except (KernelError, LateError) as error:
            self._tell(f"libvirt may have reset {gpu.address} by the bus, and nobody can tell: {error}")
            return
        if lost:
            self._tell(_damage(gpu.address, lost))
        elif self._actor.record.noted == self._said:
            self._actor.record.note("")

    def _tell(self, text: str) -> None:
        self._said = text
        _log.error("%s", text, extra=told(GPU=self._actor.gpu.address))
        self._actor.record.note(text)


def _damage(gpu: PciAddress, lost: tuple[PciAddress, ...]) -> str:
    return (
        f"libvirt has reset {gpu} by the bus while it was on the host, and {' and '.join(map(str, lost))} lost what "
        "the kernel had set up: take its functions off the PCI bus and rescan, or restart the machine"
    )
