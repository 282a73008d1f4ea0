"""What the documents name exists: files, folders, headings, modules and their attributes, and the code that they quote.

Checked in what stands in backticks, in links and in fenced blocks of the pages; and in backticks of our own comments.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuswitch.config.loading import load
from gpuswitch.host.simulated.scenarios import SCENARIOS
from tests.harness.pages import Block, blocks
from tests.unit.test_house import ROOT, relative

PACKAGE = ROOT / "gpuswitch"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = [block for page in PAGES for block in blocks(page)]
SOURCES = sorted(PACKAGE.rglob("*.py"))
PARTS = ("gpuswitch", "tests", "units", "contrib", "docs", "findings", ".ci")
ROOMS = ("switch", "host", "gpu", "fleet", "api", "cli", "config", "history", "model", "runtime")
"""Folders of the package, which the documents call by their short names."""
FILES = frozenset(
    path.relative_to(ROOT).as_posix()
    for part in PARTS
    for path in (ROOT / part).rglob("*.py")
    if "__pycache__" not in path.parts
)

FENCE = re.compile(r"^(```+)(\w*)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
CODE_IN_A_LINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, (*PARTS, *ROOMS)))})/[\w./*-]*")
PYTHON = re.compile(r"(?<![\w./*-])[\w/]+\.py(?![\w/])")
DOTTED = re.compile(r"(?<![\w./-])gpuswitch(?!\.io/)(?:\.[A-Za-z_]\w*)+(?![\w=])")
"""What has a value is no module: `gpuswitch.early=off` on the kernel's command line; nor are names in Kubernetes,
`gpuswitch.io/desired`.
"""
IN_TREE = re.compile(r"[\w./]+(?:\.py|/)(?![\w/])")


def without_fences(page: str) -> str:
    return FENCE.sub("", page)


def fenced(page: str, language: str | None = None) -> list[str]:
    """The texts of the fenced blocks, of this language only."""
    return [match[3] for match in FENCE.finditer(page) if language in {None, match[2]}]


def code(page: str) -> list[str]:
    """What stands in backticks."""
    return [match[2] for match in CODE.finditer(without_fences(page))]


def exists(path: str) -> bool:
    """Whether there is this path, below the repository or, by its short name, below the package; `*` as in a shell."""
    top = path.partition("/")[0]
    root = ROOT if top in PARTS else PACKAGE
    found = any(root.glob(path.rstrip("/"))) if "*" in path else (root / path).exists()
    return found and (not path.endswith("/") or "*" in path or (root / path).is_dir())


def named(file: str) -> bool:
    """Whether one of our Python files is called so, with as many of its folders as are given."""
    return any(f"/{each}".endswith(f"/{file}") for each in FILES)


COLLECTION = ROOT / "contrib/ansible"


def in_collection(name: str) -> bool:
    """Whether the collection for Ansible has a plugin, a playbook or a role of this name."""
    files = (*COLLECTION.glob("plugins/*/*.py"), *COLLECTION.glob("playbooks/*.yml"), *COLLECTION.glob("roles/*"))
    return name in {file.stem for file in files}


def resolves(name: str) -> bool:
    """Whether `gpuswitch.a.b.C.d` is a module, or an attribute that a module or a class in it has or declares.

    `gpuswitch.gpuswitch` is the collection for Ansible, and what follows is in it.
    """
    parts = name.split(".")
    if parts[:2] == ["gpuswitch", "gpuswitch"]:
        return all(map(in_collection, parts[2:]))
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if part not in getattr(found, "__annotations__", {}) and not hasattr(found, part):
                return False
            found = getattr(found, part, None)
        return True
    return False


def dangling(text: str) -> Iterator[str]:
    """The paths and dotted names in this text that are not there."""
    for word in PATH.findall(text):
        path = word.rstrip(".-")
        if not exists(path):
            yield path
    for file in PYTHON.findall(text):
        if not named(file) and not PATH.match(file):
            yield file
    for name in DOTTED.findall(text):
        if not resolves(name):
            yield name


def anchors(page: str) -> list[str]:
    """What a link may name in it: its headings, as they are written in addresses."""
    headings = HEADING.findall(without_fences(page))
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def dangling_links(page: Path, text: str) -> Iterator[str]:
    """The relative links of this page, with its text, that lead nowhere, or to no heading of where they lead."""
    for target in LINK.findall(without_fences(text)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        if not to.exists() or (anchor and anchor not in anchors(to.read_text())):
            yield target


def dangling_in_tree(tree: str, root: Path) -> Iterator[str]:
    """The entries of a drawn tree that are not there, and the files in their descriptions that are nowhere in `root`.

    An entry is the first word of a line, in the folder of the last line that is indented less; `root` is the folder
    that the tree begins with.
    """
    folders: list[tuple[int, Path]] = []
    for line in filter(str.strip, tree.splitlines()):
        entry, *described = line.split(maxsplit=1)
        depth = line.index(entry)
        folders = [(at, folder) for at, folder in folders if at < depth]
        here = folders[-1][1] if folders else root.parent
        if IN_TREE.fullmatch(entry):
            if not (here / entry).exists():
                yield entry
            if entry.endswith("/"):
                folders.append((depth, here / entry))
        for name in IN_TREE.findall(" ".join(described)):
            if not any(root.rglob(name.rstrip("/"))) and not exists(name):
                yield name


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_page_names_what_is_there(page: Path) -> None:
    text = page.read_text()
    assert [name for each in (*code(text), *fenced(text)) for name in dangling(each)] == []
    assert list(dangling_links(page, text)) == []


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_a_comment_names_what_is_there(source: Path) -> None:
    assert [name for each in CODE_IN_A_LINE.findall(source.read_text()) for name in dangling(each)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page.read_text(), "toml")], ids=relative)
def test_a_configuration_in_a_page_can_be_used(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(fenced(page.read_text(), "toml")):
        # With what is commented out there, too: people take the # off.
        uncommented = re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE)
        for which, shown in (("as it is", text), ("all of it", uncommented)):
            file = tmp_path / f"{number} {which}.toml"
            file.write_text(shown)
            file.chmod(0o644)
            load(file, {})


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_in_a_page_are_run_or_it_is_said_what_they_need(block: Block) -> None:
    assert block.is_understood
    assert block.commands != []
    assert block.scenario in {"", *SCENARIOS}


def test_the_example_in_the_readme_is_safe_to_copy(tmp_path: Path) -> None:
    """It names a GPU, and that is all."""
    [text] = fenced((ROOT / "README.md").read_text(), "toml")
    file = tmp_path / "config.toml"
    file.write_text(text)
    file.chmod(0o644)
    changed = {setting.key for setting in load(file, {}).settings if setting.value != setting.default}
    assert changed == {"gpu[0000:01:00.0].address", "gpu[0000:01:00.0].name"}


def test_the_rooms_of_the_architecture_are_there() -> None:
    _, _, rooms = (ROOT / "docs/architecture.md").read_text().partition("\n## Rooms\n")
    tree = fenced(rooms)[0]
    assert list(dangling_in_tree(tree, PACKAGE)) == []
    missing = {f"{room}/" for room in ROOMS} - {line.strip().partition(" ")[0] for line in tree.splitlines()}
    assert missing == set()


def test_the_code_in_the_page_of_style_is_ours() -> None:
    """What is quoted stands so in the file that is named in the last link before it, but for white space."""
    text = (ROOT / "docs/style.md").read_text()
    quotes = [match for match in FENCE.finditer(text) if match[2] == "python"]
    assert quotes != []
    for quote in quotes:
        source = ROOT / "docs" / LINK.findall(text[: quote.start()])[-1]
        assert quotes_truly(quote[3], source.read_text()), relative(source.resolve())


def quotes_truly(quote: str, source: str) -> bool:
    """Whether the lines of `quote` stand in `source` one after the other.

    Indentation and empty lines do not count: the formatter has its own mind about them in a page.
    """
    return bare_lines(quote) in bare_lines(source)


def bare_lines(text: str) -> str:
    return "".join(f"\n{line.strip()}\n" for line in text.splitlines() if line.strip())


def test_the_rules_can_fail(tmp_path: Path) -> None:
    fence = "```\nhost/gone/ tests/unit/\n```\n"
    page = f"See `gpuswitch/gone.py` and `steps/pci.py`.\n\n{fence}\n``a`b`` `model/gone.py x`\n"
    assert code(page) == ["gpuswitch/gone.py", "steps/pci.py", "a`b", "model/gone.py x"]
    assert fenced(page) == ["host/gone/ tests/unit/\n"]
    assert fenced(page, "python") == []
    assert list(dangling(page)) == ["gpuswitch/gone.py", "host/gone/", "model/gone.py"]
    assert list(dangling("letting_go.py, switch/steps/pci.py, planning/pci.py")) == ["letting_go.py", "planning/pci.py"]
    assert list(dangling("/usr/lib/host/x, api/*.py, api/*.c, tests/unit/test_docs.py/, docs/.")) == [
        "api/*.c",
        "tests/unit/test_docs.py/",
    ]
    assert list(dangling("gpuswitch.host.port.Host.look gpuswitch.host.port.Pending.pid gpuswitch.host.ports")) == [
        "gpuswitch.host.ports"
    ]
    assert list(dangling("gpuswitch.host.port.Hosts, org.gpuswitch1.Gpu")) == ["gpuswitch.host.port.Hosts"]

    one, other = tmp_path / "one.md", tmp_path / "other.md"
    other.write_text("# A GPU, or `two`\n")
    text = "[a](other.md#a-gpu-or-two) [b](other.md#b) [c](gone.md) [d](https://example.org/gone.md)\n"
    assert list(dangling_links(one, text)) == ["other.md#b", "gone.md"]

    (tmp_path / "here").mkdir()
    (tmp_path / "a.py").touch()
    tree = f"{tmp_path.name}/\n  here/   (a.py, c.py)\n    a.py  not here\n  a.py\n  d/\n"
    assert list(dangling_in_tree(tree, tmp_path)) == ["c.py", "a.py", "d/"]

    marks = ("", "on", "on: plain, brokn", "needs:", "on: plain, failed, systemd", "needs: libvirt")
    other.write_text("".join(f"<!-- {mark} -->\n```sh\nls\n```\n\n" for mark in marks))
    assert [block.mark for block in blocks(other) if block.is_understood] == list(marks[-2:])

    assert quotes_truly("a = 1\n\n\nb = 2\n", "def f():\n    a = 1\n    b = 2\n")
    assert not quotes_truly("1\n", "a = 1\n")
    assert not quotes_truly("a = 1\nb = 3\n", "def f():\n    a = 1\n    b = 2\n")
