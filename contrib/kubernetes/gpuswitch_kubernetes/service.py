"""gpuswitchd of this node, by way of `gpuswitchctl --json`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpuswitch_kubernetes.gpus import Gpu, Refusal, Switch

READS_VERSION = 1
"""Of the JSON."""
ANSWER_SECONDS = 240.0
"""Longer than gpuswitchctl itself waits for any one answer."""
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
"""So that what it says is in one language."""
_FOR_USE = frozenset({"busy", "in_progress"})
"""Errors that pass when pods are gone, or another switch is over."""

Told = dict[str, Any]
Run = Callable[[Sequence[str]], tuple[int, str, str]]
"""Runs a command: its exit status, standard output and standard error."""


class ServiceError(Exception):
    """gpuswitchd gave no answer that can be used; one sentence."""


def run(words: Sequence[str]) -> tuple[int, str, str]:
    """Raises ServiceError: it cannot be run, or does not end."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise ServiceError(f"{' '.join(words)} has not ended within {ANSWER_SECONDS:g} s") from None
    except OSError as error:
        raise ServiceError(f"cannot run {words[0]}: {error.strerror}") from error
    return done.returncode, done.stdout, done.stderr


class Service:
    """All methods raise ServiceError."""

    def __init__(self, program: str = "gpuswitchctl", command: Run = run) -> None:
        self._program = program
        self._run = command

    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU of the node, with its finished switches."""
        past: dict[str, list[Switch]] = {}
        # The history first: a switch that ends in between is still the one that the list has.
        for record in self._one("history", "--limit", "0")["switches"]:
            past.setdefault(record["gpu"], []).append(Switch.read(record))
        return tuple(Gpu.read(record, tuple(past.get(record["address"], ()))) for record in self._one("list")["gpus"])

    def refusal(self, address: str, target: str) -> Refusal | None:
        """Why a switch would not be begun now; None: it would. Changes nothing."""
        told = self._ask("plan", address, target)
        return _refusal(told[-1])

    def begin(self, address: str, target: str) -> Refusal | None:
        """Begin a switch, or join the one that goes there already; None: it goes there, or is there."""
        told = self._ask(f"to-{target}", address, "--no-wait")
        return _refusal(told[-1])

    def changes(self) -> Iterator[None]:
        """Something has happened. Ends when the command does."""
        try:
            watch = subprocess.Popen(
                [self._program, "watch", "--json"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
            )
        except OSError as error:
            raise ServiceError(f"cannot run {self._program}: {error.strerror}") from error
        with watch:
            try:
                for _line in watch.stdout or ():
                    yield
            finally:
                watch.terminate()

    def _one(self, *words: str) -> Told:
        told = self._ask(*words)[0]
        if told.get("event") == "error":
            raise ServiceError(told["error"]["text"])
        return told

    def _ask(self, *words: str) -> list[Told]:
        """The objects that it printed: at least one."""
        status, out, err = self._run([self._program, *words, "--json"])
        told, rest, decoder = [], out.strip(), json.JSONDecoder()
        try:
            while rest:
                each, end = decoder.raw_decode(rest)
                told.append(each)
                rest = rest[end:].lstrip()
        except ValueError:
            told = []
        if not told:
            said = (err.strip() or out.strip() or "nothing").splitlines()[-1]
            raise ServiceError(f"gpuswitchctl {words[0]} ended with status {status} and printed no JSON: {said}")
        if told[0].get("version") != READS_VERSION:
            raise ServiceError(
                f"gpuswitchctl prints version {told[0].get('version')} of its JSON, and this agent reads version "
                f"{READS_VERSION}: make its image from the release of gpuswitch that the node has"
            )
        return told


def _refusal(told: Told) -> Refusal | None:
    if told.get("event") != "error":
        return None
    error = told["error"]
    if error["kind"] == "unreachable":
        raise ServiceError(error["text"])
    kinds = {each["error_kind"] for each in told["blockers"]} or {error["kind"]}
    return Refusal(" ".join(error["text"].split()), kinds <= _FOR_USE)
