"""Manual pages in the words of man(7), as groff and mandoc both take them.

Prose is plain text with code in `backticks`, as in docstrings; what is in them becomes bold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ESCAPES = {"\\": r"\e", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga", "'": r"\(aq", "-": r"\-"}
"""What would be typeset as another character than the one that somebody types (groff_char(7))."""
_CODE = re.compile(
    r"`([^`\n]+)`|(?<![\w-])(--?[a-z][\w-]*|(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]|vfio-pci)"
)
"""What stands in backticks; options, addresses and this driver also without them."""


def verbatim(text: str) -> str:
    """Text to be copied: each character as it is on a keyboard."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def bold(text: str) -> str:
    return rf"\fB{verbatim(text)}\fR"


def italic(text: str) -> str:
    return rf"\fI{verbatim(text)}\fR"


def prose(text: str) -> str:
    """Text to be filled; each of its lines begins a line, so none can be taken for a request."""
    shown, end = "", 0
    for found in _CODE.finditer(text):
        shown += _plain(text[end : found.start()])
        shown += bold(found[1]) if found[1] else verbatim(found[2])
        end = found.end()
    return lines(shown + _plain(text[end:]))


def _plain(text: str) -> str:
    return text.replace("\\", r"\e").replace("^", r"\(ha").replace("~", r"\(ti").replace("`", r"\(ga")


def lines(text: str) -> str:
    """No line that begins with a control character (groff(7), Control lines), and none with blanks."""
    return "\n".join(rf"\&{each}" if each[:1] in {".", "'"} else each for each in map(str.strip, text.split("\n")))


def heading(name: str, section: int, date: str, source: str, manual: str) -> str:
    """The first line of a page: `date` as 2026-11-29."""
    # Names and commands are not broken at hyphens of the typesetter's own, nor stretched.
    return f'.TH {name.upper()} {section} {date} "{source}" "{manual}"\n.nh\n.ad l\n'


def section(title: str, *parts: str) -> str:
    return f".SH {title}\n{_below_heading(parts)}"


def subsection(title: str, *parts: str) -> str:
    """The title is ready-made: `bold()` and the like."""
    return f".SS {title}\n{_below_heading(parts)}"


def _below_heading(parts: Iterable[str]) -> str:
    """There, a paragraph needs no mark."""
    return "".join(parts).removeprefix(".PP\n")


def paragraph(text: str) -> str:
    """Prose; an empty line in it begins another paragraph."""
    return "".join(f".PP\n{prose(each)}\n" for each in re.split(r"\n\s*\n", text.strip()))


def item(term: str, text: str) -> str:
    """A term (ready-made) and below it what it means. Further paragraphs stay below the term."""
    first, *more = re.split(r"\n\s*\n", text.strip())
    body = "".join(f".IP\n{prose(each)}\n" for each in more)
    return f".TP\n{term}\n{prose(first)}\n{body}"


def example(*commands: str) -> str:
    """Lines to be copied."""
    shown = "\n".join(lines(verbatim(each)) for each in commands)
    return f".PP\n.EX\n.RS 4\n{shown}\n.RE\n.EE\n"


def see_also(pages: Iterable[tuple[str, int]]) -> str:
    named = [f"{bold(name)}({number})" for name, number in sorted(pages, key=lambda page: (page[1], page[0]))]
    return section("SEE ALSO", ",\n".join(named) + "\n")
