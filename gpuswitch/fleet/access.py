"""Access: the user whose process has a GPU may open its nodes of vfio, as long as that runs.

What was given stands in the GPU's restore state from before it is given until it was taken back, so a service that
starts anew knows of it. With it goes only what we gave: whoever may open a node by another rule may do so afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from gpuswitch.errors import Failed, KernelError, NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.access import UserAccess
from gpuswitch.sentence import Sentence
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.shared.access import setting, take_back
from gpuswitch.switch.shared.arbiter import Arbiter

_log = logging.getLogger(__name__)


class VfioAccess:
    """To the GPUs of one host."""

    def __init__(self, host: Host, arbiter: Arbiter) -> None:
        self._host = host
        self._arbiter = arbiter

    def refuse(self, actors: Sequence[Actor]) -> None:
        """Groups that also have what is not asked for: whoever may open one can use all in it that is on vfio.

        Raises:
            NotViable: there is one, by the last look.
        """
        asked_for = frozenset[object]().union(*(actor.gpu.functions for actor in actors))
        sentences = [
            Sentence(
                "IOMMU group {group} has {function} on {driver}, too, and whoever may open /dev/vfio/{group} may use "
                "that: ask for both, bring it to the host, or run this as root",
                group=group,
                function=other.address,
                driver=other.driver_name,
            )
            for actor in actors
            for group in actor.gpu.groups(actor.record.facts)
            for other in actor.record.facts.group(group)
            if other.on_vfio and other.address not in asked_for
        ]
        if sentences:
            raise NotViable(Sentence.joined("\n", dict.fromkeys(sentences)))

    async def give(self, actors: Sequence[Actor], uid: int) -> None:
        """Let this user open what these GPUs have on vfio, until `take_back`.

        Raises:
            GpuswitchError: he may not have it, or it cannot be given or written down; some may be given by then.
        """
        self.refuse(actors)
        for actor in actors:
            try:
                for node in await self._ready_nodes(actor.record):
                    access = UserAccess(uid, node)
                    work = partial(self._given, actor.record, access)
                    await self._arbiter.settings.change(actor.gpu.address, setting(access), work)
            except KernelError as error:
                raise Failed(str(error)) from error

    async def clear(self, actors: Sequence[Actor]) -> None:
        """See that nobody has kept access to them from an earlier owner.

        Raises:
            Failed: somebody has, and it cannot be taken back.
        """
        for actor in actors:
            if not await self.take_back(actor.record):
                raise Failed(f"cannot take back who else may open the nodes of {actor.gpu.address}")

    async def take_back(self, record: GpuRecord) -> bool:
        """Nobody whom we let may open what this GPU has on vfio; False: somebody still may, and it is told why."""
        for access in record.restore_state.access:
            try:
                await take_back(record.gpu.address, access, self._host.device_nodes, self._arbiter)
            except KernelError as error:
                _log.error("%s: uid %d may open it still", error, access.uid, extra=told(GPU=record.gpu.address))
            else:
                record.record_restored(RestoreState(access=(access,)))
        return not record.restore_state.access

    async def _given(self, record: GpuRecord, access: UserAccess) -> None:
        nodes, settings = self._host.device_nodes, self._arbiter.settings
        permissions = nodes.permissions(access)
        if settings.recorded(setting(access)) is None and permissions is not None:
            if permissions == "rw":
                # By whoever runs this machine: it stays afterwards.
                return
            raise Failed(
                Sentence(
                    "the access control list of {node} says that uid {uid} may not read and write it: change that "
                    "first: setfacl -x u:{uid} {node}",
                    node=access.node,
                    uid=access.uid,
                )
            )
        if not settings.has(record.gpu.address, setting(access)):
            record.record_restore(RestoreState(access=(access,)))
        nodes.give(access)
        _log.info("uid %d may open %s", access.uid, access.node, extra=told(GPU=record.gpu.address))

    async def _ready_nodes(self, record: GpuRecord) -> Sequence[str]:
        """Once udev is done with them; it is not waited for longer than for other nodes."""
        changed = asyncio.Event()
        stop = self._host.watch(changed.set)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(record.config.deadlines.nodes):
                    while self._host.device_nodes.of(record.gpu.functions).pending:
                        await changed.wait()
                        changed.clear()
        finally:
            stop()
        return self._host.device_nodes.of(record.gpu.functions).names
