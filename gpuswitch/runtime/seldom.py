"""What others bring about as often as they like is not logged as often as that: the journal drops more than it is told
in a while, and what matters with it (journald.conf(5), RateLimitBurst=).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LINES = 10
SECONDS = 60.0


class Seldom:
    """Says yes `LINES` times in any `SECONDS`. `clock` gives seconds that only go on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=LINES)

    def __call__(self) -> bool:
        now = self._clock()
        if len(self._times) == LINES and now - self._times[0] < SECONDS:
            return False
        self._times.append(now)
        return True
