"""Settings of hypothesis for the unit tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples each run, and none of them fails because the machine is busy.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("steady")
