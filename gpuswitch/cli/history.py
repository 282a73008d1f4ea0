"""The verbs that tell of finished switches, and of what somebody else moved: `history`, `show`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gpuswitch.cli.client import Service
from gpuswitch.cli.failures import CtlError, called
from gpuswitch.cli.layout import fits, hung, pairs, table
from gpuswitch.cli.output import (
    as_json,
    can_write,
    cells,
    clock,
    duration,
    line,
    lines_of,
    moment,
    on_terminal,
    rfc3339,
    width,
    write,
)
from gpuswitch.cli.query import what_to_do
from gpuswitch.cli.records import came_back, entry_record, remedies_of
from gpuswitch.cli.requesters import requester_words
from gpuswitch.cli.steps import SHORTEST_BAR, TAKEN_BACK, plan_heading, took_words
from gpuswitch.cli.translate import _, mark, marks, recognized, state_word, step_title
from gpuswitch.errors import InvalidArgument, NoSuchGpu

if TYPE_CHECKING:
    from gpuswitch.cli.journal import Line

Values = Mapping[str, Any]
_USUAL = 20
"""So many are listed where nobody says how many, or which."""
_OPTIONS = {
    "busy": mark("busy"),
    "wait_seconds": mark("wait seconds"),
    "stop_units": mark("stop units"),
    "trial_seconds": mark("trial seconds"),
}
"""What was asked for besides the target (gpuswitch/model/policy.py)."""
_KERNEL_LINES = 50
_AFTERWARDS = 1.0
"""Seconds: what the kernel says of the last step may have come when that was over for us."""
_GAPS = 4 * 2
"""Columns between the number, the title, the bar, the status and how long it took."""
_TO_THE_SECOND = len("2026-11-29 20:07:24")
_UNDONE = frozenset({"failed", "wedged", "reverted"})
"""Results after which people look for what the kernel said."""


def history(service: Service, args: Namespace) -> int:
    if args.since is not None and args.until is not None and args.since > args.until:
        text = _("nothing is both after --since and before --until: {since} is later than {until}", **_range(args))
        raise CtlError.of(InvalidArgument, text)
    chosen = bool(args.result) or [args.since, args.until] != [None, None]
    limit = args.limit if args.limit is not None else 0 if chosen else _USUAL
    if args.gpu or chosen:
        # The service knows every spelling of its name.
        address = _address(service, args.gpu) if args.gpu else None
        entries = [entry for entry in service.history(0) if address in {None, entry["gpu"]} and _then(entry, args)]
        found = [entry for entry in entries if not args.result or entry["result"] in args.result][: limit or None]
    else:
        entries = found = service.history(limit)
    if args.json:
        names = _names(service, found)
        as_json({"switches": [entry_record(entry, names.get(entry["gpu"], "")) for entry in found]})
    elif found:
        names = _names(service, found)
        zone = _zone(found)
        when = f"{mark('WHEN')} ({zone})" if zone else "WHEN"
        headings = (when, *marks("ID", "GPU", "NAME", "TARGET", "RESULT", "TOOK", "ASKED BY", "REASON"))
        rows = [_cells(entry, names.get(entry["gpu"], ""), zone) for entry in found]
        # The reasons have a line of their own where there is no room.
        if not fits(headings[:-1], [row[:-1] for row in rows], width(sys.stdout)):
            rows = [_cells(entry, names.get(entry["gpu"], ""), zone, short=True) for entry in found]
        # It is called in commands by either; its name is what people know.
        twofold = "GPU" if all(names.get(entry["gpu"]) for entry in found) else "NAME"
        table(headings, rows, left_out=("TOOK", twofold), below=("ASKED BY", "REASON"))
    else:
        line(_none_of(entries, args) if chosen else _("there is no finished switch"))
    return 0


def _address(service: Service, word: str) -> str:
    """That of the GPU which is called so.

    Raises:
        CtlError: none is; with the option that it belongs to where it is no name, but a time or a number.
    """
    try:
        return service.gpu(word).address
    except CtlError as error:
        option = _option_for(word) if error.name == NoSuchGpu.name else ""
        if not option:
            raise
        hint = _("{word} is what an option takes, and no GPU", word=word) + _("; did you mean {word}?", word=option)
        raise CtlError(f"{error}\n{hint}", error.exit_code, name=error.name) from None


def _option_for(word: str) -> str:
    from gpuswitch.cli.usage import by_its_option  # noqa: PLC0415 -- for who mistypes alone

    return by_its_option(word)


def _none_of(entries: Sequence[Values], args: Namespace) -> str:
    """That there is none of these results; and what else there is, as `failed` is not all that went wrong."""
    if not args.result or not entries:
        return _("no finished switch is like that")
    ended = [entry["result"] for entry in entries]
    there = ", ".join(f"{ended.count(each)} {state_word(each)} (--result {each})" for each in dict.fromkeys(ended))
    wanted = _(" or ").join(map(state_word, args.result))
    return _("no finished switch is {wanted}; what there is: {others}", wanted=wanted, others=there)


def _names(service: Service, found: Sequence[Values]) -> Mapping[str, str]:
    """What the GPUs of these are called, by address; without those that have no name now, or are not there."""
    return {gpu.address: gpu.name for gpu in service.gpus() if gpu.name} if found else {}


def _range(args: Namespace) -> Mapping[str, str]:
    return {"since": moment(args.since), "until": moment(args.until)}


def _then(entry: Values, args: Namespace) -> bool:
    """Whether it began in that time."""
    return (args.since is None or entry["started"] >= args.since) and (
        args.until is None or entry["started"] <= args.until
    )


def show(service: Service, args: Namespace) -> int:
    last = [] if args.id else service.history(1)
    if not args.id and not last:
        line(_("there is no finished switch"))
        return 0
    entry = _entry(service, args.id or last[0]["id"])
    kernel, unread = _kernel_lines(service, entry)
    name = _names(service, [entry]).get(entry["gpu"], "")
    if args.json:
        lines = None if kernel is None else [{"at": rfc3339(each.at), "text": each.text} for each in kernel]
        as_json({"switch": {**entry_record(entry, name), "kernel": lines}})
        return 0
    pairs([*_about(entry, called(name, entry["gpu"])), *_to_do(service, entry)])
    _print_steps(entry)
    if unread:
        write("")
        write(_("what the kernel said meanwhile cannot be shown: {why}", why=unread))
    elif kernel:
        write("")
        write(_("what the kernel said meanwhile:"))
        for each in kernel:
            hung(f"  {clock(each.at)}  ", each.text)
    elif kernel is not None and entry["result"] in _UNDONE:
        write("")
        write(_("the kernel said nothing of it meanwhile"))
    return 0


def _entry(service: Service, switch: str) -> Values:
    """The finished switch of that id.

    Raises:
        CtlError: there is none; of one that is under way, with what shows that.
    """
    try:
        return service.history_entry(switch)
    except CtlError as error:
        if error.name != InvalidArgument.name:
            raise
        told = _(
            "{error}; {command} lists them, and without an ID it is the last",
            error=recognized(str(error)),
            command="gpuswitchctl history",
        )
        with suppress(CtlError):
            named = service.gpu(switch)
            told = _(
                "{word} is a GPU, and no switch: {history} lists its switches, {status} shows how it is",
                word=switch,
                history=f"gpuswitchctl history {named.word}",
                status=f"gpuswitchctl status {named.word}",
            )
        with suppress(CtlError):
            for gpu in service.gpus():
                now = gpu.properties["Switch"]
                if now and not now["result"] and now["id"].startswith(switch.lower()):
                    told = _(
                        "switch {id} of {gpu} is under way: {status} shows how far it is, {wait} waits for its end",
                        id=now["id"],
                        gpu=gpu.title,
                        status=f"gpuswitchctl status {gpu.word}",
                        wait=f"gpuswitchctl wait {now['id']}",
                    )
        raise CtlError(told, error.exit_code, name=error.name) from None


def _kernel_lines(service: Service, entry: Values) -> tuple[list[Line] | None, str]:
    """What the kernel said of the GPU since the switch began, the last of it; None where that cannot be read, and why,
    and of a switch that did what was asked.
    """
    from gpuswitch.cli.journal import UnreadableError, kernel_lines  # noqa: PLC0415 -- for failures alone

    if entry["result"] == "done" or not entry["count"]:
        return None, ""
    address = entry["gpu"]
    functions, drivers = {address}, set[str]()
    with suppress(CtlError):  # it may have left the machine
        gpu = service.gpu(address).properties
        functions = {function for function, _kind, _driver in gpu["Functions"]}
        drivers = {driver for _function, _kind, driver in gpu["Functions"]} | {gpu["HostDriver"]}
    # What is wedged goes on after its end: the kernel tells of a task that hangs two minutes later.
    ended = entry.get("returned", {}).get("at", 0.0) if entry["result"] == "wedged" else entry["finished"]
    until = ended + _AFTERWARDS if ended else None
    try:
        return kernel_lines(functions, drivers, since=entry["started"], until=until)[-_KERNEL_LINES:], ""
    except UnreadableError as error:
        return None, str(error)


def _cells(entry: Values, name: str, zone: str, *, short: bool = False) -> Sequence[str]:
    return (
        moment(entry["started"]).removesuffix(zone),
        entry["id"],
        entry["gpu"],
        name,
        state_word(entry["target"]),
        state_word(entry["result"]),
        _took(entry),
        requester_words(entry["asker"], short=short),
        "; ".join(_reason(entry)),
    )


def _reason(entry: Values) -> list[str]:
    """Why it ended as it did, a sentence each; empty where there is nothing to say."""
    sentences = [*recognized(entry["reason"]).splitlines(), *came_back(entry)]
    return [_("changed by somebody else: {what}", what=" ".join(sentences))] if _drifted(entry) else sentences


def _drifted(entry: Values) -> bool:
    """It was no switch: somebody else moved the GPU."""
    return bool(entry["asker"].get("somebody_else"))


def _about(entry: Values, gpu: str) -> Iterable[tuple[str, str]]:
    """In labels and what belongs to them; `gpu` is what its GPU is called."""
    if _drifted(entry):
        yield (
            _("change"),
            _("{id}: {gpu} is {target} now", id=entry["id"], gpu=gpu, target=state_word(entry["target"])),
        )
        yield _("reason"), " ".join(_reason(entry))
        yield _("seen"), moment(entry["started"])
        return
    yield (
        _("switch"),
        _("{id}: {gpu} to {target}", id=entry["id"], gpu=gpu, target=state_word(entry["target"])),
    )
    ended = _("it was there already")
    if entry["count"]:
        ended = _("{result}, after {duration}", result=state_word(entry["result"]), duration=_took(entry))
    yield _("result"), ended
    for number, sentence in enumerate(lines_of(entry["reason"]) if entry["reason"] else []):
        yield "" if number else _("reason"), sentence
    for number, sentence in enumerate(came_back(entry)):
        yield "" if number else _("since then"), sentence
    yield _("started"), moment(entry["started"])
    yield _("asked by"), requester_words(entry["asker"], whole=True)
    for number, (option, value) in enumerate(sorted(entry["options"].items())):
        words = " ".join(value) if isinstance(value, list) else str(value)
        # Of a service that is newer, there may be others.
        yield "" if number else _("options"), f"{_(_OPTIONS.get(option, option.replace('_', ' ')))}: {words}"


def _to_do(service: Service, entry: Values) -> Iterable[tuple[str, str]]:
    """What there is to do about its GPU, where that is still as this switch left it, and not well."""
    with suppress(CtlError):  # it may have left the machine
        gpu = service.gpu(entry["gpu"]).properties
        if remedies_of(gpu) and gpu["Switch"] and gpu["Switch"]["id"] == entry["id"]:
            for number, sentence in enumerate(what_to_do(gpu)):
                yield "" if number else _("to do"), sentence


def _print_steps(entry: Values) -> None:
    """Those of before a restart of the service, and those since, below a line each where there was one."""
    before = [step for step in entry["steps"] if step.get("before_restart")]
    since = [step for step in entry["steps"] if not step.get("before_restart")]
    if before:
        write("")
        line(_("until the service ended in the midst of it:"))
        _print_some_steps(entry, before)
    if since:
        write("")
        if before:
            line(_("since it runs again:"))
        _print_some_steps(entry, since)


def _print_some_steps(entry: Values, steps: Sequence[Values]) -> None:
    """Those of each plan, and those that were taken back of it, below a line that says which they are."""
    groups: list[tuple[tuple[int, bool], list[Values]]] = []
    for step in steps:
        plan, back = step.get("plan", 1), step["status"] in TAKEN_BACK
        if groups and step["status"] == "interrupted" and groups[-1][0][0] == plan:
            back = groups[-1][0][1]
        if not groups or groups[-1][0] != (plan, back):
            groups.append(((plan, back), []))
        groups[-1][1].append(step)
    bars = _has_room_for_bars(steps)
    for number, ((plan, back), those) in enumerate(groups):
        if number:
            write("")
        if len(groups) > 1:
            line(plan_heading(plan, those[0]["kind"], entry["target"], back=back))
        _print_group(entry, those, bars=bars)


def _print_group(entry: Values, steps: Sequence[Values], *, bars: bool) -> None:
    if bars:
        from gpuswitch.cli.terminal import print_timeline  # noqa: PLC0415  # brings `rich`, which is slow to start

        print_timeline(entry, steps)
        return
    table(
        marks("#", "AFTER", "TOOK", "STATUS", "STEP"),
        (
            (
                str(step["index"]),
                duration(step["started"] - entry["started"]),
                took_words(step),
                state_word(step["status"]),
                step_title(step["title"]),
            )
            for step in steps
        ),
        left_out=marks("AFTER"),
        below=marks("STEP"),
    )


def _has_room_for_bars(steps: Sequence[Values]) -> bool:
    """Whether titles beside bars can be broken between words, and nothing else has to be broken or too short."""
    if not (on_terminal(sys.stdout) and can_write("█▌")):
        return False
    columns = width(sys.stdout)
    titles = [step_title(step["title"]) for step in steps]
    longest_word = max(cells(word) for title in titles for word in title.split())
    beside = (
        (str(step["index"]) for step in steps),
        map(took_words, steps),
        (state_word(step["status"]) for step in steps),
    )
    room = columns - sum(max(map(cells, texts)) for texts in beside) - _GAPS
    most = columns * 2 // 5
    return longest_word <= most and min(max(map(cells, titles)), most) + SHORTEST_BAR <= room


def _took(entry: Values) -> str:
    return duration(entry["finished"] - entry["started"]) if entry["count"] else ""


def _zone(found: Iterable[Values]) -> str:
    """The distance from UTC that all their times have, told once on a terminal: `+01:00`; "" where it stands with each,
    as in a pipe, where lines are taken out, and over the end of summer time.
    """
    zones = {moment(entry["started"])[_TO_THE_SECOND:] for entry in found}
    return zones.pop() if len(zones) == 1 and on_terminal(sys.stdout) else ""
