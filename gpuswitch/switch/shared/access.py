"""Users' access to nodes of vfio: taken back by the last GPU for whose sake it was given."""

from __future__ import annotations

import logging

from gpuswitch.host.port import DeviceNodes
from gpuswitch.log.fields import told
from gpuswitch.model.access import UserAccess
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.restore_state import SharedSetting
from gpuswitch.switch.shared.arbiter import Arbiter

_log = logging.getLogger(__name__)


def setting(access: UserAccess) -> SharedSetting:
    """By which others know that it is needed."""
    return SharedSetting("access", access)


async def take_back(gpu: PciAddress, access: UserAccess, nodes: DeviceNodes, arbiter: Arbiter) -> None:
    """This GPU does not need it any more: the user has it no longer, unless another GPU does.

    Raises:
        KernelError: he may have it still.
    """

    async def taken() -> None:
        nodes.take(access)
        _log.info("uid %d may not open %s any more", access.uid, access.node, extra=told(GPU=gpu))

    await arbiter.settings.restore(gpu, setting(access), taken)
