"""`gpuswitchctl report`, of a service on a simulated host: what is in the file, and whose names are not."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest

from gpuswitch.errors import Failed
from tests.real_bus.conftest import Ctl, Start
from tests.real_bus.test_json import Json, environ, told

__all__ = ["environ", "told"]

GPU = "0000:01:00.0"
CONFIG = f"""
[metrics]
enabled = false
[[gpu]]
address = "{GPU}"
name = "geforce"
allow_boot_display = true
"""


def made(ctl: Ctl, path: Path, *options: str) -> str:
    said = ctl("report", "--output", str(path), *options)
    assert said.returncode == 0, said.stderr
    return path.read_text()


async def test_all_that_is_asked_for_is_in_it(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("laptop", "probe@0000:01:00.0#1=EINVAL", config=CONFIG)
    assert ctl("to-vfio", GPU).returncode == 1
    text = made(ctl, tmp_path / "report.md")
    for title in (
        "Versions",
        "Configuration in force",
        "GPUs",
        "Who has them open",
        "IOMMU groups",
        "History, the last 20",
    ):
        assert f"\n## {title}\n\n```text\n" in text
    assert "gpuswitchd 0." in text
    assert '"address": "0000:01:00.0"' in text
    assert '"status": "revert' in text
    assert "gpu.0000:01:00.0.name = " in text or '"geforce"' in text
    assert text.count("```") % 2 == 0


async def test_it_is_a_new_file_that_nobody_else_reads(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("plain")
    path = tmp_path / "report.md"
    made(ctl, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    again = ctl("report", "--output", str(path))
    assert again.returncode == Failed.exit_code
    assert again.stderr == f"gpuswitchctl: cannot write {path}: it is there already; name another file with --output\n"
    assert path.read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert ctl("report", "--output", str(tmp_path / "link")).returncode == Failed.exit_code
    assert not (tmp_path / "elsewhere").exists()


async def test_standard_output_and_json(start: Start, ctl: Ctl, told: Json, tmp_path: Path) -> None:
    await start("plain")
    assert ctl("report", "--output", "-").stdout.startswith("# gpuswitch report\n")
    [document] = told("report", "--output", str(tmp_path / "report.md"))
    assert document["report"]["path"] == str(tmp_path / "report.md")
    assert (tmp_path / "report.md").exists()
    [error] = told("report", "--output", "-")
    assert error["error"]["kind"] == "invalid_argument"


def test_without_the_service_it_says_what_is_not_in_it(ctl: Ctl, tmp_path: Path) -> None:
    text = made(ctl, tmp_path / "report.md")
    assert "- not in it: what the service knows: the service does not run\n" in text
    assert "## Versions" in text
    assert "## Configuration, as the service would read it" in text


async def test_nobodys_names_are_in_it(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    ctl("to-vfio", GPU)
    text = made(ctl, tmp_path / "report.md")
    people = [user.pw_name for user in pwd.getpwall() if 1000 <= user.pw_uid < 60000]
    node = os.uname().nodename
    assert [name for name in (*people, node) if name in text.split()] == []


async def test_it_is_in_english_and_its_words_are_not(
    start: Start, ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start("plain")
    monkeypatch.setenv("LANGUAGE", "de")
    text = made(ctl, tmp_path / "report.md")
    assert text.startswith("# gpuswitch report\n")
