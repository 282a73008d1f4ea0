"""Questions that one key answers, and what a key is."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from gpuswitch.cli.asking import answer
from gpuswitch.cli.follow import StepChange
from gpuswitch.cli.keys import END, Question, pressed
from gpuswitch.cli.steps import Above
from tests.harness.service.fixed import fixed, gpu


@pytest.mark.parametrize(
    ("typed", "key"),
    [(b"h", "h"), (b"K", "k"), (b"\xff", "\ufffd"), (b"\n", "\n"), (b"\x04", END), (b"\x1b[C", "")],
)
def test_a_key_is_one_character_in_any_case(typed: bytes, key: str) -> None:
    """The last letter of an arrow to the right is a C, and takes nothing back."""
    ours, theirs = os.pipe()
    os.write(theirs, typed)
    assert pressed(ours) == key
    os.close(theirs)
    with pytest.raises(KeyboardInterrupt):
        # Nobody can type any more.
        pressed(ours)
    os.close(ours)


@pytest.mark.parametrize(("columns", "up"), [(80, ""), (20, ""), (19, "\x1b[1A"), (10, "\x1b[1A"), (9, "\x1b[2A")])
def test_a_question_of_several_lines_is_taken_away_whole(
    columns: int, up: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    Question("x" * 20).hide()
    assert capsys.readouterr().err == f"\r{up}\x1b[J"


def test_a_question_is_broken_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    question = Question("Now or later (l)? [n/L] ")
    question.show()
    question.hide()
    assert capsys.readouterr().err == "Now or later\n(l)? [n/L] \r\x1b[1A\x1b[J"


def test_steps_stand_above_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # the same terminal
    [of] = fixed(gpu()).gpus()
    question = Question("Now? ")
    question.show()
    shown = Above(question)
    shown.step(of, "5f", StepChange(1, 2, "module", "load vfio-pci", "running", 0))
    shown.step(of, "5f", StepChange(1, 2, "module", "load vfio-pci", "done", 1))
    assert capsys.readouterr().out == "Now? \r\x1b[J[1/2] load vfio-pci: done (1.00 s)\nNow? "


class _Unreadable:
    def readline(self) -> str:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_may_not_be_read_gives_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", _Unreadable())
    assert answer("Go on? ") is None
    assert capsys.readouterr().err == "Go on? \n"
