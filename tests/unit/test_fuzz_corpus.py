"""What reads the bytes of others takes all that is kept of them, and what little changes make of it."""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CORPUS, LONGEST, main
from tests.fuzz.targets import TARGETS
from tests.unit.test_house import relative

INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())
MUTATIONS = 2000
FEWER = {"configuration": 500}
"""Where each takes milliseconds."""
ODD = (b"", b"\0", b"\n", b"\r", b"\v", b"\xff", b"\xe2\x80\xa8", b"-1", b"NaN", b"1e999", b"9" * 20, b"..", b"[" * 50)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Most inputs are worth a warning, with where it comes from: to write those takes longest of all."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def mutated(seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """One of the seeds with a few changes: something left out, repeated, put in, or taken from another seed."""
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.randint(1, 4)):
        first, last = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        match dice.randrange(5):
            case 0:
                del data[first : min(last, first + 16)]
            case 1:
                data[first:first] = data[first:last]
            case 2:
                data[first : first + 1] = dice.choice(ODD)
            case 3:
                data[first : first + 1] = dice.randbytes(1)
            case _:
                other = dice.choice(seeds)
                data[first:last] = other[dice.randrange(len(other) + 1) :]
    return bytes(data[:LONGEST])


def test_each_target_has_something_to_read() -> None:
    assert {path.parent.relative_to(CORPUS).as_posix() for path in INPUTS} == TARGETS.keys()
    assert [relative(path) for path in INPUTS if path.stat().st_size >= LONGEST] == []


@pytest.mark.parametrize("path", INPUTS, ids=relative)
def test_what_is_kept_is_taken(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_made_of_it_is_taken(name: str) -> None:
    seeds = [path.read_bytes() for path in INPUTS if path.parent.name == name]
    dice = random.Random(name)  # noqa: S311 -- it is to be the same each time
    for _ in range(FEWER.get(name, MUTATIONS)):
        data = mutated(seeds, dice)
        try:
            TARGETS[name](data)
        except Exception as error:
            error.add_note(f"{name} has read {data!r}")
            raise


def test_without_atheris_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["python -m tests.fuzz"])
    with pytest.raises(SystemExit, match=r"^atheris is missing; install it: \S+ -m pip install atheris$"):
        main()
