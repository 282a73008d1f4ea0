"""The pages of the documents: the commands that they show, and what each needs to be run.

A line before each block of commands says that, unseen by readers:

    <!-- on: plain -->            on a simulated host, with the page's own configuration where it has shown one before
    <!-- on: plain, failed -->    with a GPU that is in one of the `SITUATIONS`
    <!-- on: single, systemd -->  on that host too, where there is systemd and its journal: in a container
    <!-- needs: debian -->        a Debian with libvirt and a GPU: a virtual machine (tests/real_kernel/test_guides.py)
    <!-- needs: debian, packages -->  Debian's packages: apt resolves them (tests/real_system/test_guides.py)
    <!-- needs: arch -->          what no test has, in words: nobody runs it
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")])
"""Those in other languages show the same (tests/unit/test_translated_pages.py)."""

CONFIG = '[[gpu]]\naddress = "0000:01:00.0"\nname = "rtx3070"\nallow_boot_display = true\n'
"""Where the page has shown none."""

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_MARK = re.compile(r"(?P<word>on|needs): (?P<what>\S.*)")
_PROMPT = re.compile(r"^[#$] (.*)\n", re.MULTILINE)
_CHANGING = (
    (re.compile(r"\b[\d.]+ m?s\b"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"), "MOMENT"),
    (re.compile(r"\b\d\d:\d\d:\d\d\b(?!\.)"), "CLOCK"),
)
_ID = re.compile(r"\b[0-9a-f]{8}\b")


@dataclass(frozen=True)
class Situation:
    """What a page is about: the host has these faults, the service this configuration, and this was typed before.

    The GPU is in this state then. `statuses` are the exit statuses of the commands of a block, where not all of them
    end well.
    """

    faults: Sequence[str] = ()
    config: str = ""
    before: str = ":"
    state: str = "host"
    statuses: Sequence[int] = ()


_SOUND = "0000:01:00.1"
SITUATIONS = {
    "failed": Situation(
        tuple(f"probe@{_SOUND}#{nth}=EINVAL" for nth in (1, 2, 3)),
        "[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n",
        "gpuswitchctl to-vfio 01:00.0",
        "failed",
    ),
    "wedged": Situation(("unbind=hang",), "[deadlines]\nunbind = 0.2\n", "gpuswitchctl to-vfio 01:00.0", "wedged"),
    "staying-out": Situation(
        tuple(f"probe@{_SOUND}#{nth}=EINVAL" for nth in (2, 4)),
        "[defaults]\nrescan_on_failure = false\n",
        "gpuswitchctl to-vfio 01:00.0; gpuswitchctl to-host 01:00.0",
        "vfio",
    ),
    "waiting": Situation(before="gpuswitchctl to-vfio 01:00.0 --no-wait --wait 600", state="detaching"),
    "switched": Situation(before="gpuswitchctl to-vfio 01:00.0", state="vfio"),
    "refused": Situation(statuses=(3, 0, 0)),
}
"""Of GPU 01:00.0."""


@dataclass(frozen=True)
class Block:
    """A block of a page, with its mark as it is written, and the configuration that the page has shown before it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    config: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_understood(self) -> bool:
        """Whether its mark is one of those above."""
        return (match := _MARK.fullmatch(self.mark)) is not None and (
            match["word"] == "needs" or set(self._words[1:]) <= {"systemd", *SITUATIONS}
        )

    @property
    def scenario(self) -> str:
        """The simulated host that it is played on; "": on none."""
        return self._words[0] if self._words else ""

    @property
    def needs_systemd(self) -> bool:
        return "systemd" in self._words[1:]

    @property
    def situation(self) -> Situation:
        return next((SITUATIONS[word] for word in self._words[1:] if word in SITUATIONS), Situation())

    @property
    def commands(self) -> list[tuple[str, str | None]]:
        """Each command, and what it is shown to say; None: that is not shown."""
        if self.language == "sh":
            return [(line, None) for line in self.text.splitlines() if line.strip()]
        parts = _PROMPT.split(self.text)[1:]
        return list(zip(parts[::2], parts[1::2], strict=True))

    @property
    def _words(self) -> list[str]:
        match = _MARK.fullmatch(self.mark)
        return match["what"].split(", ") if match is not None and match["word"] == "on" else []


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of commands in a page."""
    text, config = page.read_text(), CONFIG
    for match in _FENCE.finditer(text):
        if match["language"] == "toml":
            config = match["text"]
        elif match["language"] in {"console", "sh"}:
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page, line, match["language"], match["text"], match["mark"] or "", config)


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def typed_where(needs: str) -> list[Block]:
    """Those that say that this is what they need."""
    return [block for block in all_blocks() if block.mark == f"needs: {needs}"]


def unchanging(text: str) -> str:
    """Without what is another each time: times, and ids of switches."""
    for pattern, word in _CHANGING:
        text = pattern.sub(word, text)
    return _ID.sub("ID", text)


def with_id(command: str, switch: str) -> str:
    """The command with the id of this switch, where it has one of an example."""
    return _ID.sub(switch, command)
