"""Each line of the log that is about a GPU has its field, whichever module writes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_house import ROOT

ROOMS = ("switch", "gpu", "fleet", "log")
"""Where lines are about one GPU, as a rule."""

FILES = sorted(path for room in ROOMS for path in (ROOT / "gpuswitch" / room).rglob("*.py"))

ABOUT_NONE = {
    "at_boot.py": {"a fault of gpuswitch itself: not every GPU is where it is wanted"},
    "books.py": {"%s"},  # of libvirt
    "boot.py": {"cannot read %s (%s): nothing more is moved at this boot"},
    "clearing_up.py": {"%s", "libvirt is not there to clear up after %s: %s is started"},
    "fleet.py": {
        "%s: it is tried again",
        "%s: nothing follows from this look, and the next one comes in %g s at most",
        (
            "nobody can tell which display this machine booted on, so no GPU is kept on the host for its sake; "
            "`allow_boot_display` has no effect"
        ),
        "%s",  # of the configuration
    },
    "journal.py": {"cannot list the journal: %s"},
    "store.py": {"cannot keep room for %s: %s"},  # it knows files
}
"""Lines, by their file, that are about no GPU, or about all."""

TASK_SAYS_SO = {"ownership.py"}
"""Files whose one task says once what it is about (gpuswitch.log.fields.about)."""


def lines(source: str) -> Iterator[tuple[str, bool]]:
    """Each call that logs: its text, and whether it says itself what it is about."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_log."):
            [text, *_] = node.args
            said = text.value if isinstance(text, ast.Constant) else ast.unparse(text)
            yield str(said), any(keyword.arg == "extra" for keyword in node.keywords)


def untold(source: str) -> set[str]:
    return {text for text, told in lines(source) if not told}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_line_says_which_gpu_it_is_about(path: Path) -> None:
    source = path.read_text()
    if path.name in TASK_SAYS_SO:
        assert "about(GPU=" in source
    else:
        assert untold(source) == ABOUT_NONE.get(path.name, set())


def test_the_rule_can_fail() -> None:
    source = '_log.info("%s: said", gpu, extra=told(GPU=gpu))\n_log.error("%s: not said", gpu)\n_log.info(text)\n'
    assert untold(source) == {"%s: not said", "text"}
