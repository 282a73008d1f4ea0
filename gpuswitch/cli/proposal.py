"""What `setup` would have the configuration say of a GPU: from answers to text, the same text for the same answers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpuswitch.cli.output import clean

_HEADER = """\
# Written by "gpuswitchctl setup", which writes it anew each time; "gpuswitchctl setup undo" takes it back.
# What you write yourself belongs into another file, such as config.toml. gpuswitch.toml(5) has every key.
"""
_MAKERS = frozenset(
    {
        "advanced",
        "amd",
        "arc",
        "ati",
        "corporation",
        "device",
        "devices",
        "display",
        "geforce",
        "graphics",
        "inc",
        "intel",
    }
    | {"lite", "micro", "nvidia", "processor", "quadro", "radeon", "series", "tesla", "the", "titan"}
)
"""Words that many cards have in their names."""
_LONGEST_NAME = 32
_TOLD_BY = (("vendor", "device"), ("subsystem",), ("serial",), ("slot",), ("port",))
"""What tells cards apart, the first that is enough: a place comes last, which another slot changes."""


class Desk(NamedTuple):
    """What draws on the screen that goes dark. `manager`: the unit to stop, "" for none; `is_really`: what that is."""

    manager: str = ""
    is_really: str = ""
    end_sessions: bool = False


class Wanted(NamedTuple):
    """One GPU as it is to be configured. `desk`: None where the desktop draws on another one.

    `stop_units`: those that the configuration names already; `match`: what to tell it by, empty for its address alone.
    """

    address: str
    name: str
    model: str = ""
    match: Mapping[str, str] = {}
    at_boot: str = "keep"
    allow_boot_display: bool = False
    stop_units: Sequence[str] = ()
    desk: Desk | None = None


def text_of(gpus: Iterable[Wanted]) -> str:
    """The file, as TOML."""
    return "\n".join([_HEADER, *("\n".join([*_table(gpu), ""]) for gpu in gpus)])


def _table(gpu: Wanted) -> Iterator[str]:
    yield "[[gpu]]"
    yield _line("address", gpu.address, gpu.model)
    if gpu.match:
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in gpu.match.items())
        yield f"match = {{ {said} }}  # so that it is found where its address has moved"
    yield _line("name", gpu.name)
    if gpu.allow_boot_display:
        yield "allow_boot_display = true  # the machine boots on it, and its screen may go dark"
    if gpu.desk is not None:
        units = list(dict.fromkeys([*gpu.stop_units, *filter(None, [gpu.desk.manager])]))
        if units:
            about = gpu.desk.is_really if gpu.desk.is_really not in units else ""
            yield _line("stop_units", units, about)
        if gpu.desk.end_sessions:
            yield "end_sessions = true  # a session may stay when its display manager ends, or has none"
    if gpu.at_boot != "keep":
        yield _line("at_boot", gpu.at_boot)


def _line(key: str, value: object, about: str = "") -> str:
    return f"{key} = {json.dumps(value)}" + (f"  # {clean(about)}" if about else "")


def match_of(gpu: Mapping[str, str], others: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """As little of what a GPU is told by as tells it from the others; empty where nothing does."""
    said: dict[str, str] = {}
    others = list(others)
    for keys in _TOLD_BY:
        if not all(gpu.get(key) for key in keys):
            continue
        said |= {key: gpu[key] for key in keys}
        if not any(all(other.get(key) == value for key, value in said.items()) for other in others):
            return said
    return {}


def name_for(model: str, taken: Collection[str]) -> str:
    """What to call a GPU of this model, in letters that the configuration takes: `rtx3070`. None that is taken."""
    # pci.ids has a chip, then what it is sold as: Navi 21 [Radeon RX 6800/6800 XT]; a maker may have brackets, too.
    bracketed = re.findall(r"\[([^\]]+)\]", model)
    words = re.findall(r"[A-Za-z0-9]+", (bracketed[-1] if bracketed else model).partition("/")[0])
    told = [each for each in words if each.casefold() not in _MAKERS]
    name = "".join(told).casefold()[: _LONGEST_NAME - 3] or "gpu"
    if name.isdigit():
        name = f"gpu{name}"
    candidates = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next(each for each in candidates if each not in taken)


def record_of(gpu: Wanted) -> dict[str, Any]:
    """docs/json.md has the form."""
    return {
        "gpu": gpu.address,
        "name": gpu.name,
        "model": gpu.model,
        "screens": "two" if gpu.desk is None else "one",
        "at_boot": gpu.at_boot,
        "display_manager": gpu.desk.is_really if gpu.desk else "",
    }
