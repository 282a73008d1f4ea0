"""Pages in another language say what the English ones say: what both have to have alike is alike, section by section.

So whoever changes the one is told to change the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.test_docs import CODE, FENCE, LINK, without_fences
from tests.unit.test_house import ROOT, relative

CHINESE = ROOT / "docs" / "zh-CN"
ENGLISH = {
    CHINESE / "README.md": ROOT / "README.md",
    CHINESE / "one-gpu.md": ROOT / "docs" / "tutorials" / "one-gpu.md",
}
BLOCK = re.compile(rf"(?:^<!-- [^\n]* -->\n)?{FENCE.pattern}", FENCE.flags)
HEADING = re.compile(r"^(#+) ", re.MULTILINE)
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
ITEM = re.compile(r"^(?:- |\d+\. )", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """What a section has in any language. `links`: the English pages that it names; `code`: what is in backticks."""

    level: int
    blocks: list[str]
    rows: int
    items: int
    code: list[str]
    links: list[str]


def sections(page: Path) -> list[Section]:
    """Of a page, with what stands before its first heading."""
    text = page.read_text()
    blocks = [match[0] for match in BLOCK.finditer(text)]
    # A line of a block may begin like a heading.
    places = iter(range(len(blocks)))
    parts = HEADING.split(BLOCK.sub(lambda _: f"\0{next(places)}\0", text))
    return [section(page, len(mark), part, blocks) for mark, part in zip(parts[1::2], parts[2::2], strict=True)]


def section(page: Path, level: int, part: str, blocks: list[str]) -> Section:
    return Section(
        level,
        [blocks[int(place)] for place in re.findall("\0(\\d+)\0", part)],
        len(ROW.findall(part)),
        len(ITEM.findall(part)),
        sorted(match[2] for match in CODE.finditer(without_fences(part))),
        sorted(links(page, part)),
    )


def links(page: Path, part: str) -> list[str]:
    """Where they lead; each page and its translations are one, and have headings of their own."""
    found = []
    for target in LINK.findall(part):
        path, _, heading = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        its_own = to in ENGLISH or to in ENGLISH.values()
        found.append(f"{relative(ENGLISH.get(to, to))}{f'#{heading}' if heading and not its_own else ''}")
    return found


@pytest.mark.parametrize("page", ENGLISH, ids=relative)
def test_each_section_has_what_it_has_in_english(page: Path) -> None:
    translated, english = sections(page), sections(ENGLISH[page])
    for mine, theirs in zip(translated, english, strict=False):
        assert mine == theirs
    assert len(translated) == len(english)


def test_every_translated_page_is_compared() -> None:
    assert sorted(CHINESE.glob("*.md")) == sorted(ENGLISH)


@pytest.mark.parametrize("page", ENGLISH, ids=relative)
def test_each_links_to_the_other(page: Path) -> None:
    english = ENGLISH[page]
    for here, there in ((page, english), (english, page)):
        top = here.read_text().partition("\n## ")[0]
        assert there in {(here.parent / target).resolve() for target in LINK.findall(top)}


def test_the_rules_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# One\n\nSay `a`.\n\n<!-- on: plain -->\n```sh\n# gpuswitchctl list\n```\n\n## Two\n\n| a |\n|---|\n\n- b\n"
    page.write_text(text)
    whole = sections(page)
    assert [(each.level, len(each.blocks), each.rows, each.items, each.code) for each in whole] == [
        (1, 1, 0, 0, ["a"]),
        (2, 0, 2, 1, []),
    ]
    for before, after in (("`a`", "`b`"), ("plain", "single"), ("list", "watch"), ("\n- b", ""), ("## Two", "# Two")):
        page.write_text(text.replace(before, after))
        assert sections(page) != whole
