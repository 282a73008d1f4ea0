"""Write gpuswitch/cli/locale/: what is translated, and in each catalogue what is new. `... [FOLDER]`: write it there.

Translations stay; what nobody says any more goes. An empty msgstr waits for somebody who knows the language.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gpuswitch.cli.translate import DOMAIN, read

ROOT = Path(__file__).parents[1]
LOCALE = ROOT / "gpuswitch" / "cli" / "locale"
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


def catalogue(found: Mapping[str, list[str]], known: Mapping[str, str], language: str) -> str:
    """A catalogue with these texts, and the translations that are known; no language: the template of catalogues."""
    head = [
        f"# {LANGUAGES.get(language, 'Words')} of gpuswitchctl. `make docs` puts new texts in.",
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


def files(folder: Path = LOCALE) -> Mapping[Path, str]:
    """What is to stand in each file of the folder."""
    found = messages()
    written = {folder / f"{DOMAIN}.pot": catalogue(found, {}, "")}
    for language in LANGUAGES:
        path = LOCALE / language / f"{DOMAIN}.po"
        known = read(path.read_text(encoding="utf-8")) if path.exists() else {}
        written[folder / path.relative_to(LOCALE)] = catalogue(found, known, language)
    return written


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
    for path, text in files(Path(sys.argv[1]) if sys.argv[1:] else LOCALE).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
