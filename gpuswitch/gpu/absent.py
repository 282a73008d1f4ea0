"""A GPU that has left the bus: what was changed for its sake, and several GPUs share, is given back all the same."""

from __future__ import annotations

import logging

from gpuswitch.config.schema import Deadlines
from gpuswitch.host.port import Host
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.engine import Engine, StuckError
from gpuswitch.switch.planning.plan import restore_shared
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.shared.arbiter import Arbiter
from gpuswitch.switch.steps.step import StepContext, StepError

_log = logging.getLogger(__name__)


async def restore_for_absent(
    gpu: PciAddress, restore_state: RestoreState, host: Host, arbiter: Arbiter, deadlines: Deadlines
) -> None:
    """Give back what it shares, and let the machine sleep, where no switch of this GPU does so.

    What does not work is logged, and keeps no other from its turn.
    """
    # What is given back leaves nothing to record; and nobody is told of steps that belong to no switch.
    context = StepContext(gpu, host, host.kernel(str(gpu)), arbiter, lambda _: None, deadlines=deadlines.by_kind())
    for step in restore_shared(restore_state):
        try:
            await Engine(context, (step,), lambda _: None, lambda _: None).forward()
        except (StepError, StuckError) as error:
            _log.warning("%s", error, extra=told(GPU=gpu))
    await arbiter.awake.settled_if_possible(gpu)
