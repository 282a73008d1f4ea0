"""The manual pages say what the programs understand, and are such as man and mandoc take without a word."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.test_house import ROOT

PAGES = ("gpuswitchctl.1", "gpuswitchd.8", "gpuswitch.toml.5", "org.gpuswitch1.5")


def test_they_are_what_the_generator_writes(tmp_path: Path) -> None:
    """Run `make docs` where they are not."""
    subprocess.run([sys.executable, "docs/generate_man.py", tmp_path], cwd=ROOT, check=True)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_text() for file in (ROOT / "docs/man").iterdir()}
    assert sorted(written) == sorted(PAGES)


def complaints(page: Path) -> str:
    """What the two programs say that show it."""
    environ = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    shown = subprocess.run(["man", "--warnings", "-l", page], env=environ, capture_output=True, text=True, check=True)
    assert page.stem.partition(".")[0] in shown.stdout
    checked = subprocess.run(["mandoc", "-Tlint", "-Wwarning", page], capture_output=True, text=True, check=False)
    return shown.stderr + checked.stdout + checked.stderr


@pytest.mark.parametrize("page", PAGES)
def test_man_and_mandoc_have_no_complaint(page: str) -> None:
    assert complaints(ROOT / "docs/man" / page) == ""


@pytest.mark.parametrize("fault", [".NOSUCH request", ".PP", ".SH\n"])
def test_they_would_complain(fault: str, tmp_path: Path) -> None:
    page = tmp_path / "gpuswitchctl.1"
    page.write_text(f"{(ROOT / 'docs/man/gpuswitchctl.1').read_text()}{fault}\n")
    assert complaints(page) != ""


@pytest.mark.parametrize("page", PAGES)
def test_they_are_installed(page: str) -> None:
    section = page.rpartition(".")[2]
    entry = f"file|docs/man/{page}|$PREFIX/share/man/man{section}/{page}\n"
    assert entry in (ROOT / "contrib/install.sh").read_text()


@pytest.fixture(scope="module")
def roff() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roff", ROOT / "docs/roff.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_text_is_shown_as_it_is_written(roff: ModuleType, tmp_path: Path) -> None:
    commands = (".so /etc/passwd", "'br", r"a\b --all ^C ~ `x`", "it's -x")
    text = ".so /etc/passwd\n'br\nfirst `--all` and 0000:01:00.0, \\fBnot bold"
    page = tmp_path / "x.1"
    page.write_text(
        roff.heading("x", 1, "2026-11-29", "x", "x")
        + roff.section("NAME", "x \\- y\n")
        + roff.section("TEXT", roff.paragraph(text), roff.example(*commands))
    )
    assert complaints(page) == ""
    environ = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MAN_KEEP_FORMATTING": ""}
    shown = subprocess.run(["man", "-l", page], env=environ, capture_output=True, text=True, check=True).stdout
    assert " ".join(text.replace("`", "").split()) in " ".join(shown.split())
    for command in commands:
        assert f" {command}\n" in shown
