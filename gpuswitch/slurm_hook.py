"""Has Slurm's jobs find the GPUs of a node where they want them, and drains a node whose GPUs no job can use.

    /usr/bin/python3 -BISE slurm_hook.py features [FEATURE]     helpers.conf(5): Helper
    /usr/bin/python3 -BISE slurm_hook.py prolog                 slurm.conf(5): Prolog
    /usr/bin/python3 -BISE slurm_hook.py health                 slurm.conf(5): HealthCheckProgram

slurmd runs it as root, by way of contrib/slurm. It uses the standard library, `gpuswitchctl --json` and Slurm's own
commands. What Slurm does with it, seen by running it and in its source (26.05, 24.11), is in docs/slurm.md; most of it
is in src/plugins/node_features/helpers, _rpc_reboot in src/slurmd/slurmd/req.c and validate_node_specs in
src/slurmctld/node_mgr.c.

A node is drained with a reason that begins with `gpuswitch: `, and only a node with such a reason is undrained.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEATURES = {"gpu_host": "host", "gpu_vfio": "vfio"}
"""What a job may ask for with --constraint, and where all GPUs of its node are then."""

OURS = "gpuswitch: "
JSON_VERSION = 1
SWITCH_SECONDS = 240
"""How long a switch is waited for: less than ExecTime in our helpers.conf, so that it is us who say what was wrong."""
ASK_SECONDS = 15
"""How long gpuswitchctl and slurmctld have for an answer: less than Slurm's 60 s for a health check."""
LONGEST_REASON = 300
PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""slurmd hands no PATH to a prolog or a health check."""

_AT_REST = ("host", "vfio")
_MOVING = ("detaching", "reattaching", "recovering")
_NODE = re.compile(r"(?<!\S)(State|AvailableFeatures|ActiveFeatures)=(\S*)")
_REASON = re.compile(r"(?<!\S)Reason=(.*?) \[\S+@[\d:T-]+\]")


class Trouble(Exception):  # noqa: N818 -- it is the reason that a node is drained for
    """What is wrong with the GPUs of this node, in one line."""


class NoAnswerError(Exception):
    """slurmctld did not do what it was asked for."""


@dataclass(frozen=True)
class Node:
    """What slurmctld has of this node: its flags (`IDLE`, `DRAIN`), the reason of a drain, its features.

    None are available until slurmd has registered once.
    """

    name: str
    flags: frozenset[str]
    reason: str
    available: tuple[str, ...]
    active: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """Whether it was us who drained it."""
        return "DRAIN" in self.flags and self.reason.startswith(OURS)

    @property
    def has_jobs(self) -> bool:
        """Whether a job runs on it: one that waits for a change of features does not yet."""
        return "POWERING_UP" not in self.flags and not self.flags.isdisjoint({"ALLOCATED", "MIXED"})

    @property
    def is_taken_out(self) -> bool:
        """Whether no job can come to it, by whoever's wish."""
        return not self.flags.isdisjoint({"DRAIN", "DOWN", "FAIL"})


def main(arguments: Sequence[str]) -> int:
    """Do what Slurm asks for; the exit status, which is what Slurm makes of it: docs/slurm.md."""
    match arguments:
        case ["features"]:
            # Which feature is active? slurmd keeps the answer, and a node that registers with another feature than
            # slurmctld has is invalid until slurmd starts anew. Without an answer nothing is compared.
            return 0
        case ["features", feature]:
            return set_feature(feature)
        case ["prolog"]:
            return before_job(os.environ)
        case ["health"]:
            return check_health()
    _say("cannot tell what to do: it is run by slurmd, as Helper, Prolog or HealthCheckProgram")
    return 2


# What Slurm asks for -------------------------------------------------------------------------------------------------


def set_feature(feature: str) -> int:
    """Move all GPUs to where a feature has them.

    Where that fails, 0 is returned all the same, once the node is drained with the reason: Slurm has put the job back
    into the queue by then. With another status it would take the node down, and its reason would be none.
    """
    if feature not in FEATURES:
        _say(f"cannot set {feature[:40]!r}: helpers.conf is to name {' and '.join(FEATURES)} for this helper")
        return 2
    try:
        move(FEATURES[feature])
    except Trouble as trouble:
        if not _drain(str(trouble)):
            return 1
        _correct(asked_for=True)
    return 0


def before_job(job: Mapping[str, str]) -> int:
    """See to it that GPUs are where a job wants them that was given to this node; 1 puts it back into the queue.

    Slurm believes that a feature stays as it was set. Somebody may have moved a GPU since.
    """
    target = target_of(job)
    if not target:
        return 0
    try:
        moved = move(target)
    except Trouble as trouble:
        _drain(str(trouble))
        _correct()
        return 1
    if moved:
        _correct()
    return 0


def check_health() -> int:
    """Drain this node while its GPUs are of no use to any job, and undrain what was drained for that."""
    try:
        gpus = managed()
        node = _node()
        for gpu in gpus:
            if trouble := trouble_of(gpu):
                raise trouble
        if (owned := owned_of(gpus)) and not _has_vfio_job(node.name):
            raise owned
    except Trouble as trouble:
        return 0 if _drain(str(trouble)) else 1
    except NoAnswerError as error:
        _say(str(error))
        return 1
    if node.is_ours and not is_settled(gpus, node):
        return 0
    _correct()
    if node.is_ours:
        try:
            _update(node.name, "state=undrain")
        except NoAnswerError as error:
            _say(str(error))
            return 1
    return 0


# What is known of the GPUs -------------------------------------------------------------------------------------------


def managed() -> list[dict[str, Any]]:
    """The GPUs that the configuration has a table for. Raises Trouble: the service gives no answer."""
    [told] = _gpuswitchctl("list", seconds=ASK_SECONDS)
    return [gpu for gpu in told["gpus"] if gpu["managed"]]


def feature_of(gpus: Sequence[Mapping[str, Any]]) -> str:
    """The feature that is active. Empty: GPUs are in several states, on their way, or there are none."""
    states = {gpu["state"] for gpu in gpus}
    return next((feature for feature, state in FEATURES.items() if states == {state}), "")


def trouble_of(gpu: Mapping[str, Any]) -> Trouble | None:
    """Why no job can use a GPU, whatever it wants it for."""
    if gpu["state"] in (*_AT_REST, *_MOVING):
        return None
    return Trouble(f"{_called(gpu)} is {gpu['state']}" + _because(gpu["reason"]))


def owned_of(gpus: Sequence[Mapping[str, Any]]) -> Trouble | None:
    """That a virtual machine or a process has a GPU."""
    for gpu in gpus:
        if gpu["owner"]:
            return Trouble(f"{_called(gpu)} is owned by {gpu['owner']['name']}, and no job of this node has that")
    return None


def is_settled(gpus: Sequence[Mapping[str, Any]], node: Node) -> bool:
    """Whether a job may be sent here again: no last switch failed, and none would be refused.

    While a job runs here Slurm changes no feature, so a way to another than the active one is not asked about: it is
    refused for the GPU that the job itself has open.
    """
    if any(gpu["state"] not in _AT_REST for gpu in gpus):
        return False
    if any(gpu["switch"] and gpu["switch"]["result"] not in {"done", "cancelled"} for gpu in gpus):
        return False
    try:
        for feature, target in FEATURES.items():
            is_possible = feature in node.active or not node.has_jobs
            if is_possible and any(gpu["state"] != target for gpu in gpus):
                _switch(target, "--dry-run", seconds=ASK_SECONDS)
    except Trouble:
        return False
    return True


def target_of(job: Mapping[str, str]) -> str:
    """Where a job wants the GPUs, by the environment of its prolog (prolog_epilog.html). Empty: it wants none."""
    features = set(re.findall(r"[\w.=]+", job.get("SLURM_JOB_CONSTRAINTS", "")))
    wanted = [target for feature, target in FEATURES.items() if feature in features]
    if len(wanted) == 1:
        return wanted[0]
    return "host" if job.get("SLURM_JOB_GPUS") and not wanted else ""


def move(target: str) -> bool:
    """Have all GPUs there; whether any was elsewhere before.

    Raises:
        Trouble: one of them is not.
    """
    gpus = managed()
    if not gpus:
        if target == "host":
            return False
        raise Trouble("the configuration of gpuswitch has no [[gpu]] table, so there is nothing to move to vfio")
    if owned := owned_of(gpus):
        # not by this job: it has not begun, and no other has the node on vfio
        raise owned
    if all(gpu["state"] == target for gpu in gpus):
        return False
    _switch(target, f"--timeout={SWITCH_SECONDS}", seconds=SWITCH_SECONDS + ASK_SECONDS)
    return True


# gpuswitchctl --------------------------------------------------------------------------------------------------------


def _switch(target: str, option: str, *, seconds: float) -> None:
    """Move all GPUs, or ask whether they could be. Raises Trouble."""
    for told in _gpuswitchctl(f"to-{target}", "--all", option, seconds=seconds):
        if told.get("event") == "result" and told["result"] != "done":
            raise Trouble(f"{_called(told)} did not get to {target}: {told['result']}" + _because(told["reason"]))


def _gpuswitchctl(*words: str, seconds: float) -> list[dict[str, Any]]:
    """What a command prints. Raises Trouble: it says so, gives no answer, or is not there."""
    command = ("gpuswitchctl", *words, "--json")
    try:
        done = _run(command, seconds)
    except NoAnswerError as error:
        raise Trouble(str(error)) from None
    try:
        told = [json.loads(done.stdout)]
    except ValueError:
        try:
            told = [json.loads(line) for line in done.stdout.splitlines()]
        except ValueError:
            told = []
    for one in told:
        if one.get("version") != JSON_VERSION:
            raise Trouble(
                f"{command[0]} prints JSON of version {one.get('version')}, and this reads version {JSON_VERSION}: "
                "have the same gpuswitch everywhere on this node"
            )
        if "error" in one:
            text = _first_line(one["error"]["text"])
            is_named = not one.get("gpu") or one["gpu"] in text
            raise Trouble(text if is_named else f"{_called(one)}: {text}")
    if not told or (done.returncode and not any(one.get("event") == "result" for one in told)):
        raise Trouble(f"{' '.join(command[:2])} ended with {done.returncode}: {_first_line(done.stderr)}")
    return told


def _called(gpu: Mapping[str, Any]) -> str:
    """How people know a GPU; empty where something is about no single one."""
    address = gpu.get("address") or gpu.get("gpu") or ""
    return f"{gpu['name']} ({address})" if gpu.get("name") and address else address


def _because(reason: str) -> str:
    return f": {_first_line(reason)}" if reason else ""


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


# Slurm ---------------------------------------------------------------------------------------------------------------


def node_from(text: str, name: str) -> Node:
    """What `scontrol --oneliner show node` prints. Raises NoAnswerError: it is about no node."""
    # the first of each counts: a reason comes after them, and has a name of a process that may look like one
    found = dict(reversed(_NODE.findall(text)))
    if "State" not in found:
        raise NoAnswerError(f"cannot tell what slurmctld has of {name}: {_first_line(text)[:LONGEST_REASON]}")
    reason = _REASON.search(text)
    available, active = (
        tuple(filter(None, found.get(f"{kind}Features", "").replace("(null)", "").split(",")))
        for kind in ("Available", "Active")
    )
    flags = frozenset(found["State"].rstrip("*~#!%$@^-").split("+"))
    return Node(name, flags, reason[1] if reason else "", available, active)


def with_feature(active: Sequence[str], feature: str) -> tuple[str, ...]:
    """Active features, with ours as it is: those of others stay, as an update replaces them all."""
    return (*(other for other in active if other not in FEATURES), feature)


def _drain(why: str) -> bool:
    """Take this node out of service with a reason; whether that was done, or there was nothing to do.

    A node that somebody else took out keeps its reason.
    """
    reason = (OURS + " ".join(filter(None, map(_printable, why.split()))))[:LONGEST_REASON]
    _say(reason.removeprefix(OURS))
    try:
        node = _node()
        if node.is_taken_out and not node.is_ours:
            return True
        if node.reason != reason or not node.is_ours:
            _update(node.name, "state=drain", f"reason={reason}")
    except NoAnswerError as error:
        _say(str(error))
        return False
    return True


def _correct(*, asked_for: bool = False) -> None:
    """Tell slurmctld which feature is active, where it has another: somebody else moved GPUs, or could not.

    While it waits for a change it has what it asked for, and that is right until the change has failed: `asked_for`.
    """
    try:
        feature = feature_of(managed())
        node = _node()
        is_right = {feature} == FEATURES.keys() & set(node.active)
        if feature in node.available and not is_right and (asked_for or "POWERING_UP" not in node.flags):
            _update(node.name, "activefeatures=" + ",".join(with_feature(node.active, feature)))
    except Trouble:
        pass  # the health check tells that
    except NoAnswerError as error:
        _say(str(error))


def _node() -> Node:
    """What slurmctld has of this node. Raises NoAnswerError."""
    name = os.environ.get("SLURMD_NODENAME", "")
    if not name:  # a helper is not told
        host = socket.gethostname().partition(".")[0]
        name = _first_line(_slurm("scontrol", "show", "aliases", host)).strip() or host
    return node_from(_slurm("scontrol", "--oneliner", "show", "node", name), name)


def _has_vfio_job(name: str) -> bool:
    """Whether a job that asked for vfio is on this node. Raises NoAnswerError."""
    said = _slurm("squeue", "--noheader", f"--nodelist={name}", "--states=R,S,CF,CG", "--format=%f")
    return any("gpu_vfio" in re.findall(r"[\w.=]+", line) for line in said.splitlines())


def _update(name: str, *what: str) -> None:
    _slurm("scontrol", "update", f"nodename={name}", *what)


def _slurm(*command: str) -> str:
    """What one of Slurm's commands prints. Raises NoAnswerError."""
    done = _run(command, ASK_SECONDS)
    if done.returncode:
        raise NoAnswerError(f"cannot run {' '.join(command)}: {_first_line(done.stderr or done.stdout)}")
    return done.stdout


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Raises NoAnswerError: it is not there, or does not end."""
    program = shutil.which(command[0], path=_path())
    if program is None:
        raise NoAnswerError(f"cannot find {command[0]} in {_path()}")
    try:
        return subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds,
            env={**os.environ, "PATH": _path()},
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{' '.join(command[:2])} gave no answer within {seconds:.0f} s") from None
    except OSError as error:
        raise NoAnswerError(f"cannot run {program}: {error.strerror}") from None


def _path() -> str:
    """Where programs are looked for: what the wrapper says first, then beside the slurmd that runs us."""
    try:
        beside = str(Path(f"/proc/{os.getppid()}/exe").readlink().parents[1] / "bin")
    except (OSError, IndexError):
        beside = ""
    return ":".join(filter(None, (os.environ.get("PATH", ""), PLACES, beside)))


def _printable(word: str) -> str:
    return "".join(filter(str.isprintable, word))


def _say(text: str) -> None:
    """For the log of slurmd."""
    sys.stderr.write(f"gpuswitch: {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
