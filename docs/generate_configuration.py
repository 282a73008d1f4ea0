"""Write docs/configuration.md, and the keys for `gpuswitchctl help configuration`, from gpuswitch/config/schema.py.

`python docs/generate_configuration.py [PAGE KEYS]`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpuswitch.cli.configuration_topic import KEYS
from gpuswitch.config.reference import Key, TableReference, must_be, reference
from gpuswitch.config.schema import ENVIRONMENT

_INTRODUCTION = f"""\
# Configuration

<!-- Made by docs/generate_configuration.py from gpuswitch/config/schema.py; change those, then run `make docs`. -->

None is needed. `/etc/gpuswitch/config.toml` is read first, then the files in `/etc/gpuswitch/conf.d/` that end in
`.toml`, by name; a key in a later file wins. `[[gpu]]` tables with the same address (or, without one, the same
`match`), in different files, are one table. Last come variables of the service's environment:
`{ENVIRONMENT}DEADLINES__UNBIND=40` sets `unbind` in `[deadlines]`;
lists and whole tables are JSON there. All files are TOML, in UTF-8.

`gpuswitchctl config check` tells what is wrong before the service reads it, each as `FILE:LINE: key: what to write`,
which editors go to, and ends with 0 where it can be used, else with 2. `gpuswitchctl config edit` checks before it
replaces a file. `gpuswitchctl config` shows what is in force and what set it; `--changed` only what is not as by
default. One mistake anywhere refuses the whole, and the service keeps what it had. What to set for which machine
stands in [operations.md](operations.md) and [hardware.md](hardware.md).
"""


def page() -> str:
    """The whole page."""
    return _INTRODUCTION + "".join(map(_section, reference()))


def keys() -> str:
    """What the command tells of each key, which imports nothing of the service: gpuswitch/cli/configuration_topic.py
    has the form.
    """
    tables = [
        {"heading": table.heading, "sentence": table.sentence, "keys": list(map(_told, table.keys))}
        for table in reference()
    ]
    return f"{json.dumps(tables, indent=1)}\n"


def _told(key: Key) -> dict[str, str]:
    return {"name": key.name, "default": key.default, "values": must_be(key), "sentence": key.sentence}


def _section(table: TableReference) -> str:
    head = "| key | type | values | default | |\n| --- | --- | --- | --- | --- |\n"
    return f"\n## {table.heading}\n\n{table.sentence}\n\n{head}{''.join(map(_row, table.keys))}"


def _row(key: Key) -> str:
    values = f"{key.values} {key.unit}".strip()
    default = f"`{key.default}`" if key.default else "required"
    return f"| `{key.name}` | {key.type} | {values} | {default} | {key.sentence} |\n"


if __name__ == "__main__":
    target, beside = map(Path, sys.argv[1:]) if sys.argv[1:] else (Path(__file__).with_name("configuration.md"), KEYS)
    target.write_text(page())
    beside.write_text(keys())
