"""Write gpuswitch/cli/locale/ and contrib/cockpit/po/: what is translated, and in each catalogue what is new.

`... [FOLDER]`: write it there.

Translations stay; what nobody says any more goes. An empty msgstr waits for somebody who knows the language.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gpuswitch.cli.translate import DOMAIN, read

ROOT = Path(__file__).parents[1]
LOCALE = Path("gpuswitch/cli/locale")
PAGE = Path("contrib/cockpit")
LANGUAGES = {"de": "German", "fr": "French", "zh_CN": "Chinese (simplified)"}
SAYING = frozenset({"Sentence", "template", "_", "ngettext", "mark", "marks"})
"""What is called with texts that are translated."""
ARGPARSE = (
    "usage: ",
    "positional arguments",
    "options",
    "show this help message and exit",
    "show program's version number and exit",
    "argument %(argument_name)s: %(message)s",
)
"""The words of argparse that people meet here: of what was typed wrongly, gpuswitch/cli/usage.py has its own."""
_LITERAL = r'"(?:[^"\\]|\\.)*"'
_PAGE_SAYS = re.compile(rf"\b_\(\s*({_LITERAL}(?:\s*\+\s*{_LITERAL})*)\s*\)")
"""A text in the JavaScript of the page for Cockpit; one that is long is put together of several literals."""


def texts(source: str) -> Iterator[str]:
    """All texts in the source of a module that are translated, in order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SAYING:
            many = node.func.id in {"marks", "ngettext"}
            for argument in node.args if many else node.args[:1]:
                for each in ast.walk(argument) if isinstance(argument, ast.IfExp) else (argument,):
                    if isinstance(each, ast.Constant) and isinstance(each.value, str):
                        yield each.value


def messages(package: Path = ROOT / "gpuswitch") -> dict[str, list[str]]:
    """Each text that is translated, with the files that have it."""
    found: dict[str, list[str]] = {text: ["argparse"] for text in ARGPARSE}
    for path in sorted(package.rglob("*.py")):
        for text in texts(path.read_text(encoding="utf-8")):
            # What has nothing but fields in it needs no other words, but for the full stop of a line of help.
            if any(map(str.isalpha, _without_fields(text))) or text == "{sentence}.":
                files = found.setdefault(text, [])
                files += [name for name in [str(path.relative_to(package.parent))] if name not in files]
    return found


def page_texts(source: str) -> Iterator[str]:
    """All texts in a script of the page for Cockpit that are translated, in order."""
    for said in _PAGE_SAYS.finditer(source):
        yield "".join(json.loads(each) for each in re.findall(_LITERAL, said[1]))


def page_messages(page: Path = ROOT / PAGE / "gpuswitch") -> dict[str, list[str]]:
    """Each text of the page for Cockpit that is translated, with the files that have it."""
    manifest = page / "manifest.json"
    found = {json.loads(manifest.read_text(encoding="utf-8"))["menu"]["index"]["label"]: [manifest.name]}
    for path in sorted(page.glob("*.js")):
        for text in page_texts(path.read_text(encoding="utf-8")):
            files = found.setdefault(text, [])
            files += [name for name in [path.name] if name not in files]
    return found


def catalogue(found: Mapping[str, list[str]], known: Mapping[str, str], language: str, of: str = "gpuswitchctl") -> str:
    """A catalogue with these texts, and the translations that are known; no language: the template of catalogues."""
    head = [
        f"# {LANGUAGES.get(language, 'Words')} of {of}. `make docs` puts new texts in.",
        'msgid ""',
        'msgstr ""',
        *map(_quoted, ("MIME-Version: 1.0\n", "Content-Type: text/plain; charset=UTF-8\n", f"Language: {language}\n")),
    ]
    entries = ["\n".join(head)]
    for text, files in sorted(found.items(), key=lambda each: (each[1][0], each[0])):
        entries.append(
            "\n".join([f"#: {' '.join(files)}", *_field("msgid", text), *_field("msgstr", known.get(text, ""))])
        )
    return "\n\n".join(entries) + "\n"


def files(folder: Path = ROOT) -> Mapping[Path, str]:
    """What is to stand in each file of the folder."""
    command, page = messages(), page_messages()
    written = {folder / LOCALE / f"{DOMAIN}.pot": catalogue(command, {}, "")}
    for language in LANGUAGES:
        path = LOCALE / language / f"{DOMAIN}.po"
        written[folder / path] = catalogue(command, _known(path), language)
        path = PAGE / "po" / f"{language}.po"
        written[folder / path] = catalogue(page, _known(path), language, "the page for Cockpit")
    return written


def _known(path: Path) -> Mapping[str, str]:
    """The translations that are in this catalogue now."""
    return read((ROOT / path).read_text(encoding="utf-8")) if (ROOT / path).exists() else {}


def _without_fields(text: str) -> str:
    return "".join(part.partition("}")[2] if number else part for number, part in enumerate(text.split("{")))


def _field(word: str, text: str) -> Iterable[str]:
    """The lines of a msgid or msgstr; several where the text has several."""
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:
        return [f"{word} {_quoted(text)}"]
    return [f'{word} ""', *map(_quoted, lines)]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def main() -> None:
    for path, text in files(Path(sys.argv[1]) if sys.argv[1:] else ROOT).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
