"""The lines of ours in a configuration of Prometheus, between two comments, and everything around them as it is.

YAML is not read here: whole lines are put below a key at the left margin, and taken out again. Whether that makes sense
is for promtool to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

BEGIN = "# gpuswitchctl setup prometheus: begin"
END = "# gpuswitchctl setup prometheus: end"
_OURS = re.compile(
    rf"^ *{re.escape(BEGIN)}\n(?:(?! *{re.escape(BEGIN)}).*\n)*? *{re.escape(END)}(?:\n|\Z)", re.MULTILINE
)
"""From a beginning to the next end, with no other beginning between."""


class NoPlaceError(Exception):
    """There is none for our lines. The text is the line that is in the way, or one of the two comments."""


def job(target: str, instance: str) -> list[str]:
    """An item of `scrape_configs`: GpuswitchDown goes by its name, and `instance` is what alerts call the machine."""
    return [
        "- job_name: gpuswitch",
        "  static_configs:",
        f"    - targets: [{json.dumps(target)}]",
        f"      labels: {{instance: {json.dumps(instance)}}}",
    ]


def rule_file(place: str) -> list[str]:
    """An item of `rule_files`."""
    return [f"- {json.dumps(place, ensure_ascii=False)}"]


def with_items(text: str, key: str, item: Sequence[str]) -> str:
    """The text with one more item in the list of a key, which is made where there is none.

    Raises:
        NoPlaceError: that list is not written a line each.
    """
    lines = text.splitlines(keepends=True)
    for number, each in enumerate(lines):
        if re.match(rf"{key}\s*:", each):
            if each.partition(":")[2].partition("#")[0].strip():
                raise NoPlaceError(each.strip())
            return _put_in(lines, number + 1, item, _indent(lines[number + 1 :]))
    first = next((number + 1 for number, each in enumerate(lines) if each.startswith("---")), 0)
    return _put_in(lines, first, [f"{key}:", *(f"  {each}" for each in item)], "")


def without_ours(text: str) -> str:
    """As it was before. A key that came with our lines stays where somebody has put items of his own below them.

    Raises:
        NoPlaceError: one of the two comments is there without the other.
    """
    rest = _OURS.sub(_left, text).replace("\n\0", "")
    for mark in (BEGIN, END):
        if mark in rest:
            raise NoPlaceError(mark)
    return rest


def _left(found: re.Match[str]) -> str:
    """What stays in the place of these lines; a NUL takes the end of the line before along."""
    key = re.search(r"^\w+:\n", found[0], re.MULTILINE)
    if key and re.match(r" *- ", found.string[found.end() :]):
        return key[0]
    return "" if found[0].endswith("\n") else "\0"


def _indent(lines: Sequence[str]) -> str:
    """That of the list's own items: all have the same. Two spaces where it has none."""
    for each in lines:
        if item := re.match(r"( *)- ", each):
            return item[1]
        if each[:1] not in {" ", "#", "\r", "\n"}:
            break
    return "  "


def _put_in(lines: Sequence[str], place: int, item: Sequence[str], indent: str) -> str:
    ours = "".join(f"{indent}{each}\n" for each in (BEGIN, *item, END))
    before, after = "".join(lines[:place]), "".join(lines[place:])
    if before and not before.endswith("\n"):  # so that this comes and goes with our lines
        return f"{before}\n{ours[:-1]}"
    return f"{before}{ours}{after}"
