"""What is wrong with a value or a key, and what to write instead: the end of a sentence that has named file and key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from gpuswitch.config.places import Location
from gpuswitch.config.reference import TABLES, Key, key_of, must_be
from gpuswitch.config.schema import ENVIRONMENT
from gpuswitch.config.shown import shown

_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|s|sec|min|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def reason(error: ErrorDetails) -> str:
    """One fault that pydantic found in `Tables`."""
    location = error["loc"]
    match error["type"]:
        case "extra_forbidden":
            return _no_such_key(location)
        case "missing":
            return f"this key is required: {must_be(_key(location))}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type":
            return f"must be a table: write {_heading(str(location[0]))} on a line of its own, and its keys below it"
        case "tuple_type":
            return _no_list(location, error["input"])
        case "string_type":
            return f"must be text in quotes, not {shown(error['input'])}"
    return _must_be(_key(location), error["input"])


def no_such_variable(variable: str) -> str:
    """About a variable that begins as ours do, and means nothing."""
    plain = variable.upper()
    names = [f"{ENVIRONMENT}{table}".upper() for table in TABLES]
    names += [f"{ENVIRONMENT}{table}__{key}".upper() for table in TABLES if table != "gpu" for key in _keys(table)]
    # One that has but the key, or one _ where there are two.
    alike = [
        name for name in names if name.replace("__", "_") == plain or name.endswith(f"__{plain[len(ENVIRONMENT) :]}")
    ]
    if alike:
        return f"no such setting; write {' or '.join(alike)}"
    return f"no such setting{_suggest(plain, names, names[: len(TABLES)])}"


def _no_such_key(location: Location) -> str:
    """The nearest key that there is, or the tables that have this one."""
    top, name = str(location[0]), str(location[-1])
    homes = [table for table in TABLES if name in _keys(table)]
    if len(location) == 1:
        if homes:
            return f"no such key outside of a table; it belongs in {_in_words(homes)}"
        return f"no such key{_suggest(name, TABLES, TABLES)}"
    known = _keys(top)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"no such key; did you mean {close[0]}?"
    if homes:
        return f"no such key in {_heading(top)}; it belongs in {_in_words(homes)}"
    return f"no such key{_suggest(name, (), known)}"


def _no_list(location: Location, value: object) -> str:
    if location == ("gpu",):
        return "must be tables: write [[gpu]] on a line of its own, and the keys of the GPU below it"
    return f"must be a list: write [{json.dumps(value[:80]) if isinstance(value, str) else '...'}]"


def _must_be(key: Key, value: object) -> str:
    must = f"must be {must_be(key)}"
    if type(value) is not str or key.type == "string":
        return f"{must}, not {shown(value)}"
    quotes = "" if '"' in must else ", without quotes"
    return f"{must}{quotes}, not {shown(value)}{_instead(key, value)}"


def _instead(key: Key, text: str) -> str:
    """What a text most likely means."""
    words = text.strip().lower()
    if key.type not in {"number", "integer"}:
        meant = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return f"; write {meant[words]}" if words in meant else ""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", words):
        return f"; write {words}"
    span = _SPAN.fullmatch(words)
    return f"; write {float(span[1]) * _SECONDS[span[2]]:g}" if span and key.unit == "seconds" else ""


def _key(location: Location) -> Key:
    """The key that stands there, or that the value belongs to which does."""
    return key_of(TABLES[str(location[0])], str(location[2 if location[0] == "gpu" else 1]))


def _keys(table: str) -> list[str]:
    return list(TABLES[table].model_fields)


def _heading(table: str) -> str:
    return "[[gpu]]" if table == "gpu" else f"[{table}]"


def _in_words(tables: list[str]) -> str:
    if "defaults" in tables:
        return "[defaults], for all GPUs, or in [[gpu]], for one"
    return " or ".join(map(_heading, tables))


def _suggest(word: str, names: Iterable[str], known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
