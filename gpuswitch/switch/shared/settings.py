"""Settings that several GPUs want changed at once: whoever comes first records, the last one that needs it gives back.

Of every kind that `gpuswitch.host.port.Shared` declares; who changes one knows how, and this knows who needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState, SharedSetting

_log = logging.getLogger(__name__)


class SharedSettings:
    """Of all GPUs. `restore_states` are what each has to restore, and follow the journal.

    A restore state alone keeps no setting changed: it is there before the first step, and until the way home is over.
    So a GPU claims a setting when that is changed for it, and gives the claim up when it does not need that any more.
    """

    def __init__(self, restore_states: Mapping[PciAddress, RestoreState]) -> None:
        self._restore_states = restore_states
        self._claims: defaultdict[SharedSetting, set[PciAddress]] = defaultdict(set)
        self._busy: defaultdict[SharedSetting, asyncio.Lock] = defaultdict(asyncio.Lock)

    def claim(self, gpu: PciAddress) -> None:
        """Take over what an earlier run of the service left to restore: it was changed for this GPU."""
        for setting in self._of(gpu).settings:
            self._claims[setting].add(gpu)

    def forget(self, gpu: PciAddress) -> None:
        """What this GPU does not have to restore any more, it does not need changed."""
        kept = self._of(gpu).settings
        for setting, claims in self._claims.items():
            if setting not in kept:
                claims.discard(gpu)

    def recorded(self, setting: SharedSetting) -> RestoreState | None:
        """A restore state that has it: what the setting was before the first GPU came. None where none has.

        Who wants it changed, too, records the same: what it is now is somebody else's change.
        """
        return next((self._of(gpu) for gpu in self.recorded_by(setting)), None)

    def recorded_by(self, setting: SharedSetting) -> tuple[PciAddress, ...]:
        """The GPUs that have it in their restore states."""
        return tuple(gpu for gpu, each in self._restore_states.items() if setting in each.settings)

    def has(self, gpu: PciAddress, setting: SharedSetting) -> bool:
        """Whether this GPU has it in its restore state."""
        return setting in self._of(gpu).settings

    async def change(self, gpu: PciAddress, setting: SharedSetting, work: Callable[[], Awaitable[None]]) -> None:
        """Have `work` change it for this GPU, while nobody else touches it; it may record it first.

        Where it is in this GPU's restore state, no other GPU gives it back from this moment on. A GPU that does not
        have it there never gives it back, so it must not keep another one from doing so.

        Raises:
            KernelError, Failed: from `work`.
        """
        claimed = self._claim_if_recorded(gpu, setting)
        async with self._busy[setting]:
            try:
                await work()
            finally:
                if not claimed:
                    self._claim_if_recorded(gpu, setting)

    async def restore(
        self,
        gpu: PciAddress,
        setting: SharedSetting,
        work: Callable[[], Awaitable[None]],
        needs: Callable[[PciAddress], bool] = lambda _: True,
    ) -> None:
        """This GPU does not need it changed any more: have `work` give it back, unless another GPU does: one that has
        claimed it, and `needs` it.

        Raises:
            KernelError: from `work`.
        """
        self._claims[setting].discard(gpu)
        async with self._busy[setting]:
            if any(map(needs, self._claims[setting])):
                _log.info("%s stays as it is: another GPU needs it so", setting, extra=told(GPU=gpu))
            else:
                await work()

    def _claim_if_recorded(self, gpu: PciAddress, setting: SharedSetting) -> bool:
        if recorded := self.has(gpu, setting):
            self._claims[setting].add(gpu)
        return recorded

    def _of(self, gpu: PciAddress) -> RestoreState:
        return self._restore_states.get(gpu, NOTHING_TO_RESTORE)
