"""Write units/gpuswitch.catalog and docs/logs.md from gpuswitch/log/. `python docs/generate_catalog.py [FOLDER]`.

The catalog is what `journalctl -x` explains events by (systemd.catalog(7)). Its other languages are those of the
command: gpuswitch/cli/locale/.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gpuswitch.cli.translate import DOMAIN, read
from gpuswitch.log.events import EVENTS, LogEvent
from gpuswitch.log.fields import FIELDS

ROOT = Path(__file__).parents[1]
LOCALE = ROOT / "gpuswitch" / "cli" / "locale"
WIDE = 78
_COMMAND = re.compile(r"gpuswitchctl(?: [a-z@][a-z_@A-Z]*)+")
_UNBROKEN = "\x1f"
_CATALOG_HEAD = """\
# What the lines of gpuswitchd's log mean: `journalctl -x -u gpuswitchd` shows it below them.
# Made by docs/generate_catalog.py from gpuswitch/log/events.py; change that, then run `make docs`.
"""
_PAGE_HEAD = """\
# The log

<!-- Made by docs/generate_catalog.py from gpuswitch/log/; change that, then run `make docs`. -->

gpuswitchd writes to the journal of systemd: one line for what has changed, none for what is as it was. `journalctl
-u gpuswitchd` shows it, with `-x` each event explained, with `-o verbose` all that stands beside the text. Started by
hand, it writes the same lines to standard error.

<!-- needs: a journal with these switches -->
```console
$ journalctl -u gpuswitchd SWITCH_ID=5f0c3a1b          # all of one switch
$ journalctl -u gpuswitchd GPU=0000:01:00.0 -p warning  # what went wrong with one GPU
$ journalctl -x MESSAGE_ID={failed}                     # each switch that failed, explained
```

## Fields

What is not known, or is nothing, is left out. A line has them whichever part of the service writes it while it works on
that switch.

"""
_PAGE_EVENTS = """
## Events

An id is for ever. `RESULT=` and `STATE=` tell more than one event from another in a program, too.

"""


def catalog() -> str:
    """All events, each in all languages."""
    languages = {path.parent.name: read(path.read_text(encoding="utf-8")) for path in LOCALE.glob(f"*/{DOMAIN}.po")}
    entries = [_CATALOG_HEAD]
    for event in EVENTS:
        entries.append(_entry(event, "", {}))
        for language, known in sorted(languages.items()):
            if event.subject in known and event.text in known:
                entries.append(_entry(event, f" {language}", known))
    return "\n".join(entries)


def _entry(event: LogEvent, language: str, known: Mapping[str, str]) -> str:
    subject, text = (known.get(each, each) for each in (event.subject, event.text))
    head = (f"-- {event.message_id}{language}", f"Subject: {subject}", "Defined-By: gpuswitch")
    lines = (*head, "Documentation: man:gpuswitchctl(1)", "", *_wrapped(text))
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> Iterator[str]:
    """Lines of it, with no command broken that people may want to copy."""
    whole = _COMMAND.sub(lambda found: found[0].replace(" ", _UNBROKEN), text)
    for line in textwrap.wrap(whole, WIDE, break_long_words=False, break_on_hyphens=False):
        yield line.replace(_UNBROKEN, " ")


def page() -> str:
    """The whole page."""
    failed = next(event.message_id for event in EVENTS if "failed" in event.subject)
    return "".join(
        [
            _PAGE_HEAD.replace("{failed}", failed),
            *_table(("field", "says"), ((f"`{name}`", meaning) for name, meaning in FIELDS.items())),
            _PAGE_EVENTS,
            *_table(("`MESSAGE_ID`", "says"), ((f"`{each.message_id}`", _plain(each.subject)) for each in EVENTS)),
        ]
    )


def _plain(subject: str) -> str:
    """With its fields as the reader of a table has them."""
    for name in FIELDS:
        subject = subject.replace(f"@{name}@", f"`{name}`")
    return subject


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    headings = list(headings)
    yield f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    yield from (f"| {' | '.join(row)} |\n" for row in rows)


def files(folder: Path = ROOT) -> Mapping[Path, str]:
    """What is to stand in each file."""
    return {folder / "units" / "gpuswitch.catalog": catalog(), folder / "docs" / "logs.md": page()}


def main() -> None:
    for path, text in files(Path(sys.argv[1]) if sys.argv[1:] else ROOT).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
