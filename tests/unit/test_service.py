"""What gpuswitchd understands, and that it says so before the service is there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from gpuswitch import __version__
from gpuswitch.api.bus import Bus
from gpuswitch.config.settings import Config
from gpuswitch.daemon import Daemon
from gpuswitch.errors import ConfigError
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.service import MACHINES, main
from tests.harness.simulation.machines import bare

LOADED = """
import sys
from gpuswitch.service import main
try:
    main([{option!r}])
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(("option", "said"), [("--help", "usage: gpuswitchd"), ("--version", __version__)])
def test_what_needs_no_service_loads_none(option: str, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOADED.format(option=option)], capture_output=True, text=True, check=True
    )
    assert said in ended.stdout
    loaded = ended.stderr.split()
    assert "argparse" in loaded
    assert [name for name in loaded if name.startswith("gpuswitch")] == ["gpuswitch", "gpuswitch.service"]
    assert {"asyncio", "pydantic", "pathlib"}.isdisjoint(loaded)


def test_the_machines_in_memory_are_those_that_there_are() -> None:
    assert list(MACHINES) == sorted(SCENARIOS)


async def test_a_reload_reads_the_files_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not answer keeps nobody from being answered."""
    read = threading.Event()
    goes_on = threading.Event()

    def slow(_: Path) -> Config:
        read.set()
        assert goes_on.wait(60)
        raise ConfigError("it is wrong")

    monkeypatch.setattr("gpuswitch.daemon.read", slow)
    daemon = Daemon(bare(), Config(), tmp_path, Mock(spec=Bus), runtime=tmp_path, state=tmp_path)
    reloading = asyncio.create_task(daemon.reload())
    assert await asyncio.to_thread(read.wait, 60)
    goes_on.set()
    with pytest.raises(ConfigError, match="it is wrong"):
        await reloading


@pytest.mark.parametrize("option", ["--bus", "--config", "--runtime", "--state"])
def test_a_variable_that_was_not_set_is_no_place(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{option}="]) == 2
    assert capsys.readouterr().err == f"gpuswitchd: cannot use an empty {option}: leave it out for the usual one\n"
