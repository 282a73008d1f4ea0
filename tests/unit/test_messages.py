"""The catalogues: all that is said is in each, with the same fields, and nothing else."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from gpuswitch.cli.translate import read
from gpuswitch.sentence import fields

ROOT = Path(__file__).parents[2]
LOCALE = ROOT / "gpuswitch" / "cli" / "locale"
LANGUAGES = sorted(path.parent.name for path in LOCALE.glob("*/gpuswitch.po"))
PAGE = ROOT / "contrib" / "cockpit"
PERCENT = re.compile(r"%(?:\(\w+\))?[sr]")
COMMANDS = re.compile(
    r"\b(?:(?:gpuswitchctl|systemctl|loginctl|virsh|mdevctl) [-\w]+(?: \{\w+\})?|echo [\w{}]+ > [\w/{}]+"
    r"|(?:modprobe(?: -r)?|kill|rm) \{\w+\})"
)


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_messages", ROOT / "docs" / "generate_messages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = program()


def catalogue(language: str) -> Mapping[str, str]:
    return read((LOCALE / language / "gpuswitch.po").read_text(encoding="utf-8"))


def test_there_are_these_languages() -> None:
    assert LANGUAGES == sorted(GENERATE.LANGUAGES) == ["de", "fr", "zh_CN"]


def test_the_files_are_current() -> None:
    """`make docs` writes them."""
    stale = [path.name for path, text in GENERATE.files().items() if path.read_text(encoding="utf-8") != text]
    assert stale == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_that_is_said_is_translated_and_nothing_else(language: str) -> None:
    assert set(catalogue(language)) == set(GENERATE.messages())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_the_same_fields(language: str) -> None:
    found = catalogue(language).items()
    assert [text for text, words in found if set(fields(text)) != set(fields(words))] == []
    assert [text for text, words in found if sorted(PERCENT.findall(text)) != sorted(PERCENT.findall(words))] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_as_many_lines_and_ends_alike(language: str) -> None:
    """A question, say, leaves room for its answer. What is told in lines of its own may need more of them."""
    for text, words in catalogue(language).items():
        assert words.endswith("\n") == text.endswith("\n")
        assert ("\n" in words) == ("\n" in text)
        assert words.endswith("] ") == text.endswith("] ")


@pytest.mark.parametrize("language", LANGUAGES)
def test_commands_are_the_same_in_each_language(language: str) -> None:
    """They are to be copied."""
    found = catalogue(language).items()
    assert [
        (command, words) for text, words in found for command in COMMANDS.findall(text) if command not in words
    ] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_cannot_be_done_begins_so(language: str) -> None:
    """By this beginning `output.sentence` knows what says all by itself."""
    words = catalogue(language)
    whole = [text for text in words if text.startswith("cannot ")]
    assert len(whole) > 1
    assert [text for text in whole if not words[text].startswith(words["cannot "])] == []


def test_the_words_of_argparse_are_its_own() -> None:
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    said = {each.value for each in ast.walk(ast.parse(source)) if isinstance(each, ast.Constant)}
    assert [text for text in GENERATE.ARGPARSE if text not in said] == []


def made_up() -> Iterator[str]:
    """Calls that say what nobody can translate: a text that is put together before it is looked up."""
    for path in sorted((ROOT / "gpuswitch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in GENERATE.SAYING:
                yield from (f"{path.name}:{node.lineno}" for each in node.args if unknown(each))


def unknown(argument: ast.expr) -> bool:
    return isinstance(argument, ast.JoinedStr | ast.BinOp)


def test_no_text_is_put_together_before_it_is_translated() -> None:
    assert list(made_up()) == []


def page_catalogue(language: str) -> Mapping[str, str]:
    return read((PAGE / "po" / f"{language}.po").read_text(encoding="utf-8"))


def test_the_page_for_cockpit_has_the_languages_of_the_command() -> None:
    assert sorted(path.stem for path in (PAGE / "po").iterdir()) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_texts_of_the_page_for_cockpit_are_translated_and_nothing_else(language: str) -> None:
    """Each with the same fields."""
    found = page_catalogue(language)
    assert set(found) == set(GENERATE.page_messages())
    wrong = [text for text, words in found.items() if set(re.findall(r"\$\d", text)) != set(re.findall(r"\$\d", words))]
    assert wrong == []


def test_no_text_of_the_page_for_cockpit_is_put_together_before_it_is_translated() -> None:
    scripts = [path.read_text(encoding="utf-8") for path in (PAGE / "gpuswitch").glob("*.js")]
    whole = [text for script in scripts for text in GENERATE.page_texts(script)]
    assert len(whole) == sum(len(re.findall(r"\b_\(", script)) for script in scripts)


def test_the_rules_can_fail() -> None:
    page = 'f(_("a $0"), _(\n"b " +\n  "\\"c\\" …"), my_("d"), _(name), _(`e`))'
    assert list(GENERATE.page_texts(page)) == ["a $0", 'b "c" …']
    source = (
        '_("a {b}", b=1)\nSentence("c" if x else "d")\nngettext("e", "f", 2)\nmarks("g", "h")\n_(name)\nother("i")\n'
    )
    assert sorted(GENERATE.texts(source)) == ["a {b}", "c", "d", "e", "f", "g", "h"]
    assert unknown(ast.parse('f"a {b}"', mode="eval").body)
    assert unknown(ast.parse('"a" + b', mode="eval").body)
    assert COMMANDS.findall("first: echo 1 > {file}, then gpuswitchctl recover {gpu}") == [
        "echo 1 > {file}",
        "gpuswitchctl recover {gpu}",
    ]
    po = GENERATE.catalogue({'say "it"\n\\ now\n': ["a.py"]}, {'say "it"\n\\ now\n': "sag\nes\n"}, "de")
    assert read(po) == {'say "it"\n\\ now\n': "sag\nes\n"}
