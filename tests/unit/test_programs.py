"""The other programs of this installation, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuswitch.cli.programs import as_typed, installed


def test_what_no_shell_finds_is_typed_with_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(Path(installed("gpuswitchctl")).parent))
    assert as_typed("gpuswitchctl") == "gpuswitchctl"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(Path(installed("gpuswitchctl")).parents[1])
    assert as_typed("gpuswitchctl").endswith("bin/gpuswitchctl")
    assert not as_typed("gpuswitchctl").startswith("/")
