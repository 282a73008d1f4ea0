"""House rules that a program can check. CONTRIBUTING.md says them in words."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted(path for part in ("gpuswitch", "tests", "docs") for path in (ROOT / part).rglob("*.py"))
SELF = Path(__file__)
"""It has to say what it forbids."""
PARTS = (".ci", "contrib", "docs", "gpuswitch", "tests", "units")
TEXT = sorted(
    path
    for path in (*ROOT.glob("*"), *(path for part in PARTS for path in (ROOT / part).rglob("*")))
    if path.is_file() and "__pycache__" not in path.parts and path.name != "LICENSE" and path != SELF
)

MARKERS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
PLACES = re.compile(r"(?<![\w.])/(home|root|Users)/")
LOOKS_AGAIN = ROOT / "tests/harness/machines/inside/words.py"
"""It waits for what makes no event, until somebody's patience is at its end."""
LUCK = re.compile(r"time\.sleep\(|pytest\.(mark\.)?(skip|xfail|importorskip)")
IGNORE = re.compile(r"#\s*(type:\s*ignore|noqa|pragma:|ruff:)")
REASONED = re.compile(
    r"# (type: ignore\[[\w, -]+\]|noqa: [A-Z]+\d+(, [A-Z]+\d+)*|pragma: no cover|ruff: noqa: [A-Z]+\d+)"
    r"\s+(# )?(- )?\S+ \S+"
)

FOLDERS = {"unit", "simulated_host", "random_schedules", "real_bus", "real_system", "real_kernel"}
"""Of tests; CONTRIBUTING.md says what each is about."""
TEST_FILE = re.compile(r"(test_\w+|conftest|__init__)\.py")
KNOWS_TESTS = re.compile(rf"^\s*(from|import) tests\.({'|'.join(sorted(FOLDERS))})\b", re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bare_ignores(source: str) -> list[str]:
    """The comments that switch a check off without saying why."""
    comments = (
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    return [comment for comment in comments if IGNORE.search(comment) and not REASONED.search(comment)]


@pytest.mark.parametrize("path", [path for path in PYTHON if path != SELF], ids=relative)
def test_ignores_have_reasons(path: Path) -> None:
    assert bare_ignores(path.read_text()) == []


@pytest.mark.parametrize("path", TEXT, ids=relative)
def test_text_keeps_no_notes_and_names_no_place(path: Path) -> None:
    """No notes to oneself, no path of one machine, no registry host."""
    text = path.read_text(errors="replace")  # what is to be read may be no text
    assert MARKERS.findall(text) == []
    assert PLACES.findall(text) == []


@pytest.mark.parametrize("path", [path for path in PYTHON if path not in {SELF, LOOKS_AGAIN}], ids=relative)
def test_nothing_is_left_to_luck(path: Path) -> None:
    """No blocking sleep, and no test that is passed over."""
    assert LUCK.findall(path.read_text()) == []


def test_every_directory_of_tests_is_a_package() -> None:
    """Else two test files of the same name would be one module."""
    assert [
        relative(path) for path in PYTHON if not (path.parent / "__init__.py").exists() and "tests" in path.parts
    ] == []


def test_harnesses_stand_apart_from_tests() -> None:
    """A folder of tests has nothing else, and what they are run with knows none of them."""
    tests = [path for path in PYTHON if path.is_relative_to(ROOT / "tests") and path.parent != ROOT / "tests"]
    here = [path for path in tests if path.parent.name in FOLDERS]
    assert {path.parent.name for path in here} == FOLDERS
    assert [relative(path) for path in here if not TEST_FILE.fullmatch(path.name)] == []
    others = [path for path in tests if path not in here]
    assert [relative(path) for path in others if path.name.startswith("test_")] == []
    assert [relative(path) for path in others if KNOWS_TESTS.search(path.read_text())] == []


def test_the_rules_can_fail() -> None:
    assert bare_ignores("x = 1  # noqa: E501\n") != []
    assert bare_ignores("x = 1  # type: ignore[misc]\n") != []
    assert bare_ignores("x = 1  # type: ignore  # it is so\n") != []
    assert bare_ignores("x = 1  # type: ignore[misc]  # the library says Any\n") == []
    assert bare_ignores("x = 1  # noqa: BLE001 - a bad file must not end the service\n") == []
    assert MARKERS.search("# TODO later")
    assert PLACES.search("see /home/me/x")
    assert LUCK.search("time.sleep(1)")
    assert not TEST_FILE.fullmatch("parts.py")
    assert KNOWS_TESTS.search("from tests.unit.test_house import ROOT")
