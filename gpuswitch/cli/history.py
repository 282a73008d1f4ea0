"""The verbs that tell of finished switches, and of what somebody else moved: `history`, `show`."""

from __future__ import annotations

import pwd
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpuswitch.cli.client import Service
from gpuswitch.cli.output import as_json, clean, duration, line, moment, on_terminal, pairs, table

Values = Mapping[str, Any]

_SHORT = 60
"""Characters of a reason in a table."""


def history(service: Service, args: Namespace) -> int:
    if args.gpu:
        # The service knows every spelling of its name.
        address = service.gpu(args.gpu).properties()["Address"]
        found = [entry for entry in service.history(0) if entry["gpu"] == address]
        found = found[: args.limit or None]
    else:
        found = service.history(args.limit)
    if args.json:
        as_json(found)
    elif found:
        table(("WHEN", "ID", "GPU", "TARGET", "RESULT", "TOOK", "ASKED BY", "REASON"), map(_cells, found))
    else:
        line("there is no finished switch")
    return 0


def show(service: Service, args: Namespace) -> int:
    entry = service.history_entry(args.id)
    if args.json:
        as_json(entry)
        return 0
    pairs(_about(entry))
    if entry["steps"]:
        line("")
        _print_steps(entry)
    return 0


def _cells(entry: Values) -> Sequence[str]:
    return (
        moment(entry["started"]),
        entry["id"],
        entry["gpu"],
        entry["target"],
        entry["result"],
        _took(entry),
        requester_words(entry["asker"]),
        _shortened("; ".join(_reason(entry))),
    )


def _reason(entry: Values) -> list[str]:
    """Why it ended as it did, a sentence each; empty where there is nothing to say."""
    sentences: list[str] = entry["reason"].splitlines()
    return [f"changed by somebody else: {' '.join(sentences)}"] if _drifted(entry) else sentences


def _drifted(entry: Values) -> bool:
    """It was no switch: somebody else moved the GPU."""
    return bool(entry["asker"].get("somebody_else"))


def _about(entry: Values) -> Iterable[tuple[str, str]]:
    if _drifted(entry):
        yield "change", f"{entry['id']}: {entry['gpu']} is {entry['target']} now"
        yield "reason", " ".join(_reason(entry))
        yield "seen", moment(entry["started"])
        return
    yield "switch", f"{entry['id']}: {entry['gpu']} to {entry['target']}"
    yield "result", f"{entry['result']}, after {_took(entry)}" if entry["count"] else "it was there already"
    for number, sentence in enumerate(_reason(entry)):
        yield "" if number else "reason", sentence
    yield "started", moment(entry["started"])
    yield "asked by", requester_words(entry["asker"], whole=True)
    for number, (option, value) in enumerate(sorted(entry["options"].items())):
        words = " ".join(value) if isinstance(value, list) else str(value)
        yield "" if number else "options", f"{option.replace('_', ' ')}: {words}"


def requester_words(requester: Values, *, whole: bool = False) -> str:
    """Who asked: `gpuswitchctl of alice`; `whole`: with its number, and the unit that it ran in."""
    if requester.get("somebody_else"):
        return "somebody else"
    if requester.get("trial"):
        return "the service itself, since a trial was over"
    if requester["service"]:
        return "the service itself"
    words = [requester["command"] or "somebody"]
    if whole and "pid" in requester:
        words.append(f"(pid {requester['pid']})")
    if "uid" in requester:
        words.append(f"of {_user(requester['uid'])}")
    if requester["unit"] and whole:
        words.append(f"in {requester['unit']}")
    if requester["vm"]:
        words.append(f"for {requester['vm']}")
    return " ".join(words)


def _print_steps(entry: Values) -> None:
    if on_terminal(sys.stdout):
        from gpuswitch.cli.terminal import print_timeline  # noqa: PLC0415  # brings `rich`, which is slow to start

        print_timeline(entry)
        return
    table(
        ("#", "AFTER", "TOOK", "STATUS", "STEP"),
        (
            (
                str(step["index"]),
                duration(step["started"] - entry["started"]),
                duration(step["seconds"]),
                step["status"],
                step["title"],
            )
            for step in entry["steps"]
        ),
    )


def _took(entry: Values) -> str:
    return duration(entry["finished"] - entry["started"]) if entry["count"] else ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _shortened(text: str) -> str:
    text = clean(text)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
