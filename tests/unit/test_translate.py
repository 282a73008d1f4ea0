"""The command in other languages: which is chosen, how a catalogue is read, what the service said, worded anew."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuswitch import cli
from gpuswitch.api.encoders import sentence_values
from gpuswitch.cli.client import plain_values
from gpuswitch.cli.history import _OPTIONS
from gpuswitch.cli.layout import fitted
from gpuswitch.cli.main import main
from gpuswitch.cli.output import sentence
from gpuswitch.cli.records import state_label
from gpuswitch.cli.translate import (
    KINDS,
    _,
    added_word,
    is_english,
    languages,
    ngettext,
    operation_title,
    read,
    recognized,
    reworded,
    speak,
    state_word,
    step_title,
    worded,
)
from gpuswitch.config.reference import key_of, must_be
from gpuswitch.config.schema import TABLES, names_of
from gpuswitch.errors import Failed, KernelError
from gpuswitch.host import port
from gpuswitch.model.facts import Kind
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.holders import Holder, Process, Unit, doubt
from gpuswitch.model.policy import Options
from gpuswitch.sentence import Sentence
from gpuswitch.switch.holder_policy import in_the_way
from tests.harness.facts import at

GPU = at("0000:01:00.0")
OFF = Sentence("the IOMMU is off: {remedy}", remedy=Sentence("enable AMD-Vi (often called IOMMU) in the firmware"))


@pytest.fixture(autouse=True)
def words_of_argparse() -> Iterator[None]:
    """As they were."""
    before = {name: vars(argparse)[name] for name in ("_", "ngettext")}
    yield
    vars(argparse).update(before)


def blocker(text: str) -> dict[str, Any]:
    """What `Blockers` tells of this sentence, as the command has it."""
    return {"text": text, **sentence_values(text)}


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, []),
        ({"LANG": "de_DE.UTF-8"}, ["de_DE", "de"]),
        ({"LANG": "de"}, ["de"]),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "fr_FR.UTF-8"}, ["fr_FR", "fr"]),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "fr_FR.UTF-8", "LC_ALL": "zh_CN.GB18030"}, ["zh_CN", "zh"]),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": ""}, ["de_DE", "de"]),
        ({"LANG": "de_DE@euro", "LANGUAGE": "fr:de_AT"}, ["fr", "de_AT", "de"]),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "de"}, ["de"]),
        # In these locales nothing is translated.
        ({"LC_ALL": "C", "LANGUAGE": "de"}, []),
        ({"LANG": "POSIX", "LANGUAGE": "de"}, []),
        ({"LANGUAGE": "de"}, []),
        ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, []),
        # It becomes part of a path.
        ({"LANG": "../../../etc"}, []),
        ({"LANG": "de_DE.UTF-8", "LANGUAGE": "/etc:fr"}, ["fr"]),
    ],
)
def test_which_languages_are_asked_for(environ: dict[str, str], asked: list[str]) -> None:
    assert list(languages(environ)) == asked


@pytest.mark.parametrize(
    ("asked", "yes"),
    [
        (("de_AT", "de"), "ja"),
        (("fr_CA", "fr"), "oui"),
        (("zh_CN", "zh"), "是"),
        (("zh_TW", "zh"), "yes"),
        (("it", "fr"), "oui"),
        # English is there, too.
        (("en_US", "en", "de"), "yes"),
        (("C",), "yes"),
        ((), "yes"),
    ],
)
def test_the_first_language_that_there_is(asked: tuple[str, ...], yes: str) -> None:
    speak(*asked)
    assert (_("yes"), is_english()) == (yes, yes == "yes")


def test_what_is_not_translated_stays_english() -> None:
    speak("de")
    assert _("no such words") == "no such words"
    assert _("no such {words}", words="thing") == "no such thing"


def test_a_catalogue_is_read_as_gettext_writes_it() -> None:
    po = (
        '# of somebody\nmsgid ""\nmsgstr ""\n"Language: xx\\n"\n\n'
        '#: a/file.py\nmsgid "one \\"word\\""\nmsgstr "ein \\\\n \\"Wort\\""\n\n'
        'msgid ""\n"two\\n"\n"lines"\nmsgstr ""\n"zwei\\n"\n"Zeilen"\n\n'
        'msgid "new"\nmsgstr ""\n'
    )
    assert read(po) == {'one "word"': 'ein \\n "Wort"', "two\nlines": "zwei\nZeilen"}


def test_a_sentence_of_the_service_is_worded_anew_also_further_down() -> None:
    speak("de")
    assert worded(sentence_values(OFF)) == "die IOMMU ist aus: AMD-Vi (oft IOMMU genannt) in der Firmware einschalten"


def test_several_holders_are_worded_anew() -> None:
    speak("de")
    blender = Holder(Process(1234, 1), "blender", user="alice", nodes=("/dev/dri/card0",))
    kernel = Holder(None, "nvidia", doubt=doubt("module nvidia has 2 users that no process explains"))
    daemon = Holder(Process(5, 1), "ollama", unit=Unit("ollama.service"), nodes=("/dev/nvidia0",))
    said = in_the_way(GPU, [blender, kernel, daemon])
    assert worded(sentence_values(said)).split("\n") == [
        "blender (PID 1234, Benutzer alice) hat /dev/dri/card0 geöffnet; es schließen, oder: kill 1234",
        "0000:01:00.0 wird vom Kernel benutzt: das Modul nvidia hat 2 Benutzer, die kein Prozess erklärt",
        "ollama (PID 5, ollama.service) hat /dev/nvidia0 geöffnet; ihn stoppen: systemctl stop ollama.service",
    ]


def test_what_the_kernel_says_stays_as_it_is_behind_what_did_not_work() -> None:
    speak("de")
    error = Failed(
        Sentence("{error}; nothing was changed", error=KernelError("bind", "0000:01:00.0", 5, "Input/output error"))
    )
    assert worded(sentence_values(str(error))) == (
        "nicht möglich (0000:01:00.0 binden): Input/output error; nichts wurde geändert"
    )


@pytest.mark.parametrize("language", ["de", "fr", "zh_CN"])
def test_no_operation_is_called_by_its_english_name(language: str) -> None:
    """Not even one that no step is called by, nor one of several that failed."""
    speak(language)
    verbs = re.findall(r'Words\("([^"]+)"', Path(port.__file__).read_text("utf-8"))
    assert len(verbs) > 10
    what = {"read the console map from": "the frame buffers"}
    for said in (
        *(f"{verb} {what.get(verb, 'x')}" for verb in verbs),
        "read rom of x",
        "set d3cold_allowed of x to '0'",
        "bind x to snd",
    ):
        assert operation_title(said) != said
    two = recognized("cannot load nvidia: bad; cannot bind 0000:01:00.1 to snd: bad")
    assert not re.search(r"\b(cannot|load|bind)\b", two)


def test_where_a_gpu_is_and_what_it_adds_are_told_in_the_language() -> None:
    speak("de")
    assert recognized("in the end it is on vfio-pci now") == "am Ende ist sie jetzt an vfio-pci"
    assert recognized("in the end it is on the host now") == "am Ende ist sie jetzt auf dem Host"
    assert [added_word(each) for each in ("8 virtual functions", "reserved region", "NVSwitch")] == [
        "8 virtuelle Funktionen",
        "reservierter Bereich",
        "NVSwitch",
    ]


@pytest.mark.parametrize("language", ["de", "fr", "zh_CN"])
def test_no_word_of_what_a_setting_must_be_stays_english(language: str) -> None:
    speak(language)
    for name, table in TABLES.items():
        for key in names_of(table):
            said = must_be(key_of(table, key))
            text = worded(blocker(Sentence("{text}.", text=said)))
            assert not re.search(r"\b(or|and|a|the|such|from|at most|above)\b", text), (name, key, text)


def test_parts_with_an_or_between_them_are_told_in_the_language() -> None:
    speak("de")
    said = Sentence("no such setting; write {names}", names=Sentence.joined(" or ", ["A", "B", "C"]))
    text = worded(blocker(said))
    assert text == "diese Einstellung gibt es nicht; schreiben: A oder B oder C"


def test_what_has_no_known_words_stays_english() -> None:
    """Beside what has: a service may be newer than the command."""
    speak("de")
    newer = Sentence("the {thing} is on fire", thing="card")
    within = Sentence("the IOMMU is off: {remedy}", remedy=Sentence("pray"))
    text = "\n".join([OFF, newer, within, "what {somebody} wrote"])
    told = [*map(blocker, [OFF, newer, within, "what {somebody} wrote"]), {"text": "the IOMMU is off", "kind": "old"}]
    assert reworded(text, told).split("\n") == [worded(sentence_values(OFF)), newer, within, "what {somebody} wrote"]


@pytest.mark.parametrize(
    ("said", "german"),
    [
        (
            "no GPU is named 'radeon'; this host has geforce (0000:01:00.0)",
            "keine GPU heißt 'radeon'; dieser Host hat geforce (0000:01:00.0)",
        ),
        (
            "cannot cancel switch 5f: 0000:01:00.0 is on vfio-pci already, and only its last steps are left",
            (
                "nicht möglich, die Umschaltung 5f abzubrechen: 0000:01:00.0 ist schon an vfio-pci, und nur ihre "
                "letzten Schritte sind übrig"
            ),
        ),
        # The template with the most words, and what stands in its fields as well.
        (
            "libvirt cannot be asked; nothing was changed",
            "libvirt cannot be asked; nichts wurde geändert",
        ),
        (
            "this host has no GPU\nthis host has 2 GPUs; name one of a, b",
            "dieser Host hat keine GPU\ndieser Host hat 2 GPUs; eine nennen von: a, b",
        ),
        ("cannot unload nvidia: bad", "nicht möglich (nvidia entladen): bad"),
        (
            "cannot unload nvidia: bad\nthe way back failed too: cannot load nvidia: bad",
            "nicht möglich (nvidia entladen): bad\nder Weg zurück ging auch schief: nicht möglich (nvidia laden): bad",
        ),
        (
            "cannot cancel switch 5f: it is over already (reverted)",
            "nicht möglich, die Umschaltung 5f abzubrechen: sie ist schon vorbei (zurückgenommen)",
        ),
        (
            "the kernel has not returned from 'bind 0000:01:00.1' within 2 s (process 7 is in state D)",
            (
                "der Kernel ist von '0000:01:00.1 binden' innerhalb von 2 s (Prozess 7 ist im Zustand D) nicht "
                "zurückgekehrt"
            ),
        ),
        # A unit may be called as a result is.
        ("cannot {purpose}: failed", "nicht möglich ({purpose}): failed"),
        ("the card is hot", "the card is hot"),
        ("", ""),
    ],
)
def test_what_comes_without_data_is_recognized_where_that_is_no_coincidence(said: str, german: str) -> None:
    assert recognized(said) == said
    speak("de")
    assert recognized(said) == german


@pytest.mark.parametrize(
    ("title", "german"),
    [
        ("unbind 0000:01:00.1 from snd_hda_intel", "0000:01:00.1 von snd_hda_intel lösen"),
        ("load vfio-pci", "vfio-pci laden"),
        ("keep all 4 functions awake", "wach halten: alle 4 Funktionen"),
        ("announce that the sound card of 0000:01:00.1 goes", "ankündigen, dass die Soundkarte von 0000:01:00.1 geht"),
        ("stop load.service", "load.service stoppen"),
        # Of a service that is newer.
        ("polish 0000:01:00.1", "polish 0000:01:00.1"),
        # Said elsewhere.
        ("no", "no"),
    ],
)
def test_titles_of_steps_are_told_by_their_own_words(title: str, german: str) -> None:
    assert step_title(title) == title
    speak("de")
    assert step_title(title) == german


def test_states_and_results_are_told_in_the_language() -> None:
    assert [state_word(word) for word in ("wedged", "done", "vfio")] == ["wedged", "done", "vfio"]
    speak("fr")
    assert [state_word(word) for word in ("wedged", "done", "vfio")] == ["bloqué", "terminé", "vfio"]
    assert state_label({"State": "failed", "Driver": ""}) == "échoué"
    assert state_label({"State": "host", "Driver": "nvidia"}) == "host-nvidia"


@pytest.mark.parametrize("language", ["de", "fr", "zh_CN"])
def test_who_cancelled_is_told_in_every_language(language: str) -> None:
    speak("en")
    said = "cancelled by gpuswitchctl (pid 42, uid 4000000000)"
    assert recognized(said) == "cancelled by gpuswitchctl (pid 42) of uid 4000000000"
    speak(language)
    told = recognized(said)
    assert "gpuswitchctl (pid 42) " in told
    assert told.endswith(_("of {user}", user="uid 4000000000"))
    assert "cancelled" not in told


def test_states_have_their_colours_in_every_language() -> None:
    speak("de")
    rows = [["0000:01:00.0", "auf dem Heimweg", "x"], ["0000:02:00.0", "verklemmt", "x"]]
    for columns in (0, 28):
        coloured = "\n".join(fitted(("GPU", "STATE", "MODEL"), rows, columns, colour=True))
        assert "\x1b[33mauf dem Heimweg\x1b[0m" in coloured
        assert "\x1b[1;31mverklemmt\x1b[0m" in coloured


def test_a_field_is_text_whatever_stands_in_it() -> None:
    """Names are anybody's."""
    speak("de")
    said = Sentence("user {user}", user="{user}{0.__class__:>999999999}")
    assert worded(sentence_values(said)) == "Benutzer {user}{0.__class__:>999999999}"


def test_what_it_cannot_do_is_said_once() -> None:
    speak("de")
    assert (
        sentence("die GPUs auflisten", "die IOMMU ist aus") == "nicht möglich (die GPUs auflisten): die IOMMU ist aus"
    )
    for whole in ("cannot fly", _("cannot write the output: {why}", why="voll")):
        assert sentence("die GPUs auflisten", whole) == whole
    assert sentence("die GPUs auflisten", "unterbrochen", is_whole=True) == "unterbrochen"


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("de", ["Aufruf: gpuswitchctl", "Optionen:", "diese Hilfe zeigen", "zeigen, in welchem Zustand eine GPU ist"]),
        ("fr", ["usage : gpuswitchctl", "options:", "montrer cette aide", "montrer dans quel état est un GPU"]),
        ("zh_CN", ["gpuswitchctl [-h]", "选项:", "显示本帮助并退出", "显示 GPU 的状态"]),
        ("en", ["usage: gpuswitchctl", "options:", "show this help message", "show the state of a GPU"]),
    ],
)
def test_help_is_translated_with_the_words_of_argparse(
    language: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    speak(language)
    assert main(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert [words for words in said if " ".join(words.split()) not in told] == []


def test_wrong_usage_is_told_in_the_language(capsys: pytest.CaptureFixture[str]) -> None:
    speak("de")
    assert main(["to-vfio", "--wait", "soon"]) == 2
    assert "Argument --wait: 'soon' ist keine ganze Zahl von Sekunden von 1 bis 86400" in capsys.readouterr().err


def test_json_is_english(capsys: pytest.CaptureFixture[str]) -> None:
    speak("de")
    assert main(["--json", "to-vfio", "--wait", "soon"]) == 2
    told = capsys.readouterr()
    assert "is not a whole number of seconds" in json.loads(told.out)["error"]["text"]
    assert "is not a whole number of seconds" in told.err


@pytest.mark.parametrize("topic", ["states", "exit-status", "configuration"])
def test_topics_are_translated(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for language in ("en", "de", "fr", "zh_CN"):
        speak(language)
        assert main(["help", topic]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 4


def test_one_and_many() -> None:
    speak("de")
    assert (ngettext("yes", "no", 1), ngettext("yes", "no", 2)) == ("ja", "nein")


def test_sentences_come_whole_over_the_bus() -> None:
    """As jeepney reads an `a{sv}`: each value with its signature."""
    values = sentence_values(OFF)
    assert isinstance(values["data"], dict)
    inner = {
        key: ("a{sv}" if isinstance(value, dict) else "s", value) for key, value in values["data"]["remedy"].items()
    }
    sent = {"template": ("s", values["template"]), "data": ("a{sv}", {"remedy": ("a{sv}", inner)})}
    assert plain_values(sent) == values


SAYING = {"line", "write", "problem", "warning", "hung", "answer", "of", "interrupted", "CtlError", "_caption", "_said"}
"""What is called with texts for people, in gpuswitch/cli."""


@pytest.mark.parametrize("module", sorted(Path(cli.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_is_said_to_people_goes_through_the_translation(module: Path) -> None:
    assert list(untranslated(module.read_text(encoding="utf-8"))) == []


def untranslated(source: str) -> Iterator[str]:
    """Texts with words in them that are said as they are: literals, also where a value is put in, and in a choice."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for argument in node.args if called in SAYING else ():
            for each in (argument.body, argument.orelse) if isinstance(argument, ast.IfExp) else (argument,):
                parts = each.values if isinstance(each, ast.JoinedStr) else [each]
                said = "".join(
                    part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
                if re.search("[A-Za-z]{3}", said.replace("gpuswitchctl", "")):
                    yield said


def test_the_rule_can_fail() -> None:
    said = 'line("no words"); write(f"{a} is not {b}"); CtlError.of(Failed, "bad" if a else _("fine")); line(_("fine"))'
    assert list(untranslated(said)) == ["no words", " is not ", "bad"]


def test_options_of_a_switch_are_known_by_their_words() -> None:
    assert set(_OPTIONS) == {field.name for field in dataclasses.fields(Options)}


def test_what_a_function_is_has_words_for_all_that_there_are() -> None:
    assert set(KINDS) == {kind.value for kind in Kind}


def test_a_gpu_is_no_sentence() -> None:
    """Its text is what it is, in any language."""
    speak("de")
    assert worded(sentence_values(str(Gpu(GPU, (GPU,)).address))) == "0000:01:00.0"


def test_an_address_is_no_user() -> None:
    assert recognized("uid 0 has it, and uid 0000:01:00.0") == "uid 0 (root) has it, and uid 0000:01:00.0"
