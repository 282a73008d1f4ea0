"""What is wrong with a command line that argparse did not understand: one sentence, with what to write instead.

It reads the words anew, from left to right, as argparse takes them: that looks at the command first and at what nobody
knows last, and so often complains of something else than what was typed wrongly.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gpuswitch.cli.parser import arguments_of, commands_of
from gpuswitch.cli.times import as_seconds
from gpuswitch.cli.translate import _

_PROGRAM = "gpuswitchctl"
_ELSEWHERE = {
    ("history", "--failed"): "--result failed --result reverted",
    ("history", "-n"): "--limit",
    ("trial", "--for"): "--seconds",
    ("trial", "--keep"): "gpuswitchctl to-vfio",
}
"""What others call an option: by command and word."""
_SYNONYMS = {
    word: meant
    for words, meant in (
        ("switch bind unbind attach detach move toggle assign passthrough on off", ("to-vfio", "to-host")),
        ("vfio give", ("to-vfio",)),
        ("host reattach return rebind", ("to-host",)),
        ("undo revert back rollback restore", ("cancel", "to-host", "setup undo")),
        ("abort stop interrupt", ("cancel",)),
        ("repair fix reset", ("recover",)),
        ("try test", ("trial",)),
        ("plan-vfio dry-run", ("plan vfio",)),
        ("plan-host", ("plan host",)),
        ("info state", ("status",)),
        ("ls gpus devices", ("list",)),
        ("iommu group", ("groups",)),
        ("who lsof users processes ps fuser", ("holders",)),
        ("why diagnose diagnostics", ("doctor", "plan")),
        ("log logs", ("history", "watch")),
        ("events follow monitor", ("watch", "history")),
        ("configure", ("setup", "config edit")),
        ("configuration settings", ("config",)),
        ("bugreport bug", ("report",)),
        ("version", ("--version",)),
        ("reload", ("systemctl reload gpuswitchd",)),
    )
    for word in words.split()
}
"""What others call a command, and what that may be here; nothing that looks is taken for what acts."""
_HARDER = {"--force": "terminate", "-f": "terminate", "--terminate": "terminate", "--kill": "kill"}
"""What others call that whoever has a GPU open is ended: what `--busy` is given."""
_ALIKE = 0.75
"""Of a command, how much (difflib.SequenceMatcher.ratio): each with two letters exchanged is, and abort and adopt are
not.
"""
_LONGEST_NUMBER = 4
"""Digits of switches that somebody wants to see: 20261129 is a day."""
_NUMBER = re.compile(r"-\d+|-\d*\.\d+")
"""No option, where no option looks so: argparse has it in the same way."""


def fault_in(top: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[str, str] | None:
    """The first fault, and how it goes; None: there is none that is known here."""
    reading = _Reading(top)
    text = reading.fault(list(arguments))
    return None if text is None else (text, reading.parser.format_usage())


def options_first(top: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The same words with the options of a command before its arguments: argparse takes those in one row only."""
    command: list[str] = []
    options: list[str] = []
    arguments: list[str] = []
    parser, waiting = top, list(words)
    while waiting:
        word = waiting.pop(0)
        if word in commands_of(parser):
            parser = commands_of(parser)[word]
            command.append(word)
        elif word == "--" and parser is not top:
            arguments += [word, *waiting]
            break
        elif _is_option(word):
            option = _option_of(parser, word)
            values = 0 if option is None or option.nargs == 0 else 1
            (command if parser is top else options).extend([word, *waiting[:values]])
            del waiting[:values]
        else:
            arguments.append(word)
    return [*command, *options, *arguments]


class _Reading:
    """A command line, as far as it was read. `parser` is that of the command or action that was named last."""

    def __init__(self, top: argparse.ArgumentParser) -> None:
        self._top = top
        self.parser = top
        self._path: list[str] = []
        self._words: list[str] = []
        """Arguments that are no options, of the command."""
        self._given: list[tuple[argparse.Action, str]] = []
        """Options, as they are called there."""
        self._behind: list[str] = []
        """The command of `run`, which stands behind --."""
        self._taken = ""
        """That a command was taken for something else, where one is missing."""

    @property
    def _named(self) -> str:
        """The command as it is typed, without the program."""
        return " ".join(self._path)

    def fault(self, words: list[str]) -> str | None:
        waiting = list(words)
        only_words = False
        while waiting:
            word = waiting.pop(0)
            if only_words or not _is_option(word) or (word == "--" and self.parser is self._top):
                found = self._argument(word)
            elif word == "--" and self._named == "run":
                self._behind, waiting, found = waiting, [], None
            elif word == "--":
                only_words, found = True, None
            else:
                found = self._option(word, waiting, words)
            if found is not None:
                return found
        if self.parser is not self._top:
            return self._arguments()
        if self._taken:
            return self._taken
        return _("say what to do: {command} lists the commands", command=f"{_PROGRAM} help")

    # Options -------------------------------------------------------------------------------------------------------

    def _option(self, word: str, waiting: list[str], words: Sequence[str]) -> str | None:
        name, equals, value = word.partition("=")
        option = _option_of(self.parser, name)
        if option is None:
            return self._unknown(name, words)
        for other, called in self._given:
            if other is not option and _exclude_each_other(self.parser, other, option):
                return _("{one} and {other} cannot be used together: leave one of them out", one=called, other=name)
        self._given.append((option, name))
        if option.nargs == 0:
            return _("{option} takes no value: write {option} alone", option=name) if equals else None
        if not equals:
            if not waiting or _is_option(waiting[0]):
                return _("{option} needs a value: {how}", option=name, how=_how(option, name))
            value = waiting.pop(0)
            if value in commands_of(self.parser):
                how = _how(option, name)
                self._taken = _(
                    "{word} was taken for the value of {option}: write {how}", word=value, option=name, how=how
                )
        if not value:
            return _(
                "the value of {option} is empty: leave the option out, or write {how}",
                option=name,
                how=_how(option, name),
            )
        return _no_choice(option, name, value)

    def _unknown(self, name: str, words: Sequence[str]) -> str:
        if self.parser is self._top:
            return self._unknown_before_a_command(name, words)
        text = _("{verb} does not know {words}", verb=self._named, words=name)
        options = [each for action in arguments_of(self.parser) for each in action.option_strings]
        if name in _HARDER:
            meant = f"--busy {_HARDER[name]}"
            known = "--busy" in options
            return text + (_("; did you mean {word}?", word=meant) if known else _explained(self._named))
        if how := _ELSEWHERE.get((self._named, name)):
            if how == "--seconds":
                how += self._seconds_of(name, words)
            return text + _("; did you mean {word}?", word=how)
        if (action := name.lstrip("-")) in commands_of(self.parser):
            return text + _("; did you mean {word}?", word=f"{self._named} {action}")
        if owners := list(self._owners(name)):
            return text + _("; that is an option of {verbs}", verbs=", ".join(owners))
        return text + (_meant(name, options) or _explained(self._named))

    def _seconds_of(self, name: str, words: Sequence[str]) -> str:
        """What was typed as the value of that option, in seconds, behind a blank; "" where that cannot be told."""
        word = next((each for each in words if each.partition("=")[0] == name), name)
        _name, equals, value = word.partition("=")
        if not equals:
            value = next(iter(words[list(words).index(word) + 1 :]), "")
        seconds = value if value.isdecimal() else as_seconds(value)
        return f" {seconds}" if seconds else ""

    def _unknown_before_a_command(self, name: str, words: Sequence[str]) -> str:
        """It may be one of a command, which stands further on."""
        verbs = commands_of(self._top)
        place, verb = next(((n, each) for n, each in enumerate(words) if each in verbs), (0, ""))
        if verb and _option_of(verbs[verb], name) is not None:
            line = self._line(verb, *words[:place], *words[place + 1 :])
            return _("{option} stands behind the command: {line}", option=name, line=line)
        owners = list(self._owners(name))
        if owners and not verb:
            return _("{option} stands behind a command that has it: {verbs}", option=name, verbs=", ".join(owners))
        text = _("there is no option {option} before a command", option=name)
        options = [each for action in arguments_of(self._top) for each in action.option_strings]
        return text + (_meant(name, options) or _lists())

    def _owners(self, name: str) -> Iterator[str]:
        """The commands and actions that have this option."""
        for verb, parser in commands_of(self._top).items():
            if _option_of(parser, name) is not None:
                yield verb
            for action, below in commands_of(parser).items():
                if _option_of(below, name) is not None:
                    yield f"{verb} {action}"

    # Arguments -----------------------------------------------------------------------------------------------------

    def _argument(self, word: str) -> str | None:
        choices = commands_of(self.parser)
        if not choices:
            self._words.append(word)
            return None
        if word not in choices:
            if self.parser is self._top:
                return _no_command(word, choices)
            known = _listed(choices)
            text = _("{verb} has no action {word}; it has {known}", verb=self._named, word=repr(word), known=known)
            return text + _meant(word, choices, _ALIKE)
        before, self.parser = self.parser, choices[word]
        self._path.append(word)
        for _option, name in self._given:
            if before is not self._top and _option_of(self.parser, name) is None:
                return _("{option} does not go with {verb}: leave it out", option=name, verb=self._named)
        self._given = [(option, name) for option, name in self._given if _option_of(self.parser, name) is not None]
        return None

    def _arguments(self) -> str | None:
        """What is wrong with those of a command, once all are there."""
        places = [each for each in arguments_of(self.parser) if not each.option_strings and each.dest != "action"]
        if "" in self._words:
            named = places[min(self._words.index(""), len(places) - 1)].metavar if places else "''"
            return _("{argument} is empty: leave it out, or say which", argument=named)
        target = next((each for each in places if each.dest == "target"), None)
        if target is not None:
            return self._target(list(target.choices or ()))
        if len(self._words) > len(places) and all(each.nargs != "*" for each in places):
            words = " ".join(map(repr, self._words[len(places) :]))
            if self._named == "run":
                return _("run takes its GPU by --gpu, and its command after --: {line}", line=self._runs())
            if self._named == "history" and (how := self._past()):
                return _("history takes a time or a number by its option: {how}", how=how)
            if (extra := self._words[-1]).isdecimal() or as_seconds(extra):
                for name in ("--seconds", "--limit"):
                    if _option_of(self.parser, name) is not None:
                        how = f"{name} {extra if extra.isdecimal() else as_seconds(extra)}"
                        return _("{verb} takes a number by its option: {how}", verb=self._named, how=how)
            if places:
                what = str(places[0].metavar)
                text = _("{verb} takes one {what}: leave out {words}", verb=self._named, what=what, words=words)
            else:
                text = _("{verb} takes no argument: leave out {words}", verb=self._named, words=words)
            return text + _explained(self._named)
        return None

    def _runs(self) -> str:
        """How it is written: where no command stands behind --, nobody can tell whether the first word is a GPU."""
        first, *more = self._words
        line = self._line("--gpu", first, "--", *(self._behind or more or ["COMMAND"]))
        return line if self._behind or ":" in first else _(" or ").join([self._line("--", first, *more), line])

    def _past(self) -> str:
        """The option for the words behind a GPU, or for all of them, `2h ago`; "" where that cannot be told."""
        return by_its_option(" ".join(self._words[1:])) or by_its_option(" ".join(self._words))

    def _target(self, known: Sequence[str]) -> str | None:
        """Of a GPU and where to, each of which may be left out."""
        words = self._words
        if len(words) < 2 or (len(words) == 2 and words[-1].lower() in known):
            return None
        targets = [each.lower() for each in words if each.lower() in known]
        gpus = [each for each in words if each.lower() not in known]
        lines = _(" or ").join(self._line(*gpus[:1], each) for each in targets[:1] or known)
        if len(words) > 2:
            return _("{verb} takes one GPU and one target: {lines}", verb=self._named, lines=lines)
        if len(gpus) > 1:
            return _("{word} is no target: {lines}", word=repr(gpus[1]), lines=lines)
        return _("the target comes last: {lines}", lines=lines)

    def _line(self, *words: str) -> str:
        from shlex import join  # noqa: PLC0415 -- for who mistypes alone

        return join([_PROGRAM, *self._path, *words])


def by_its_option(word: str) -> str:
    """What `history` takes for a number, or for a time: `--limit 5`, `--since '2h ago'`; "" where it is neither."""
    from shlex import quote  # noqa: PLC0415 -- for who mistypes alone

    from gpuswitch.cli.times import point_in_time  # noqa: PLC0415 -- as above

    if word.isascii() and word.isdecimal() and len(word) <= _LONGEST_NUMBER:
        return f"--limit {word}"
    try:
        point_in_time(word)
    except ValueError:
        return ""
    return f"--since {quote(word)}"


def _no_choice(option: argparse.Action, name: str, value: str) -> str | None:
    known = list(option.choices or ())
    if not known or (option.type(value) if callable(option.type) else value) in known:
        return None
    text = _("{option} takes {known}, not {word}", option=name, known=_listed(known), word=repr(value))
    several = [each for each in re.split(r"[,\s]+", value) if each]
    if isinstance(option.default, list) and len(several) > 1 and set(several) <= set(known):
        return text + _("; did you mean {word}?", word=" ".join(f"{name} {each}" for each in several))
    return text + _meant(value, known)


def _no_command(word: str, verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    text = _("there is no command {word}", word=repr(word))
    if meant := _SYNONYMS.get(word.casefold().replace("_", "-")):
        return text + _("; did you mean {word}?", word=_listed(meant))
    for verb, parser in verbs.items():
        if word in commands_of(parser):
            return text + _("; did you mean {word}?", word=f"{verb} {word}")
    if re.search(r"\d\.\d|:", word):
        return text + _("; if that is a GPU, the command comes first: {command}", command=f"{_PROGRAM} status {word}")
    return text + (_meant(word, verbs, _ALIKE) or _lists())


def _exclude_each_other(parser: argparse.ArgumentParser, one: argparse.Action, other: argparse.Action) -> bool:
    groups = parser._mutually_exclusive_groups  # noqa: SLF001 -- argparse has no public name for them
    return any({one, other} <= set(group._group_actions) for group in groups)  # noqa: SLF001 -- as above


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and _NUMBER.fullmatch(word) is None


def _option_of(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    return next((each for each in arguments_of(parser) if name in each.option_strings), None)


def _how(option: argparse.Action, name: str) -> str:
    """How it is written with a value."""
    return f"{name} {option.metavar or '|'.join(map(str, option.choices or ['VALUE']))}"


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return _("{most} or {last}", most=", ".join(most), last=last) if most else last


def _meant(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """The one that was meant, as the end of a sentence; "" where that cannot be told: none is so much `alike`."""
    from difflib import get_close_matches  # noqa: PLC0415 -- for this alone

    known, plain = list(known), word.casefold().replace("_", "-")
    begun = [each for each in known if len(plain.lstrip("-")) > 1 and each.startswith(plain)]
    close = begun if len(begun) == 1 else get_close_matches(plain, known, 1, alike)
    return _("; did you mean {word}?", word=close[0]) if close and close[0] != word else ""


def _lists() -> str:
    return _("; {command} lists what there is", command=f"{_PROGRAM} help")


def _explained(verb: str) -> str:
    return _("; {command} explains it", command=f"{_PROGRAM} help {verb}")
