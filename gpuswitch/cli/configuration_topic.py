"""`help configuration`: where it is, what changes it, and every key of every table.

The keys are those of gpuswitch/config/reference.py, which the command does not import: `make docs` writes them down
beside this file (docs/generate_configuration.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuswitch.cli.output import cells, wrapped, write
from gpuswitch.cli.parser import terminal_columns
from gpuswitch.cli.translate import _, is_english, mark

KEYS = Path(__file__).with_name("configuration_keys.json")
"""Tables, each `{"heading", "sentence", "keys": [{"name", "default", "values", "sentence"}]}`, all texts."""
_WHERE = mark(
    "/etc/gpuswitch/config.toml, then /etc/gpuswitch/conf.d/*.toml by name, then variables such as "
    "GPUSWITCH_DEADLINES__UNBIND=60; the later ones override single keys. None is needed."
)
_EXAMPLE = (
    ("[[gpu]]", mark("one table for each GPU that is managed")),
    ('address = "0000:01:00.0"', ""),
    ('name = "rtx3070"', ""),
    ("", ""),
    ("[defaults]", mark("for all GPUs; each key can stand in a [[gpu]] table, too")),
    ('busy = "wait"', ""),
    ("wait_seconds = 60", ""),
)
_COMMANDS = (
    ("gpuswitchctl setup", mark("asks what it takes, and writes it")),
    ("gpuswitchctl config", mark("shows every key, its value, and the file that set it")),
    ("gpuswitchctl config edit", mark("edits a file, which is replaced only by one that can be used")),
    ("gpuswitchctl config check", mark("says what is wrong with it, without the service")),
    ("systemctl reload gpuswitchd", mark("reads it again; with a mistake in it, all stays as it was")),
)
_NARROW = 60
"""Columns of a terminal that has no room for a text beside a command."""


def explain() -> None:
    """Print all of it, broken between words for the terminal."""
    columns = terminal_columns(sys.stdout)
    write("\n".join(_lines(columns, json.loads(KEYS.read_text(encoding="utf-8")))))


def _lines(columns: int, tables: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from _at("", _(_WHERE), columns)
    yield ""
    for toml, comment in _EXAMPLE:
        if comment:
            yield from (f"  # {each}" for each in wrapped(_(comment), columns - 4))
        yield f"  {toml}".rstrip()
    yield ""
    yield from _commands(columns)
    yield ""
    yield from _at("", _("Every key of every table, as it is by default:"), columns)
    if not is_english():
        yield from _at("", _("What a key is for is said in English."), columns)
    for table in tables:
        yield ""
        yield table["heading"]
        yield from _at("  ", table["sentence"], columns)
        for key in table["keys"]:
            yield ""
            yield f"  {key['name']} = {key['default']}"
            yield from _at("      ", key["sentence"], columns)
            yield from _at("      ", _("Values: {values}", values=key["values"]), columns)


def _commands(columns: int) -> Iterator[str]:
    wide = max(cells(command) for command, _text in _COMMANDS) + 3
    for command, text in _COMMANDS:
        if columns < _NARROW:
            yield command
            yield from _at("    ", _(text), columns)
        else:
            first, *more = wrapped(_(text), columns - wide)
            yield f"{command:<{wide}}{first}"
            yield from (f"{' ' * wide}{each}" for each in more)


def _at(indent: str, text: str, columns: int) -> list[str]:
    return [f"{indent}{each}" for each in wrapped(text, columns - len(indent))]
