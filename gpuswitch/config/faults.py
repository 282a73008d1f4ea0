"""What is wrong with a value or a key, and what to write instead: the end of a sentence that has named file and key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from gpuswitch.config.places import Location
from gpuswitch.config.reference import Key, key_of, must_be
from gpuswitch.config.schema import ENVIRONMENT, TABLES, names_of
from gpuswitch.config.shown import shown
from gpuswitch.sentence import Sentence

_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|s|sec|min|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def reason(error: ErrorDetails) -> Sentence:
    """One fault that pydantic found in `Tables`."""
    location = error["loc"]
    match error["type"]:
        case "extra_forbidden":
            return _no_such_key(location)
        case "missing":
            return Sentence("this key is required: {what}", what=must_be(_key(location)))
        case "value_error":
            return Sentence.of(error["ctx"]["error"])
        case "model_type":
            return Sentence(
                "must be a table: write {heading} on a line of its own, and its keys below it",
                heading=_heading(str(location[0])),
            )
        case "tuple_type":
            return _no_list(location, error["input"])
        case "string_type":
            return Sentence("must be text in quotes, not {value}", value=shown(error["input"]))
    return _must_be(_key(location), error["input"])


def no_such_variable(variable: str) -> Sentence:
    """About a variable that begins as ours do, and means nothing."""
    plain = variable.upper()
    names = [f"{ENVIRONMENT}{table}".upper() for table in TABLES]
    names += [f"{ENVIRONMENT}{table}__{key}".upper() for table in TABLES if table != "gpu" for key in _keys(table)]
    # One that has but the key, or one _ where there are two.
    alike = [
        name for name in names if name.replace("__", "_") == plain or name.endswith(f"__{plain[len(ENVIRONMENT) :]}")
    ]
    if alike:
        return Sentence("no such setting; write {names}", names=Sentence.joined(" or ", alike))
    if meant := _nearest(plain, names):
        return Sentence("no such setting; did you mean {word}?", word=meant)
    return Sentence("no such setting; known are {names}", names=", ".join(names[: len(TABLES)]))


def _no_such_key(location: Location) -> Sentence:
    """The nearest key that there is, or the tables that have this one."""
    top, name = str(location[0]), str(location[-1])
    homes = [table for table in TABLES if name in _keys(table)]
    if len(location) == 1:
        if homes:
            return Sentence("no such key outside of a table; it belongs in {tables}", tables=_in_words(homes))
        if meant := _nearest(name, TABLES):
            return Sentence("no such key; did you mean {word}?", word=meant)
        return Sentence("no such key; known are {names}", names=", ".join(TABLES))
    known = _keys(top)
    if meant := _nearest(name, known):
        return Sentence("no such key; did you mean {word}?", word=meant)
    if homes:
        return Sentence(
            "no such key in {heading}; it belongs in {tables}", heading=_heading(top), tables=_in_words(homes)
        )
    return Sentence("no such key; known are {names}", names=", ".join(known))


def _no_list(location: Location, value: object) -> Sentence:
    if location == ("gpu",):
        return Sentence("must be tables: write [[gpu]] on a line of its own, and the keys of the GPU below it")
    return Sentence("must be a list: write [{item}]", item=json.dumps(value[:80]) if isinstance(value, str) else "...")


def _must_be(key: Key, value: object) -> Sentence:
    must = must_be(key)
    if type(value) is not str or key.type == "string":
        return Sentence("must be {what}, not {value}", what=must, value=shown(value))
    if '"' in must:
        said = Sentence("must be {what}, not {value}", what=must, value=shown(value))
    else:
        said = Sentence("must be {what}, without quotes, not {value}", what=must, value=shown(value))
    instead = _instead(key, value)
    return Sentence("{fault}; write {text}", fault=said, text=instead) if instead else said


def _instead(key: Key, text: str) -> str:
    """What a text most likely means; "" where that cannot be told."""
    words = text.strip().lower()
    if key.type not in {"number", "integer"}:
        meant = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return meant.get(words, "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", words):
        return words
    span = _SPAN.fullmatch(words)
    return f"{float(span[1]) * _SECONDS[span[2]]:g}" if span and key.unit == "seconds" else ""


def _key(location: Location) -> Key:
    """The key that stands there, or that the value belongs to which does."""
    return key_of(TABLES[str(location[0])], str(location[2 if location[0] == "gpu" else 1]))


def _keys(table: str) -> list[str]:
    return list(names_of(TABLES[table]))


def _heading(table: str) -> str:
    return "[[gpu]]" if table == "gpu" else f"[{table}]"


def _in_words(tables: list[str]) -> Sentence:
    if "defaults" in tables:
        return Sentence("[defaults], for all GPUs, or in [[gpu]], for one")
    return Sentence.joined(" or ", map(_heading, tables))


def _nearest(word: str, names: Iterable[str]) -> str:
    """The name that was meant, "" where that cannot be told."""
    return next(iter(difflib.get_close_matches(word, list(names), n=1)), "")
