"""gpuswitchd with a fault of its own: who asks for a switch waits for something that never comes.

stalling.py OPTION...       as gpuswitchd takes them

That is noticed at once here, where the real service lets all that may be waited for go by first.
"""

from __future__ import annotations

import asyncio
import sys
from unittest import mock

from gpuswitch import service
from gpuswitch.config.schema import Deadlines
from gpuswitch.gpu import actor
from gpuswitch.gpu.planner import Planner


async def never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


if __name__ == "__main__":
    with (
        mock.patch.object(Planner, "plan", never),
        mock.patch.object(actor, "_TURN_SECONDS", 0.5),
        mock.patch.object(Deadlines, "by_kind", return_value={}),
    ):
        sys.exit(service.main())
