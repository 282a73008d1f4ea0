"""Wrong usage: one sentence that names the thing, and says what to write; whatever was typed wrongly, of every verb."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from gpuswitch.cli.main import main
from gpuswitch.cli.parser import UsageError, arguments_of, commands_of, parse, parser
from gpuswitch.cli.typed import as_shown


@pytest.fixture(autouse=True)
def no_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSWITCH_BUS", "unix:path=/nowhere")


def complaint(*words: str) -> str:
    """What is said of it, without how it goes."""
    with pytest.raises(UsageError) as wrong:
        parse(words)
    return str(wrong.value)


YES = "to-vfio, to-host, trial, run, hold, setup, setup undo, setup proxmox, setup prometheus, setup boot"
"""The commands that have it."""
RUN = "run takes its GPU by --gpu, and its command after --: "
ENDS = "done, reverted, failed, cancelled, wedged or drifted"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan VFIO 01:00.0", "the target comes last: gpuswitchctl plan 01:00.0 vfio"),
        ("plan a b vfio", "plan takes one GPU and one target: gpuswitchctl plan a vfio"),
        ("plan 01:00.0 amd", "'amd' is no target: gpuswitchctl plan 01:00.0 host or gpuswitchctl plan 01:00.0 vfio"),
        ("setup --config X", "setup does not know --config; gpuswitchctl help setup explains it"),
        ("status --yes", f"status does not know --yes; that is an option of {YES}"),
        ("setup --gpu X undo", "--gpu does not go with setup undo: leave it out"),
        ("setup --undo", "setup does not know --undo; did you mean setup undo?"),
        (
            "run rtx -- true",
            f"{RUN}gpuswitchctl run --gpu rtx -- true",
        ),
        (
            "run true",
            f"{RUN}gpuswitchctl run -- true or gpuswitchctl run --gpu true -- COMMAND",
        ),
        (
            "run rtx true",
            f"{RUN}gpuswitchctl run -- rtx true or gpuswitchctl run --gpu rtx -- true",
        ),
        ("run 01:00.0 sleep 2", f"{RUN}gpuswitchctl run --gpu 01:00.0 -- sleep 2"),
        ("trial rtx 30s", "trial takes a number by its option: --seconds 30"),
        ("trial rtx --for 30", "trial does not know --for; did you mean --seconds 30?"),
        ("history rtx 5", "history takes a time or a number by its option: --limit 5"),
        ("history rtx 30s", "history takes a time or a number by its option: --since 30s"),
        ("history 2h ago", "history takes a time or a number by its option: --since '2h ago'"),
        ("history rtx 2026-11-29 20:00", "history takes a time or a number by its option: --since '2026-11-29 20:00'"),
        ("history a b", "history takes one GPU: leave out 'b'; gpuswitchctl help history explains it"),
        (
            "history --failed",
            "history does not know --failed; did you mean --result failed --result reverted?",
        ),
        ("switch rtx vfio", "there is no command 'switch'; did you mean to-vfio or to-host?"),
        ("reload", "there is no command 'reload'; did you mean systemctl reload gpuswitchd?"),
        ("setup extra", "setup has no action 'extra'; it has undo, proxmox, prometheus or boot"),
        (
            "setup undo extra",
            "setup undo takes no argument: leave out 'extra'; gpuswitchctl help setup undo explains it",
        ),
        ("config chek", "config has no action 'chek'; it has show, check or edit; did you mean check?"),
        ("config --changed check", "--changed does not go with config check: leave it out"),
        ("config check --changed", "config check does not know --changed; that is an option of config, config show"),
        ("to-vfio --wait --busy=kill", "--wait needs a value: --wait SECONDS"),
        ("to-vfio --busy", "--busy needs a value: --busy refuse|wait|terminate|kill"),
        ("to-vfio --busy kil", "--busy takes refuse, wait, terminate or kill, not 'kil'; did you mean kill?"),
        ("to-vfio --yes=3", "--yes takes no value: write --yes alone"),
        ("to-vfio --seconds 60", "to-vfio does not know --seconds; that is an option of trial"),
        ("to-vfio --js", "to-vfio does not know --js; did you mean --json?"),
        ("to-vfio --timeout 3 --no-wait", "--timeout and --no-wait cannot be used together: leave one of them out"),
        ("--wait 60 to-vfio 'my gpu'", "--wait stands behind the command: gpuswitchctl to-vfio --wait 60 'my gpu'"),
        ("--wait 60", "--wait stands behind a command that has it: plan, to-vfio, to-host, trial, run, hold"),
        ("--verion", "there is no option --verion before a command; did you mean --version?"),
        ("--bus list", "list was taken for the value of --bus: write --bus ADDRESS"),
        ("history --result fail", f"--result takes {ENDS}, not 'fail'; did you mean failed?"),
        (
            "history --result failed,reverted",
            f"--result takes {ENDS}, not 'failed,reverted'; did you mean --result failed --result reverted?",
        ),
        ("to-vfio --force", "to-vfio does not know --force; did you mean --busy terminate?"),
        ("plan -f vfio", "plan does not know -f; did you mean --busy terminate?"),
        ("cancel --force", "cancel does not know --force; gpuswitchctl help cancel explains it"),
        ("-- list", "there is no command '--'; gpuswitchctl help lists what there is"),
        (
            "01:00.0",
            "there is no command '01:00.0'; if that is a GPU, the command comes first: gpuswitchctl status 01:00.0",
        ),
        ("trial a b", "trial takes one GPU: leave out 'b'; gpuswitchctl help trial explains it"),
        ("list 01:00.0", "list takes no argument: leave out '01:00.0'; gpuswitchctl help list explains it"),
        ("to-vfio ''", "GPU is empty: leave it out, or say which"),
        ("show ''", "ID is empty: leave it out, or say which"),
        ("to-vfio --stop-unit=", "the value of --stop-unit is empty: leave the option out, or write --stop-unit UNIT"),
        ("status --bus ''", "the value of --bus is empty: leave the option out, or write --bus ADDRESS"),
        ("--json plan --help", "cannot print help as JSON: it is text for people; leave --json out"),
    ],
)
def test_one_sentence_says_what_to_write(line: str, said: str) -> None:
    assert complaint(*(word.strip("'") for word in re.findall(r"'[^']*'|\S+", line))) == said


def test_what_looks_wrong_and_is_not_stays_so() -> None:
    assert parse(["plan", "vfio", "vfio"]).gpu == "vfio"
    assert parse(["to-vfio", "--", "--all"]).gpus == ["--all"]
    assert parse(["config", "--json", "check"]).json is True
    assert parse(["history", "--since=-2h"]).since is not None


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("abort stop", "cancel"),
        ("undo revert back", "cancel, to-host or setup undo"),
        ("attach detach bind unbind on off", "to-vfio or to-host"),
        ("plan-vfio", "plan vfio"),
        ("info", "status"),
        ("who lsof", "holders"),
        ("log logs", "history or watch"),
        ("events", "watch or history"),
        ("why", "doctor or plan"),
    ],
)
def test_what_others_call_a_command_is_understood(words: str, meant: str) -> None:
    for word in words.split():
        assert complaint(word) == f"there is no command {word!r}; did you mean {meant}?"


def test_a_command_that_is_mistyped_is_named() -> None:
    for verb in commands_of(parser()):
        for at in range(len(verb) - 1):
            exchanged = f"{verb[:at]}{verb[at + 1]}{verb[at]}{verb[at + 2 :]}"
            # Of three letters, too little is left of it.
            if exchanged != verb and len(verb) > 3:
                assert complaint(exchanged) == f"there is no command {exchanged!r}; did you mean {verb}?"


@pytest.mark.parametrize("word", ["adapt-it", "stopp-it", "attached", "reverting", "plan-host-vfio"])
def test_what_is_only_somewhat_alike_is_not_suggested(word: str) -> None:
    assert complaint(word) == f"there is no command {word!r}; gpuswitchctl help lists what there is"


@pytest.mark.parametrize("before", [[], ["--changed"]])
@pytest.mark.parametrize("behind", [[], ["--changed"]])
def test_the_configuration_is_shown_by_its_action_too(before: list[str], behind: list[str]) -> None:
    args = parse(["config", *before, "show", *behind])
    assert (args.run, args.changed) == ("gpuswitch.cli.query:config", bool(before or behind))


@pytest.mark.parametrize("words", [["config"], ["setup"], ["setup", "boot"]], ids=" ".join)
def test_an_action_that_may_be_left_out_stands_in_brackets(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--help"]) == 0
    usage = " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert usage.endswith(" [ACTION ...]")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.partition("\n\n")[0].endswith(" COMMAND ...")


def test_the_topic_of_the_configuration_names_the_commands_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "configuration"]) == 0
    out = capsys.readouterr().out
    for command in ("setup", "config", "config edit", "config check"):
        assert re.search(rf"^gpuswitchctl {command}  ", out, re.MULTILINE)


@pytest.mark.parametrize("line", ["setup undo --yes", "setup --yes undo", "setup undo -y", "setup boot undo --yes"])
def test_undo_that_asks_nothing_takes_yes_all_the_same(line: str) -> None:
    assert parse(line.split()).run.endswith(":undo")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("watch --json --help", "gpuswitchctl watch "),
        ("--bus list --json setup boot -h", "gpuswitchctl setup boot "),
        ("--json --help", "gpuswitchctl [-h]"),
        ("--json --help nonsense", "gpuswitchctl [-h]"),
    ],
)
def test_help_that_cannot_be_had_shows_how_that_command_goes(line: str, named: str) -> None:
    with pytest.raises(UsageError) as wrong:
        parse(line.split())
    assert wrong.value.usage.startswith(f"usage: {named}")


def test_what_follows_says_that_it_cannot_without_how_that_ends() -> None:
    assert parse(["watch"]).purpose == "follow what happens"
    assert parse(["notify"]).purpose == "show desktop notifications"


def everything(of: argparse.ArgumentParser, *before: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Each verb and action, with the words that lead there."""
    for name, below in commands_of(of).items():
        yield (*before, name), below
        yield from everything(below, *before, name)


OPTIONS = [
    pytest.param(words, option, id=" ".join((*words, option.option_strings[-1])))
    for words, of in everything(parser())
    for option in arguments_of(of)
    if option.option_strings and option.dest != "help"
]


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_every_option_says_what_is_wrong_with_its_value(words: tuple[str, ...], option: argparse.Action) -> None:
    name = option.option_strings[-1]
    if option.nargs == 0:
        assert complaint(*words, f"{name}=x") == f"{name} takes no value: write {name} alone"
        return
    shown = str(option.metavar or "|".join(map(str, option.choices or ())))
    assert complaint(*words, name) == f"{name} needs a value: {name} {shown}"
    assert f"or write {name} {shown}" in complaint(*words, f"{name}=", *rest(words))
    if option.choices:
        said = complaint(*words, name, "frobnicate", *rest(words))
        assert said.startswith(f"{name} takes ")
        assert [each for each in option.choices if str(each) not in said] == []


def rest(words: tuple[str, ...]) -> list[str]:
    """What such a command needs besides."""
    return ["vfio"] if words == ("plan",) else []


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_every_option_that_stands_before_its_command_is_told_where_it_belongs(
    words: tuple[str, ...], option: argparse.Action
) -> None:
    name = option.option_strings[-1]
    if name in {"--json", "--bus"} or len(words) > 1:
        return
    value = [] if option.nargs == 0 else ["1"]
    line = " ".join(("gpuswitchctl", *words, name, *value))
    assert complaint(name, *value, *words) == f"{name} stands behind the command: {line}"


@pytest.mark.parametrize("words", [words for words, _ in everything(parser())], ids=" ".join)
def test_every_command_names_what_it_does_not_know(words: tuple[str, ...]) -> None:
    named = " ".join(words)
    said = complaint(*words, "--xyzzy", "x", *rest(words))
    assert said == f"{named} does not know --xyzzy; gpuswitchctl help {named} explains it"


@pytest.mark.parametrize("words", [words for words, _ in everything(parser())], ids=" ".join)
def test_help_explains_every_command_and_action(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *words]) == main([*words, "--help"]) == 0
    by_the_verb, by_the_option = capsys.readouterr().out.split("usage: ")[1:]
    assert by_the_verb == by_the_option
    assert by_the_verb.startswith(f"gpuswitchctl {' '.join(words)} ")


@pytest.mark.parametrize("before", [["status"], ["to-vfio"], ["show"], ["run", "--gpu"], ["wait", "--for"], []])
def test_a_word_of_any_length_is_told_in_one_short_line(before: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*before, "x" * 1_000_000]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.endswith("has 1000000 letters: nothing here is called so")
    assert len(err) < 200


def test_what_was_typed_is_repeated_short_and_harmless() -> None:
    long, evil = "x" * 3000 + "y", "a\tb\x1b[31m\nc"
    said = as_shown(f"no GPU is named {evil!r}, {evil}, {long!r} or short", [evil, long, "short"])
    head, _comma, tail = said.partition("', a")
    assert head == r"no GPU is named 'a\tb\x1b[31m\nc"
    assert tail.startswith(r"\tb\x1b[31m\nc, 'xxx")
    assert (said.isprintable(), len(said) < 150, said.endswith("xy' or short")) == (True, True, True)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trial rtx --for 5m", "trial does not know --for; did you mean --seconds 300?"),
        ("trial --for=90", "trial does not know --for; did you mean --seconds 90?"),
        ("trial --for long", "trial does not know --for; did you mean --seconds?"),
        ("trial rtx 5m", "trial takes a number by its option: --seconds 300"),
        ("trial --seconds 5m", "'5m' is not a number of seconds from 1 to 86400; write 300"),
        ("wait --timeout 1h30m", "'1h30m' is not a number of seconds above 0; write 5400"),
        ("to-vfio --wait 5min", "'5min' is not a whole number of seconds from 1 to 86400; write 300"),
        ("wait --timeout 5q", "'5q' is not a number of seconds above 0"),
    ],
)
def test_a_span_of_time_is_told_in_seconds(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(typed.split())
    assert str(error.value).endswith(meant)
