"""What the command says in the language of whoever reads it, by gettext's catalogues and variables.

A catalogue is read as it is written (`locale/LANGUAGE/gpuswitch.po`): nothing is to be made of it when the package is
built, and in English nothing is read. What programs read (`--json`, words of the bus) is never translated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from gpuswitch.sentence import fields, filled, values

TYPE_CHECKING = False  # as typing has it, which takes longer to import than argparse
if TYPE_CHECKING:
    from typing import Any

DOMAIN = "gpuswitch"
_FOLDER = f"{os.path.dirname(__file__)}/locale"  # noqa: PTH120 -- pathlib takes longer to import than argparse
_TELLING = 12
"""Letters that a text has in common with a template, for that to be no coincidence."""
_TELLING_WITHIN = 7
"""The same of what stands in a field of one that was recognized: `within 2 s`."""
_ENGLISH: Mapping[str, str] = {}
_spoken: list[Mapping[str, str]] = []
"""The one catalogue that is in use, once that is known."""
_source: list[str] = []
"""Its text."""
_titles: list[Mapping[str, str]] = []
"""What of it are titles of steps, once one is said."""
_STEPS = "gpuswitch/switch/steps/"
"""Where these are worded."""


_KERNEL_ERROR = "cannot {operation} {subject}: {message}"
"""What one operation failed with (`KernelError` in gpuswitch/errors.py)."""
_CANNOT = "cannot {purpose}: {text}"
"""What the command could not do, and why; an operation that failed is told the same way."""


def _(text: str, /, **data: object) -> str:
    """The text in the language of whoever reads it; with `data`, put into its fields."""
    translated = catalogue().get(text, text)
    return filled(translated, {name: str(value) for name, value in data.items()}) if data else translated


def ngettext(one: str, many: str, number: int) -> str:
    """The text for that many: the languages that there are have two forms at most."""
    return _(one if number == 1 else many)


def mark(text: str) -> str:
    """Mark a text that is translated where it is shown."""
    return text


def marks(*texts: str) -> tuple[str, ...]:
    """Mark several."""
    return texts


def is_english() -> bool:
    """Whether nothing is translated."""
    return not catalogue()


def speak(*languages: str) -> None:
    """The first of these languages that there is, from here on, whatever the environment says: `speak("en")`."""
    _titles.clear()
    _spoken[:] = [_first(languages)]


@contextmanager
def english() -> Iterator[None]:
    """In here nothing is translated: for what others are to read."""
    before = _spoken[:]
    _spoken[:] = [_ENGLISH]
    try:
        yield
    finally:
        _spoken[:] = before


def worded(sentence: Mapping[str, Any]) -> str:
    """A sentence of the service, by its `template` and `data` (docs/dbus.md).

    Raises:
        KeyError: it has no known words in this language, or comes without what it was made of.
    """
    template = str(sentence["template"])
    data = {
        name: worded(value) if isinstance(value, Mapping) else _keyword(name, str(value))
        for name, value in sentence["data"].items()
    }
    if template == "{text}":
        # What somebody else said, such as the kernel.
        return data["text"]
    if template == _KERNEL_ERROR:
        return _kernel_error(f"{data['operation']} {data['subject']}", data["message"])
    wordless = not any(map(str.isalpha, filled(template, dict.fromkeys(data, ""))))
    return filled(template if wordless else _listed(template) or catalogue()[template], data)


def _listed(template: str) -> str:
    """The template of parts with the same between them (`Sentence.joined`); "" where it is none, or not known so."""
    between = template.partition("}")[2].partition("{")[0]
    parts = [f"{{part{number}}}" for number in range(1, len(fields(template)) + 1)]
    known = catalogue().get(between)
    return known.join(parts) if known and template == between.join(parts) else ""


def _keyword(field: str, value: str) -> str:
    """A state, a result, the status of a step, what a function is, an operation, or where a GPU is, in this language,
    where a field says that it is one: a unit may be called so, too.
    """
    if field == "operation":
        return operation_title(value)
    if field == "place":
        known = catalogue().get(value)
        return known or (_("on {driver}", driver=value.removeprefix("on ")) if value.startswith("on ") else value)
    return state_word(value) if field in _OF_KEYWORDS and value in _KEYWORDS else value


def reworded(text: str, sentences: Iterable[Mapping[str, Any]]) -> str:
    """The text with these sentences of the service (`text`, beside `template` and `data`) in this language.

    What has no known words stays English.
    """
    for sentence in sentences:
        try:
            text = text.replace(str(sentence["text"]), worded(sentence))
        except KeyError:
            continue
    return text


def recognized(text: str) -> str:
    """What the service said without telling of what it was made, in this language: each line by the template that it
    has most of. English where none fits. Users have their names.
    """
    if not is_english():
        text = "\n".join(_recognized(line, catalogue(), _TELLING) for line in text.split("\n"))
    return _with_names(text)


def step_title(text: str) -> str:
    """The title of a step in this language; what is none that we know stays English. Users have their names."""
    if not is_english():
        text = _recognized(text, _step_titles(), 1, alone=1)
    return _with_names(text)


def _step_titles() -> Mapping[str, str]:
    if not _titles:
        _titles.append(read(_source[0], of=_STEPS))
    return _titles[0]


ADDS = marks(
    "1 virtual function",
    "{count} virtual functions",
    "1 mediated device",
    "{count} mediated devices",
    "virtual function",
    "firmware frame buffer",
    "reserved region",
)
"""What a function brings with it (`HostFacts.adds` in gpuswitch/model/facts.py)."""


def added_word(text: str) -> str:
    """What a function brings with it, in this language."""
    known = {each: catalogue()[each] for each in ADDS if each in catalogue()}
    return _recognized(text, known, 1, alone=1)


OPERATIONS = marks(
    "bind {function}",
    "read the settings of {functions}",
    "find the modules for {function}",
    "find the modules {modules}",
    "keep awake {functions}",
    "set power/control of {functions}",
    "set driver_override of {functions}",
    "read {path} of {function}",
    "send {action} for the {subsystem} cards of {functions}",
    "open {node}",
    "close {node}",
    "read the console map from the frame buffers",
    "show text consoles on {frame_buffer}",
    "read the persistence mode of {function}",
    "turn on the persistence mode of {function}",
    "turn off the persistence mode of {function}",
    "read the configuration space of {functions}",
    "remove from the PCI bus {functions}",
    "rescan the bus of {functions}",
    "ask systemd about {units}",
    "look for holders",
)
"""Those of a host that are not called as the step is that does them (gpuswitch/host/port.py)."""


def operation_title(text: str) -> str:
    """What an operation is called, in this language: as a step that does the same, where there is one."""
    if is_english():
        return text
    known = {each: catalogue()[each] for each in OPERATIONS if each in catalogue()}
    return _recognized(text, {**known, **_step_titles()}, 1, alone=1)


def _kernel_error(operation: str, message: str) -> str:
    """What did not work by the name that its step has, and what it failed with; further ones stand behind it."""
    message, more, others = message.partition("; cannot ")
    said = _(_CANNOT, purpose=operation_title(operation), text=_recognized(message, catalogue(), _TELLING_WITHIN))
    return f"{said}; {_recognized(f'cannot {others}', catalogue(), _TELLING)}" if more else said


def _with_names(text: str) -> str:
    if "uid " not in text:
        return text
    from gpuswitch.cli.users import with_names  # noqa: PLC0415 -- for few

    return with_names(text)


STATES = marks("detaching", "reattaching", "recovering", "failed", "wedged", "unknown", "absent")
"""But host and vfio, which are the same in every language, as they are typed."""
RESULTS = marks("done", "reverted", "failed", "cancelled", "wedged", "drifted")
STATUSES = (*marks("running", "done", "failed", "cancelled", "reverting", "reverted", "interrupted"), "revert-failed")
"""Of steps."""
_PLAIN: Mapping[str, str] = {"revert-failed": mark("not taken back")}
"""What people read for a word that is none of theirs."""


KINDS = marks("display", "accelerator", "audio", "usb", "ucsi", "bridge", "chipset", "network", "storage", "other")
"""What a PCI function is."""


_KEYWORDS = frozenset((*STATES, *RESULTS, *STATUSES, *KINDS))
_OF_KEYWORDS = frozenset({"state", "result", "status", "kind"})
"""Fields that have one of these."""


def state_word(text: str) -> str:
    """A state, a result, the status of a step, or what a function is, in this language."""
    word = _PLAIN.get(text, text)
    return catalogue().get(word, word)


def _recognized(line: str, known: Mapping[str, str], least: int, *, alone: int = _TELLING) -> str:
    """`least`: letters that it has in common with a template; `alone`: with one that has no fields, since a word alone
    may be the name of something.
    """
    fitting = [(_letters(each), each) for each in known if values(each, line) is not None]
    enough = [
        (letters, each)
        for letters, each in fitting
        # Nothing else begins so that the service says (docs/style.md).
        if letters >= (least if "{" in each else alone) or each.startswith(("cannot {", "cancelled by {"))
    ]
    if not enough:
        # `within 2 s (process 7 is in state D)`: two sentences, one behind the other.
        before, bracket, behind = line.removesuffix(")").partition(" (")
        if not bracket or not line.endswith(")"):
            return line
        said = [_recognized(each, known, least, alone=alone) for each in (before, behind)]
        return f"{said[0]} ({said[1]})"
    _count, template = max(enough)
    found = values(template, line) or {}
    if template == _KERNEL_ERROR:
        return _kernel_error(f"{found['operation']} {found['subject']}", found["message"])
    if template == _CANNOT:
        return _kernel_error(found["purpose"], found["text"])
    within = min(least, _TELLING_WITHIN)
    words = {name: _keyword(name, _recognized(value, known, within, alone=alone)) for name, value in found.items()}
    return filled(known[template], words)


def _letters(template: str) -> int:
    return sum(map(str.isalpha, filled(template, dict.fromkeys(fields(template), ""))))


def catalogue() -> Mapping[str, str]:
    """What is said in another way than in English."""
    if not _spoken:
        _spoken.append(_first(languages(os.environ)))
    return _spoken[0]


def _first(names: Iterable[str]) -> Mapping[str, str]:
    """That of the first language that there is."""
    for name in names:
        if name.partition("_")[0] == "en":
            break
        try:
            with open(f"{_FOLDER}/{name}/{DOMAIN}.po", encoding="utf-8") as file:  # noqa: PTH123 -- as above
                _source[:] = [file.read()]
                return read(_source[0])
        except OSError:
            continue
    return _ENGLISH


def languages(environ: Mapping[str, str]) -> Iterator[str]:
    """The languages that are asked for, the best first: `de_AT`, then `de`.

    As gettext has it (The GNU gettext manual, "Locale Environment Variables"): LANGUAGE counts in no C locale.
    """
    locale = next(filter(None, map(environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "C")
    if locale in {"C", "POSIX"}:
        return
    for name in (environ.get("LANGUAGE") or locale).split(":"):
        # de_AT.UTF-8@euro
        plain = name.partition("@")[0].partition(".")[0]
        # It becomes part of a path.
        if plain.replace("_", "").isalnum():
            yield from dict.fromkeys((plain, plain.partition("_")[0]))


def read(po: str, of: str = "") -> Mapping[str, str]:
    """The translations in the text of a catalogue; what is not translated is not there. `of`: of these modules only."""
    found: dict[str, str] = {}
    for entry in po.split("\n\n"):
        if of not in entry.partition("\nmsgid ")[0]:
            continue
        texts, word = {"msgid": "", "msgstr": ""}, ""
        for line in entry.split("\n"):
            before, quote, rest = line.partition('"')
            if quote and not before.startswith("#"):
                word = before.rstrip() or word
                texts[word] += _unescaped(rest[: rest.rindex('"')])
        if texts["msgid"] and texts["msgstr"]:
            found[texts["msgid"]] = texts["msgstr"]
    return found


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    return "\\".join(part.replace('\\"', '"').replace("\\n", "\n") for part in text.split("\\\\"))
