"""The service as `make bench` starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import here
from tests.bench.builds import DEVELOPED
from tests.harness.debian.errors import HarnessError


def test_what_is_set_for_the_tests_does_not_reach_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSWITCH_TEST_CACHE", str(tmp_path))
    with here.serving(DEVELOPED) as service:
        assert service.running.process.poll() is None


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    place = here.Place(DEVELOPED, tmp_path, f"unix:path={tmp_path}/nobody")
    with pytest.raises(HarnessError, match="nobody"), here.daemon(place, "--simulate=laptop"):
        pytest.fail("it is not ready")
