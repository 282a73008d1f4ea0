"""The configuration is read beside the service, which has nothing of what checks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuswitch.config.loading import load
from gpuswitch.config.places import ConfigFaultsError
from gpuswitch.config.reading import read
from gpuswitch.errors import ConfigError, Failed

IN_A_FORK = """
import sys
from gpuswitch.config.reading import Reading
from gpuswitch.errors import ConfigError, Failed

with Reading(sys.argv[1]) as reading:
    import gpuswitch.daemon
    try:
        config = reading.result()
    except ConfigError as error:
        print(error)
    else:
        print(config.deadlines.unbind, config.gpus[0].called, config.gpus[0].rules.busy)
print("pydantic" in sys.modules)
"""


def in_a_fork(directory: Path, **environment: str) -> list[str]:
    """As the service has it read when it starts: what came of it, and whether pydantic is in that process."""
    command = [sys.executable, "-c", IN_A_FORK, str(directory)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(
        '[deadlines]\nunbind = 7\n[[gpu]]\naddress = "01:00.0"\nname = "card"\nbusy = "wait"\n'
    )
    return tmp_path


def test_it_is_what_it_would_be_read_here(directory: Path) -> None:
    assert read(directory) == load(directory)
    assert in_a_fork(directory) == ["7.0 card (0000:01:00.0) wait", "False"]


def test_variables_are_read_too(directory: Path) -> None:
    assert in_a_fork(directory, GPUSWITCH_DEADLINES__UNBIND="9")[0].startswith("9.0")


def test_a_fault_is_told_as_it_was_found(directory: Path) -> None:
    (directory / "config.toml").write_text("[deadlines]\nunbind = true\n[[gpu]]\n")
    with pytest.raises(ConfigFaultsError) as here:
        load(directory)
    with pytest.raises(ConfigFaultsError) as there:
        read(directory)
    assert list(there.value.faults) == list(here.value.faults)
    assert in_a_fork(directory) == [*str(here.value).splitlines(), "False"]


def test_what_cannot_be_reached_is_told(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 300)
    with pytest.raises(ConfigError, match=r"^cannot read .*: File name too long"):
        read(too_long)
    assert in_a_fork(too_long)[0].endswith(": File name too long")


def test_a_process_that_ends_too_early_is_a_sentence(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed for memory, or not to be started: nothing is wrong with the configuration, and a second try may help."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Failed, match=f"^cannot read {directory}: the process that reads it ended with status 1$"):
        read(directory)
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    with pytest.raises(Failed, match=r"/nowhere/python3 cannot be started: No such file or directory$"):
        read(directory)


def test_a_program_of_another_version_is_not_understood(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was upgraded below the service that runs."""
    monkeypatch.setattr("gpuswitch.config.reading._BY", b"gpuswitch 99.0, Python 30b07f0\n")
    with pytest.raises(Failed, match=r"gpuswitch was upgraded since this service began: start it anew$"):
        read(directory)


def test_nobody_waits_for_a_reader_that_nobody_reads(tmp_path: Path) -> None:
    """Of more than a pipe holds: whoever ends before it was read leaves no process behind."""
    tables = "".join(f'[[gpu]]\naddress = "{bus:02x}:00.0"\nname = "card-{bus}"\n' for bus in range(1, 100))
    (tmp_path / "config.toml").write_text(tables)
    program = "import os, sys; from gpuswitch.config.reading import Reading; Reading(sys.argv[1]).__exit__(); os.wait()"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
