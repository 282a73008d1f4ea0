"""The picture in the README shows a switch as it goes now."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

from tests.unit.test_house import ROOT

PICTURE = ROOT / "docs" / "switch.svg"


def test_it_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "switch.svg"
    subprocess.run([sys.executable, "-m", "docs.generate_picture", fresh], cwd=ROOT, check=True)
    assert PICTURE.read_text() == fresh.read_text(), "run `make docs`"


def test_it_shows_the_steps_that_a_guide_shows_as_text() -> None:
    """Those are played by a test, and compared."""
    picture = html.unescape(re.sub(r"<[^>]*>", "", PICTURE.read_text())).replace("\xa0", " ")
    guide = (ROOT / "docs" / "tutorials" / "two-gpus.md").read_text()
    [count] = set(re.findall(r"\[ *\d+/(\d+)\]", picture))
    titles = re.findall(rf"^\[ *\d+/{count}\] .*(?=: done)", guide, re.MULTILINE)
    assert titles != []
    assert [title for title in titles if title not in picture] == []


def test_a_reader_fetches_nothing_more_for_it() -> None:
    assert re.findall(r"(?:https?:)?//\S+", PICTURE.read_text()) == ['http://www.w3.org/2000/svg"']
