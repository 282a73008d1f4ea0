"""`gpuswitchctl __complete WORD...`: what the last word may become. The scripts in contrib/completion/ ask this.

One candidate a line, and after a tab what it is, where that is known. The line `:files` alone: the name of a file. What
goes wrong is not said: it would land in the middle of what somebody types.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress

from gpuswitch.cli.output import clean, moment, write
from gpuswitch.cli.parser import BUS_VARIABLE, TOPICS, arguments_of, parser
from gpuswitch.cli.translate import _, state_word

TYPE_CHECKING = False  # as typing has it, which takes longer to import than argparse
if TYPE_CHECKING:
    from gpuswitch.cli.client import Service

Candidate = tuple[str, str]
"""A word, and what it is in a few words; "": nothing is known."""

FILES = ":files"
MACHINES = "/etc/libvirt/qemu"
"""Where libvirt keeps the definitions of its machines."""
PROXMOX = "/etc/pve/qemu-server"
_SECONDS = 1.0
"""That long the service may take. It answers in milliseconds, or is stopped by a debugger."""
_MOST = 20
"""Finished switches that are offered."""


def complete(words: Sequence[str]) -> int:
    """Print what the last of these words may become; it may be empty."""
    *before, current = words or [""]
    for word, about in _candidates(before, current):
        # Names and models come from elsewhere, and a shell prints them.
        write("\t".join(map(clean, filter(None, (word, about)))))
    return 0


class _Typed:
    """The words before the one to complete, as argparse would take them."""

    def __init__(self, words: Iterable[str]) -> None:
        self.parser: argparse.ArgumentParser = parser()
        self.bus = os.environ.get(BUS_VARIABLE) or None
        self.waiting: argparse.Action | None = None
        """The option whose value comes next."""
        self.given: set[str] = set()
        self._verbatim = False
        self._places = self._positionals()
        self._place = 0
        self.values: list[str] = []
        for word in words:
            self._take(word)

    @property
    def place(self) -> argparse.Action | None:
        """What an argument here would be."""
        return self._places[self._place] if self._place < len(self._places) else None

    @property
    def places(self) -> list[argparse.Action]:
        """All that an argument here may be: one that may be left out, and what comes after it."""
        rest = self._places[self._place :]
        needed = next((n for n, each in enumerate(rest) if each.nargs != "?"), len(rest))
        return rest[: needed + 1]

    @property
    def options_may_follow(self) -> bool:
        return not self._verbatim

    def option(self, name: str) -> argparse.Action | None:
        return next((each for each in arguments_of(self.parser) if name in each.option_strings), None)

    def _positionals(self) -> list[argparse.Action]:
        return [each for each in arguments_of(self.parser) if not each.option_strings]

    def _take(self, word: str) -> None:
        if self.waiting is not None:
            self._value(self.waiting, word)
            self.waiting = None
        elif word == "--" and not self._verbatim:
            self._verbatim = True
        elif word.startswith("-") and word != "-" and not self._verbatim:
            self._option(word)
        elif (place := self.place) is not None:
            self._argument(place, word)

    def _option(self, word: str) -> None:
        name, equals, value = word.partition("=")
        if (option := self.option(name)) is None:
            return
        if not _may_be_repeated(option):
            self.given.update(option.option_strings)
        if equals:
            self._value(option, value)
        elif option.nargs != 0:
            self.waiting = option

    def _value(self, option: argparse.Action, value: str) -> None:
        if option.dest == "bus":
            self.bus = value

    def _argument(self, place: argparse.Action, word: str) -> None:
        if isinstance(place.choices, dict):
            # What follows a verb that there is not, nobody knows.
            self.parser = place.choices.get(word) or argparse.ArgumentParser(add_help=False)
            self._places, self._place, self.values = self._positionals(), 0, []
            return
        self.values.append(word)
        if place.nargs not in {"*", "+"}:
            self._place += 1


def _may_be_repeated(option: argparse.Action) -> bool:
    return isinstance(option.default, list)


def _candidates(before: Sequence[str], current: str) -> Iterator[Candidate]:
    typed = _Typed(before)
    name, equals, value = current.partition("=")
    if typed.waiting is not None:
        yield from _beginning(current, _values(typed.waiting, typed, current))
    elif typed.options_may_follow and equals and (option := typed.option(name)) is not None:
        for word, about in _beginning(value, _values(option, typed, value)):
            yield f"{name}={word}", about
    elif typed.options_may_follow and current.startswith("-"):
        yield from _beginning(current, _options(typed))
    else:
        for place in typed.places:
            yield from _beginning(current, _values(place, typed, current))


def _beginning(current: str, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    return (each for each in candidates if each[0].startswith(current) or each[0] == FILES)


def _options(typed: _Typed) -> Iterator[Candidate]:
    for option in arguments_of(typed.parser):
        if option.option_strings and option.option_strings[-1] not in typed.given:
            yield option.option_strings[-1], option.help or ""


def _values(of: argparse.Action, typed: _Typed, current: str) -> Iterator[Candidate]:
    """What may stand there, as far as anybody knows."""
    if isinstance(of.choices, dict):
        for name, verb in of.choices.items():
            yield name, (verb.description or "").partition("\n")[0]
    elif of.choices is not None:
        yield from ((str(choice), "") for choice in of.choices)
    elif of.metavar == "TIME":
        yield from (("today", _("since midnight")), ("yesterday", _("since the midnight before")))
        yield from (("1h", _("an hour ago")), ("1d", _("a day ago")), ("1w", _("a week ago")))
    elif of.dest == "vm":
        yield from ((name, "") for name in _machines(MACHINES, ".xml"))
    elif of.metavar == "VMID":
        yield from ((vmid, "") for vmid in _machines(PROXMOX, ".conf"))
    elif of.metavar in {"FILE", "PATH"}:
        yield FILES, ""
    elif of.metavar == "TOPIC":
        yield from ((topic, "") for topic in TOPICS)
        for verbs in arguments_of(parser()):
            if verbs.dest == "verb":
                yield from _values(verbs, typed, current)
    elif of.metavar == "GPU" and typed.parser.get_default("run") == "gpuswitch.cli.switch:cancel":
        yield from _from_service(typed.bus, lambda service: _gpus(service, typed.values, current, under_way=True))
    elif of.metavar == "GPU":
        yield from _from_service(typed.bus, lambda service: _gpus(service, typed.values, current))
    elif of.metavar == "ID":
        yield from _from_service(typed.bus, _switches)


def _machines(folder: str, ending: str) -> list[str]:
    """Virtual machines, by the files that there are of them, for root alone: virsh may have to start its daemon."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 -- pathlib takes longer to import
    except OSError:
        return []
    return sorted(name.removesuffix(ending) for name in names if name.endswith(ending))


def _from_service(bus: str | None, ask: Callable[[Service], list[Candidate]]) -> list[Candidate]:
    """What the service knows; nothing where it does not run, and it is not started for this."""
    import signal  # noqa: PLC0415 -- most completions are of verbs and options, which need none of these

    from gpuswitch.cli.client import Service  # noqa: PLC0415 -- as above
    from gpuswitch.cli.failures import CtlError  # noqa: PLC0415 -- as above

    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    # A completion that finds nothing is no news: the command itself says why.
    with suppress(CtlError, TimeoutError):
        try:
            with closing(Service.connect(bus)) as service:
                return ask(service) if service.runs() else []
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return []


def _too_late(*_: object) -> None:
    raise TimeoutError


def _gpus(service: Service, named: Sequence[str], current: str, *, under_way: bool = False) -> list[Candidate]:
    """Each by its name and by its address, but for those that stand there already; `under_way`: only while switched."""
    from gpuswitch.cli.records import state_label  # noqa: PLC0415 -- by need

    found = []
    for gpu in service.gpus():
        known = gpu.properties
        address, name = gpu.address, str(known["Name"])
        spellings = [name, address, address.removeprefix("0000:")]
        if any(each in named for each in spellings):
            continue
        if under_way and (not known["Switch"] or known["Switch"]["result"]):
            continue
        state = state_label(known)
        if name:
            found.append((name, f"{address}, {state}"))
        found.append((address, f"{name or known['Model'] or known['Vendor']}, {state}"))
        # Only for who begins to type it: it is not to be chosen from a list beside the whole address.
        if current and address.startswith("0000:") and not address.startswith(current):
            found.append((address.removeprefix("0000:"), found[-1][1]))
    return found


def _switches(service: Service) -> list[Candidate]:
    """The last finished ones, the newest first."""
    return [
        (entry["id"], f"{entry['gpu']} to {entry['target']}: {state_word(entry['result'])}, {moment(entry['started'])}")
        for entry in service.history(_MOST)
    ]
