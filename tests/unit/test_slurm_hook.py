"""What Slurm's programs on a node do: with the words of the real scontrol (26.05.5), and a stand-in for it.

The real ones are in tests/real_system/test_slurm.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from gpuswitch import slurm_hook

FIRST, SECOND = "0000:01:00.0", "0000:41:00.0"
NODE = (
    "NodeName={name} Arch=x86_64 CoresPerSocket=1  CPUAlloc=0 CPUEfctv=2 CPUTot=2 CPULoad=9.18 "
    "AvailableFeatures=fast,gpu_host,gpu_vfio ActiveFeatures={active} Gres=gpu:2 NodeAddr=n1 NodeHostName=n1 "
    "Version=26.05.5 OS=Linux 6.12 RealMemory=100 State={state} ThreadsPerCore=1 Partitions=all "
    "BootTime=2026-11-30T00:09:06 SlurmdStartTime=2026-11-30T12:13:09 ResumeAfterTime=None {reason}\n"
)


def gpu(address: str, state: str, **others: Any) -> dict[str, Any]:
    told = {"address": address, "name": "", "managed": True, "state": state, "owner": None, "switch": None}
    return told | {"reason": ""} | others


@dataclass
class Machine:
    """A node: what gpuswitchctl and slurmctld would say, and what they were asked to do."""

    gpus: list[dict[str, Any]] = field(default_factory=lambda: [gpu(FIRST, "host"), gpu(SECOND, "host")])
    refusal: str = ""
    result: str = "done"
    is_silent: bool = False
    version: int = 1
    active: str = "fast,gpu_host"
    state: str = "IDLE"
    reason: str = ""
    jobs: str = ""
    has_controller: bool = True
    done: list[str] = field(default_factory=list)

    def run(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        assert seconds > 0
        status, said = self._gpuswitchctl(command) if command[0] == "gpuswitchctl" else self._slurm(command)
        return subprocess.CompletedProcess(command, status, said, "" if status == 0 else "cannot")

    def _gpuswitchctl(self, command: Sequence[str]) -> tuple[int, str]:
        if self.is_silent:
            return 5, _error("the service cannot be reached\nsecond line", 5)
        if command[1] == "list":
            # over several lines, as the real one
            return 0, json.dumps({"version": self.version, "gpus": self.gpus, "warnings": []}, indent=1)
        target = command[1].removeprefix("to-")
        if self.refusal:
            return 3, _error(self.refusal, 3, FIRST)
        if "--dry-run" in command:
            return 0, json.dumps({"version": 1, "plans": []})
        self.done.append(" ".join(command[:3]))
        lines: list[dict[str, Any]] = [{"version": 1, "event": "step", "gpu": FIRST}]
        for one in self.gpus:
            one["state"] = target if self.result == "done" else one["state"]
            outcome = {"version": 1, "event": "result", "gpu": one["address"], "name": "", "result": self.result}
            lines.append(outcome | {"reason": "" if self.result == "done" else "no luck"})
        return 0 if self.result == "done" else 1, "".join(json.dumps(line) + "\n" for line in lines)

    def _slurm(self, command: Sequence[str]) -> tuple[int, str]:
        if not self.has_controller:
            return 1, ""
        match command:
            case ["scontrol", "show", "aliases", _]:
                return 0, "n1\n"
            case ["scontrol", "--oneliner", "show", "node", name]:
                reason = f"Reason={self.reason} [root@2026-11-30T12:15:57]" if self.reason else ""
                return 0, NODE.format(name=name, active=self.active, state=self.state, reason=reason)
            case ["squeue", *_]:
                return 0, self.jobs
            case ["scontrol", "update", "nodename=n1", *what]:
                self.done.append(" ".join(what))
                values = dict(word.split("=", 1) for word in what)
                self.active = values.get("activefeatures", self.active)
                self.reason = values.get("reason", self.reason)
                if values.get("state") == "drain":
                    self.state += "+DRAIN" * ("DRAIN" not in self.state)
                elif values.get("state") == "undrain":
                    self.state, self.reason = self.state.replace("+DRAIN", ""), ""
                return 0, ""
        raise AssertionError(command)


def _error(text: str, status: int, gpu: str | None = None) -> str:
    error = {"kind": "busy", "text": text, "exit_status": status}
    return json.dumps({"version": 1, "event": "error", "gpu": gpu, "name": "", "error": error, "blockers": []}) + "\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(slurm_hook, "_run", machine.run)
    for name in ("SLURMD_NODENAME", "SLURM_JOB_CONSTRAINTS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    return machine


def test_a_node_is_read_as_scontrol_prints_it() -> None:
    words = "Failed to set node feature(s): 'gpu_host'"
    text = NODE.format(
        name="n1",
        active="gpu_vfio",
        state="DOWN+DRAIN+INVALID_REG",
        reason=f"Reason={words} [root@2026-11-30T12:14:57]",
    )
    node = slurm_hook.node_from(text, "n1")
    assert node.reason == words
    assert node.flags == {"DOWN", "DRAIN", "INVALID_REG"}
    assert (node.available, node.active) == (("fast", "gpu_host", "gpu_vfio"), ("gpu_vfio",))
    assert not node.is_ours
    # in Slurm's order a reason comes last, and may say anything
    words = "gpuswitch: in use by State=IDLE ActiveFeatures=gpu_host (4711)"
    reason = f"Reason={words} [root@2026-11-30T12:14:57]"
    text = NODE.format(name="n1", active="gpu_vfio", state="MIXED+DRAIN", reason=reason)
    node = slurm_hook.node_from(text, "n1")
    assert node.flags == {"MIXED", "DRAIN"}
    assert (node.active, node.reason) == (("gpu_vfio",), words)
    assert node.is_ours
    never_seen = slurm_hook.node_from(NODE.format(name="n1", active="(null)", state="UNKNOWN*", reason=""), "n1")
    assert never_seen.active == ()
    assert never_seen.flags == {"UNKNOWN"}
    with pytest.raises(slurm_hook.NoAnswerError, match="n1: Node n1 not found"):
        slurm_hook.node_from("Node n1 not found\n", "n1")


@pytest.mark.parametrize(
    ("job", "target"),
    [
        ({"SLURM_JOB_CONSTRAINTS": "gpu_vfio"}, "vfio"),
        ({"SLURM_JOB_CONSTRAINTS": "fast&gpu_vfio", "SLURM_JOB_GPUS": "0"}, "vfio"),
        ({"SLURM_JOB_CONSTRAINTS": "gpu_host&(fast|big)&rack1"}, "host"),
        ({"SLURM_JOB_CONSTRAINTS": "[rack1|rack2]", "SLURM_JOB_GPUS": "0"}, "host"),
        ({"SLURM_JOB_CONSTRAINTS": "gpu_vfio2", "SLURM_JOB_GPUS": "0,1"}, "host"),
        ({"SLURM_JOB_GPUS": "1"}, "host"),
        ({"SLURM_JOB_CONSTRAINTS": "gpu_host|gpu_vfio", "SLURM_JOB_GPUS": "0"}, ""),
        ({"SLURM_JOB_CONSTRAINTS": "fast"}, ""),
        ({}, ""),
    ],
)
def test_where_a_job_wants_gpus_is_told_by_its_features(job: dict[str, str], target: str) -> None:
    assert slurm_hook.target_of(job) == target


def test_the_active_feature_is_where_all_gpus_are() -> None:
    assert slurm_hook.feature_of([gpu(FIRST, "host"), gpu(SECOND, "host")]) == "gpu_host"
    assert slurm_hook.feature_of([gpu(FIRST, "vfio"), gpu(SECOND, "vfio")]) == "gpu_vfio"
    assert slurm_hook.feature_of([gpu(FIRST, "host"), gpu(SECOND, "vfio")]) == ""
    assert slurm_hook.feature_of([]) == ""


def test_what_slurmctld_has_is_corrected_unless_it_waits_for_a_change(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.gpus = [gpu(FIRST, "vfio"), gpu("0000:62:00.0", "host", managed=False)]
    machine.state = "MIXED+POWERING_UP"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []
    machine.state = "IDLE"
    for _ in range(2):
        assert slurm_hook.main(["health"]) == 0
    assert machine.done == ["activefeatures=fast,gpu_vfio"]
    # slurmd compares nothing where nothing is said
    assert slurm_hook.main(["features"]) == 0
    assert capsys.readouterr().out == ""


def test_a_feature_is_set_by_moving_all_gpus(machine: Machine) -> None:
    machine.state, machine.active = "MIXED+POWERING_UP", "gpu_vfio"
    assert slurm_hook.main(["features", "gpu_vfio"]) == 0
    assert machine.done == ["gpuswitchctl to-vfio --all"]
    assert slurm_hook.main(["features", "gpu_vfio"]) == 0
    assert len(machine.done) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"refusal": f"{FIRST} is in use by python3 (4711)\nas well"}, f"{FIRST} is in use by python3 (4711)"),
        ({"result": "reverted"}, f"{FIRST} did not get to vfio: reverted: no luck"),
        ({"is_silent": True}, "the service cannot be reached"),
        ({"gpus": []}, "the configuration of gpuswitch has no [[gpu]] table, so there is nothing to move to vfio"),
    ],
)
def test_a_feature_that_cannot_be_set_drains_the_node_and_is_no_failure_for_slurm(
    machine: Machine, fault: dict[str, Any], reason: str
) -> None:
    machine.state, machine.active = "MIXED+POWERING_UP", "fast,gpu_vfio"
    vars(machine).update(fault)
    assert slurm_hook.main(["features", "gpu_vfio"]) == 0
    drained = [word for word in machine.done if word.startswith("state")]
    assert drained == [f"state=drain reason=gpuswitch: {reason}"]
    known = bool(machine.gpus) and not machine.is_silent
    assert machine.active == ("fast,gpu_host" if known else "fast,gpu_vfio")


def test_without_slurmctld_a_failure_is_slurms_to_tell(machine: Machine) -> None:
    machine.has_controller, machine.refusal = False, "no"
    assert slurm_hook.main(["features", "gpu_vfio"]) == 1
    assert slurm_hook.main(["features", "gpu_nosuch"]) == 2
    assert slurm_hook.main(["features", "gpu_host", "gpu_vfio"]) == 2


def test_a_job_is_not_started_where_gpus_are_not_as_it_wants_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm_hook.main(["prolog"]) == 0
    monkeypatch.setenv("SLURM_JOB_CONSTRAINTS", "gpu_vfio")
    machine.refusal = "no"
    assert slurm_hook.main(["prolog"]) == 1
    assert machine.done == [f"state=drain reason=gpuswitch: {FIRST}: no"]
    machine.refusal = ""
    assert slurm_hook.main(["prolog"]) == 0
    assert machine.done[1:] == ["gpuswitchctl to-vfio --all", "activefeatures=fast,gpu_vfio"]
    # a GPU on vfio that a virtual machine has is no job's
    machine.gpus[0]["owner"] = {"name": "win11", "uuid": ""}
    assert slurm_hook.main(["prolog"]) == 1
    assert machine.reason == f"gpuswitch: {FIRST} is owned by win11, and no job of this node has that"
    # a node where gpuswitch has none is left to the driver
    monkeypatch.setenv("SLURM_JOB_CONSTRAINTS", "gpu_host")
    machine.gpus = []
    assert slurm_hook.main(["prolog"]) == 0


def test_a_node_is_drained_while_a_gpu_is_of_no_use(machine: Machine) -> None:
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []
    machine.gpus[1] |= {"state": "wedged", "name": "card", "reason": "the kernel\nhas it"}
    for _ in range(2):
        assert slurm_hook.main(["health"]) == 0
    assert machine.done == [f"state=drain reason=gpuswitch: card ({SECOND}) is wedged: the kernel"]
    machine.gpus[1]["state"] = "recovering"
    assert slurm_hook.main(["health"]) == 0
    assert len(machine.done) == 1
    machine.gpus[1]["state"] = "host"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done[1:] == ["state=undrain"]


@pytest.mark.parametrize(
    "fault", [{"refusal": "in use"}, {"gpus": [gpu(FIRST, "host", switch={"result": "reverted"})]}]
)
def test_a_node_stays_drained_while_the_next_job_would_fail_too(machine: Machine, fault: dict[str, Any]) -> None:
    machine.state, machine.reason = "IDLE+DRAIN", "gpuswitch: something"
    vars(machine).update(fault)
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []


@pytest.mark.parametrize("state", ["MIXED", "ALLOCATED", "MIXED+COMPLETING"])
def test_a_job_that_runs_does_not_keep_its_node_drained(machine: Machine, state: str) -> None:
    machine.state, machine.reason = f"{state}+DRAIN", "gpuswitch: the service cannot be reached"
    # to-vfio is refused for the GPU that the job itself has open, and Slurm asks for none before the job has ended
    machine.refusal = "in use"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == ["state=undrain"]


@pytest.mark.parametrize("state", ["IDLE+COMPLETING", "MIXED+POWERING_UP"])
def test_a_node_whose_change_has_just_failed_stays_drained(machine: Machine, state: str) -> None:
    # its job has not begun: once it is back in the queue it would come here again
    machine.state, machine.reason, machine.refusal = f"{state}+DRAIN", "gpuswitch: something", "in use"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []


def test_a_node_with_jobs_stays_drained_while_the_active_feature_cannot_be_had(machine: Machine) -> None:
    machine.state, machine.reason, machine.refusal = "MIXED+DRAIN", "gpuswitch: something", "in use"
    machine.gpus[1]["state"] = "vfio"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []
    machine.refusal = ""
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == ["state=undrain"]


def test_what_somebody_else_drained_is_left_alone(machine: Machine) -> None:
    machine.state, machine.reason = "IDLE+DRAIN", "fan"
    assert slurm_hook.main(["health"]) == 0
    machine.gpus[0]["state"] = "failed"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []
    machine.state, machine.reason = "DOWN", "Not responding"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []


def test_an_owned_gpu_is_a_job_s_where_one_asked_for_vfio(machine: Machine) -> None:
    for one in machine.gpus:
        one.update(state="vfio", owner={"name": "win11", "uuid": ""})
    machine.active, machine.jobs = "fast,gpu_vfio", "(null)\nfast&gpu_vfio\n"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == []
    machine.jobs = "(null)\n"
    assert slurm_hook.main(["health"]) == 0
    assert machine.done == [
        f"state=drain reason=gpuswitch: {FIRST} is owned by win11, and no job of this node has that"
    ]


def test_a_service_of_another_version_is_told_by_the_drain(machine: Machine) -> None:
    machine.version = 2
    assert slurm_hook.main(["health"]) == 0
    [said] = machine.done
    assert said.startswith("state=drain reason=gpuswitch: gpuswitchctl prints JSON of version 2, and this reads")


def test_an_answer_that_is_none_is_told(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has_controller = False
    assert slurm_hook.main(["health"]) == 1
    assert "cannot run scontrol show aliases" in capsys.readouterr().err


def test_a_program_that_is_not_there_or_does_not_end_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(slurm_hook, "PLACES", "/bin:/usr/bin")
    with pytest.raises(slurm_hook.NoAnswerError, match="cannot find gpuswitch-nosuch in /nowhere:/bin"):
        slurm_hook._run(("gpuswitch-nosuch",), 1)
    with pytest.raises(slurm_hook.NoAnswerError, match=r"sleep 60 gave no answer within 0 s"):
        slurm_hook._run(("sleep", "60"), 0.01)
    assert slurm_hook._run(("sh", "-c", "echo a; exit 3"), 10).returncode == 3
