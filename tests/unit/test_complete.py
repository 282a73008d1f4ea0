"""What a shell is told of the word that somebody types, as far as no service is needed for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuswitch.cli import complete
from gpuswitch.cli.main import main
from gpuswitch.cli.parser import STATES, TOPICS, arguments_of, commands_of, parser


@pytest.fixture(autouse=True)
def no_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSWITCH_BUS", "unix:path=/nowhere")


def completed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The candidates for the last word, without what they are."""
    assert main(["__complete", *words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return [line.partition("\t")[0] for line in said.out.splitlines()]


def verbs() -> list[str]:
    [choice] = [each for each in arguments_of(parser()) if each.dest == "verb"]
    assert isinstance(choice.choices, dict)
    return list(choice.choices)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["to-"], ["to-vfio", "to-host"]),
        (["--json", "wa"], ["watch", "wait"]),
        (["--bus", "unix:path=/x", "lis"], ["list"]),
        (["frobnicate", ""], []),
        (["plan", "geforce", ""], ["host", "vfio"]),
        (["plan", ""], ["host", "vfio"]),
        (["plan", "geforce", "vfio", ""], []),
        (["plan", "--stop-unit", "x.service", "geforce", "v"], ["vfio"]),
        (["plan", "--", "geforce", "v"], ["vfio"]),
        (["plan", "--", "--b"], []),
        (["to-vfio", "--busy", ""], ["refuse", "wait", "terminate", "kill"]),
        (["to-vfio", "--busy=t"], ["--busy=terminate"]),
        (["to-vfio", "--nonsense=t"], []),
        (["to-vfio", "--dry"], ["--dry-run"]),
        (["to-vfio", "--dry-run", "--d"], []),
        (["to-vfio", "-y", "--ye"], []),
        (["to-vfio", "--stop-unit=a.service", "--stop"], ["--stop-unit"]),
        (["wait", "--for", "h"], ["host"]),
        (["wait", "--for", ""], list(STATES)),
        (["history", "--result", "failed", "--result", "rev"], ["reverted"]),
        (["wait", "--timeout", ""], []),
        (["help", "ex"], ["exit-status"]),
        (["status", ""], []),
        (["--bus", "nonsense", "status", ""], []),
        (["show", ""], []),
        (["history", "--result", "d"], ["done", "drifted"]),
        (["history", "--since", ""], ["today", "yesterday", "1h", "1d", "1w"]),
        (["history", "--until=y"], ["--until=yesterday"]),
    ],
)
def test_the_last_word_becomes_what_the_command_understands_there(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(capsys, *words) == expected


def test_every_verb_and_every_option_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert completed(capsys) == completed(capsys, "") == verbs()
    assert set(completed(capsys, "help", "")) == {*TOPICS, *verbs()}
    for verb in verbs():
        assert {"--help", "--json", "--bus"} <= set(completed(capsys, verb, "--"))


def everything(of: argparse.ArgumentParser, *before: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    for name, below in commands_of(of).items():
        yield (*before, name), below
        yield from everything(below, *before, name)


@pytest.mark.parametrize(
    ("words", "action"),
    [
        pytest.param(words, action, id=" ".join((*words, action.dest)))
        for words, of in everything(parser())
        for action in arguments_of(of)
        if action.choices
    ],
)
def test_whatever_has_a_list_of_values_is_completed_with_all_of_them(
    words: tuple[str, ...], action: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    known = list(map(str, action.choices or ()))
    assert len(known) > 0
    if action.option_strings:
        name = action.option_strings[-1]
        assert completed(capsys, *words, name, "") == known
        assert completed(capsys, *words, f"{name}=") == [f"{name}={each}" for each in known]
    else:
        assert completed(capsys, *words, "") == known


def test_a_file_is_left_to_the_shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = argparse.ArgumentParser()
    reader.add_argument("path", metavar="PATH")
    monkeypatch.setattr("gpuswitch.cli.complete.parser", lambda: reader)
    assert completed(capsys, "conf") == [":files"]


def test_it_says_what_a_word_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["__complete", "to-v"])
    assert capsys.readouterr().out == "to-vfio\tMove a GPU to vfio.\n"


def test_nobody_else_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "__complete" not in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert "__complete" not in capsys.readouterr().err


def test_machines_are_those_that_libvirt_has_files_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(complete, "MACHINES", str(tmp_path))
    for name in ("win10.xml", "ubuntu.xml", "networks"):
        (tmp_path / name).touch()
    assert completed(capsys, "setup", "--vm", "") == ["ubuntu", "win10"]
    assert completed(capsys, "setup", "--vm=w") == ["--vm=win10"]
    assert completed(capsys, "setup", "u") == ["undo"]
    assert completed(capsys, "setup", "boot", "") == ["undo"]
    assert completed(capsys, "setup", "boot", "--d") == ["--dry-run"]
    monkeypatch.setattr(complete, "MACHINES", "/nowhere")
    assert completed(capsys, "setup", "--vm", "") == []
    monkeypatch.setattr(complete, "PROXMOX", str(tmp_path))
    for name in ("101.conf", "102.conf", "101.conf.tmp"):
        (tmp_path / name).touch()
    assert completed(capsys, "setup", "proxmox", "") == ["101", "102"]
