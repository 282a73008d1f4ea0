"""Slurm of the release, with a real slurmctld and slurmd on nodes that have simulated GPUs.

Not on bookworm (conftest.py): its Slurm, 22.05, knows no features that are changed without a reboot.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.network import Network
from tests.harness.containers.slurm import JOBS, NOT_YET, SHARE, Slurm, find_below
from tests.harness.containers.system import System
from tests.harness.containers.words import NAME, ctl, path_of, prop, simulated
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.real_system.conftest import RELEASE, Boot

CARDS = ("0000:01:00.0", "0000:41:00.0")
TABLES = "".join(f'[[gpu]]\naddress = "{card}"\n' for card in CARDS) + "[deadlines]\nunbind = 0.2\n"
"""Of the simulated host `workstation`."""
WIN11 = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
ACQUIRE = f"acquire --name win11 --uuid {WIN11} {CARDS[0]}"
RELEASED = f"release --name win11 --uuid {WIN11}"

LOOK = "".join(f"busctl get-property {NAME} {path_of(card)} {NAME}.Gpu State\n" for card in CARDS)
JOB = f"#!/bin/sh\n{LOOK}sleep {{seconds}}\n{LOOK}"
"""Says where the GPUs are when it begins, and when it ends."""

QUEUE_SECONDS = 30 * 60
BOOTED = "SLURMD_OPTIONS=-b"
VFIO, CUDA, PROCESSOR = "-C gpu_vfio --gres=gpu:1", "--gres=gpu:1", ""

JOINED = {
    "rack1": "gpu_host&rack1",
    "rack1&rack2": "gpu_host&rack1&rack2",
    "rack1|rack2": "gpu_host&(rack1|rack2)",
    "rack1&rack2|rack3": "gpu_host&(rack1&rack2|rack3)",
    "(rack1|rack2)&rack3": "gpu_host&(rack1|rack2)&rack3",
    "(rack1|rack2)&(rack2|rack3)": "gpu_host&(rack1|rack2)&(rack2|rack3)",
}
"""What a job for CUDA asks for, and what job_submit.lua makes of it."""
LEFT_ALONE = (
    "(rack1|rack2)|rack3",
    "(rack1&rack2)|(rack2&rack3)",
    "rack1|rack2&rack3",
    "[rack1|rack2]",
    "rack1&[rack2|rack3]",
    "rack1*1",
)
"""Slurm has no words for these with another feature that changes."""

Cluster = Callable[..., Slurm]
"""`cluster(feature, ..., name=faults, ...)`: nodes of these names, on simulated hosts with these faults."""


@pytest.fixture(scope="session")
def below(request: pytest.FixtureRequest) -> Path:
    return find_below(Cache(default_folder(), progress(request.config)), find_release(RELEASE))


@pytest.fixture
def cluster(boot: Boot, system: System, below: Path) -> Iterator[Cluster]:
    with Network() as network:

        def node(*faults: str) -> Container:
            files = simulated(*faults, scenario="workstation") | NOT_YET | {"/etc/gpuswitch/config.toml": TABLES}
            return boot((*system.installed, below), files)

        def cluster(*features: str, **nodes: tuple[str, ...]) -> Slurm:
            controller = boot((*system.installed, below), NOT_YET)
            return Slurm(controller, {name: node(*faults) for name, faults in nodes.items()}, network, *features)

        yield cluster


def seen(slurm: Slurm, job: str) -> set[str]:
    """Where the GPUs were for a job, from its beginning to its end."""
    told = slurm.nodes[slurm.job(job)["NodeList"]].read(f"{JOBS}/{job}")
    return {line.split('"')[1] for line in told.splitlines()}


def submit(slurm: Slurm, options: str, *, node: str = "", seconds: float = 0) -> str:
    return slurm.submit(JOB.format(seconds=seconds), f"-o {JOBS}/%j {f'-w {node}' if node else ''} {options}")


def until_back(slurm: Slurm, node: str, job: str) -> None:
    """Wait until jobs go there again, and have one that waits for vfio begin at once."""
    slurm.until(f"scontrol show node {node} | grep -q 'State=IDLE '")
    slurm.controller.sh(f"scontrol update jobid={job} starttime=now")
    slurm.until_job(job, "COMPLETED")
    assert seen(slurm, job) == {"vfio"}


def states(slurm: Slurm, node: str) -> list[str]:
    return [prop(slurm.nodes[node], "State", card) for card in CARDS]


@pytest.mark.campaign
def test_a_node_whose_gpus_cannot_be_moved_is_drained_with_the_reason_until_they_can(cluster: Cluster) -> None:
    slurm = cluster(n1=(), n2=("unbind@0000:41:00.1#1=hang",))
    # a virtual machine has a GPU: that node is none for jobs
    ctl(slurm.nodes["n1"], ACQUIRE)
    slurm.until("scontrol show node n1 | grep -q DRAIN")
    owned = f"gpuswitch: {CARDS[0]} is owned by win11, and no job of this node has that"
    assert slurm.node("n1")["Reason"] == owned
    # the kernel does not return: the job waits for another node, and this one says why
    job = submit(slurm, VFIO, node="n2")
    slurm.until("scontrol show node n2 | grep -q 'State=IDLE+DRAIN '")
    reason = slurm.node("n2")["Reason"]
    assert reason.startswith(f"gpuswitch: {CARDS[1]} ")
    assert "the kernel has not returned from 'unbind " in reason
    assert slurm.job(job)["JobState"] == "PENDING"
    assert slurm.job(job)["Restarts"] == "1"
    # it is given back, and the node with it
    ctl(slurm.nodes["n1"], RELEASED)
    slurm.until("scontrol show node n1 | grep -q 'State=IDLE '")
    assert slurm.node("n1")["ActiveFeatures"] == "gpu_host"
    assert slurm.node("n2")["State"] == "IDLE+DRAIN"


@pytest.mark.campaign
def test_jobs_find_gpus_where_they_asked_for_them(cluster: Cluster) -> None:
    slurm = cluster(n1=(), n2=())
    job = submit(slurm, VFIO, node="n1")
    slurm.until_job(job, "COMPLETED")
    assert seen(slurm, job) == {"vfio"}
    assert slurm.node("n1")["ActiveFeatures"] == "gpu_vfio"
    # the next one that wants CUDA gets them back
    job = submit(slurm, CUDA, node="n1")
    slurm.until_job(job, "COMPLETED")
    assert seen(slurm, job) == {"host"}
    assert slurm.job(job)["Features"] == "gpu_host"
    # with other features, too, and for a job that names none of its own
    assert slurm.controller.sh("su kim -c 'sbatch -C nosuch --gres=gpu:1 --wrap true'", check=False).status
    either = submit(slurm, "-C 'gpu_host|gpu_vfio' --gres=gpu:1", node="n1")
    slurm.until_job(either, "COMPLETED")
    assert slurm.controller.sh("su kim -c 'sbatch -C \"gpu_host&gpu_vfio\" --wrap true'", check=False).status
    # the device files that stay are GPUs as any others
    job = slurm.submit("#!/bin/sh\necho $CUDA_VISIBLE_DEVICES\n", f"-o {JOBS}/%j -w n1 --gres=gpu:2")
    slurm.until_job(job, "COMPLETED")
    assert slurm.nodes["n1"].read(f"{JOBS}/{job}") == "0,1\n"
    # who needs no GPU waits for none, and moves none
    job = submit(slurm, PROCESSOR, node="n1")
    slurm.until_job(job, "COMPLETED")
    assert seen(slurm, job) == {"host"}

    # cancelled while GPUs are moved for it: nothing is left of it
    job = submit(slurm, VFIO, node="n2", seconds=60)
    slurm.until_job(job, "CONFIGURING")
    slurm.controller.sh(f"scancel {job}")
    slurm.until("scontrol show node n2 | grep -q 'State=IDLE '")
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert slurm.node("n2")["ActiveFeatures"] == "gpu_vfio"
    assert states(slurm, "n2") == ["vfio", "vfio"]

    # somebody moves a GPU behind Slurm's back: the prolog moves it again
    job = submit(slurm, CUDA, node="n2")
    slurm.until_job(job, "COMPLETED")
    slurm.controller.sh("scontrol update nodename=n2 state=drain reason=mine")
    ctl(slurm.nodes["n2"], "to-vfio --all")
    job = submit(slurm, f"{CUDA} -C gpu_host", node="n2")
    slurm.until("scontrol show node n2 | grep -q 'ActiveFeatures=gpu_vfio'")
    assert slurm.node("n2")["Reason"] == "mine"
    slurm.update("n2", "state=resume")
    slurm.until_job(job, "COMPLETED")
    assert seen(slurm, job) == {"host"}


@pytest.mark.campaign
def test_what_is_in_the_way_is_the_reason_of_a_drain_and_nobody_elses_drain_is_undone(cluster: Cluster) -> None:
    slurm = cluster(n1=("probe@0000:01:00.0#1=EINVAL",), n2=())
    node = slurm.nodes["n2"]
    # the service gives no answer
    node.sh("systemctl mask --now --runtime gpuswitchd")
    slurm.until("scontrol show node n2 | grep -q DRAIN")
    assert slurm.node("n2")["Reason"].startswith("gpuswitch: ")
    node.sh("systemctl unmask --runtime gpuswitchd; systemctl start gpuswitchd")
    slurm.until("scontrol show node n2 | grep -q 'State=IDLE '")
    # a drain of an administrator keeps its reason, whatever the GPUs do
    slurm.update("n2", "state=drain", "reason=fan")
    ctl(node, ACQUIRE)
    slurm.nodes["n2"].sh(f"SLURMD_NODENAME=n2 {SHARE}/health")
    assert slurm.node("n2")["Reason"] == "fan"
    ctl(node, RELEASED)
    node.sh(f"SLURMD_NODENAME=n2 {SHARE}/health")
    assert (slurm.node("n2")["State"], slurm.node("n2")["Reason"]) == ("IDLE+DRAIN", "fan")
    # one of ours that an administrator takes over is the administrator's
    slurm.update("n2", "state=resume")
    ctl(node, ACQUIRE)
    slurm.until("scontrol show node n2 | grep -q DRAIN")
    slurm.update("n2", "state=drain", "reason=fan")
    ctl(node, RELEASED)
    node.sh(f"SLURMD_NODENAME=n2 {SHARE}/health")
    assert (slurm.node("n2")["State"], slurm.node("n2")["Reason"]) == ("IDLE+DRAIN", "fan")

    # a switch that failed: the node waits until one has worked, or the next job would find the same
    job = submit(slurm, VFIO, node="n1")
    slurm.until("scontrol show node n1 | grep -q 'IDLE+DRAIN '")
    assert slurm.node("n1")["Reason"].startswith(f"gpuswitch: {CARDS[0]} did not get to vfio: reverted: cannot bind")
    assert slurm.job(job)["JobState"] == "PENDING"
    slurm.nodes["n1"].sh(f"SLURMD_NODENAME=n1 {SHARE}/health")
    assert slurm.node("n1")["State"] == "IDLE+DRAIN"
    ctl(slurm.nodes["n1"], "to-vfio --all")
    until_back(slurm, "n1", job)


@pytest.mark.campaign
def test_a_slurmd_that_is_killed_while_gpus_are_moved_costs_time_and_no_job(cluster: Cluster) -> None:
    slurm = cluster(n1=("unbind@0000:41:00.0#1=3s",))
    node = slurm.nodes["n1"]
    node.push(TABLES.replace("unbind = 0.2", "unbind = 10"), "/etc/gpuswitch/config.toml")
    node.sh("systemctl reload gpuswitchd")
    job = submit(slurm, VFIO, node="n1")
    node.sh("until pgrep -f 'slurm_hook.p[y] features gpu_vfio' >/dev/null; do :; done")
    node.sh(
        "systemctl kill --signal=KILL --kill-whom=main slurmd; systemctl reset-failed slurmd; systemctl start slurmd"
    )
    slurm.until("scontrol show node n1 | grep -qE 'Reason=(ResumeTimeout reached|reboot timed out)'")
    slurm.until_job(job, "PENDING")
    assert states(slurm, "n1") == ["vfio", "vfio"]
    # what docs/slurm.md says
    node.sh("systemctl restart slurmd")
    slurm.update("n1", "state=resume")
    until_back(slurm, "n1", job)


@pytest.mark.campaign
def test_a_job_for_cuda_is_taken_with_whatever_else_it_asks_for(cluster: Cluster) -> None:
    slurm = cluster("rack1", "rack2", "rack3", n1=())
    asked = JOINED | {constraint: constraint for constraint in LEFT_ALONE}
    jobs = {constraint: submit(slurm, f"--hold {CUDA} -C '{constraint}'") for constraint in asked}
    assert {constraint: slurm.job(job)["Features"] for constraint, job in jobs.items()} == asked
    # a job with a node that it shares is none for vfio, whoever owns it
    job = jobs["rack1"]
    changed = slurm.controller.sh(f"su kim -c 'scontrol update jobid={job} features=gpu_vfio' 2>&1", check=False)
    assert changed.status
    assert "cannot change a job to gpu_vfio" in changed.stdout
    slurm.controller.sh(f"su kim -c 'scontrol update jobid={job} features=rack2'")
    assert slurm.job(job)["Features"] == "rack2"
    # GPUs come back from vfio for those that are joined, and for the others in the prolog
    for constraint in ("(rack1|rack2)&rack3", "[rack1|rack2]"):
        slurm.until_job(submit(slurm, VFIO), "COMPLETED")
        slurm.controller.sh(f"scontrol release {jobs[constraint]}")
        slurm.until_job(jobs[constraint], "COMPLETED")
        assert seen(slurm, jobs[constraint]) == {"host"}


def waiting(slurm: Slurm) -> int:
    """How many jobs have not ended, after a second in which they may."""
    return int(slurm.controller.sh("sleep 1; squeue --noheader | wc -l").stdout)


def running(slurm: Slurm, name: str) -> set[str]:
    """The jobs that are on this node, or on their way there."""
    return set(slurm.controller.sh(f"squeue --noheader --nodelist={name} --format=%i").stdout.split())


def mend(slurm: Slurm) -> None:
    """What docs/slurm.md has an administrator do with a node where slurmd or slurmctld ended in a change."""
    for name, node in slurm.nodes.items():
        flags = set(slurm.node(name)["State"].split("+"))
        if "POWERING_UP" not in flags and "DOWN" in flags:
            node.sh("systemctl restart slurmd")
            slurm.update(name, "state=resume")
        elif "POWERING_UP" in flags and "NOT_RESPONDING" not in flags:
            node.sh("until ! pgrep -f 'slurm_hook.p[y] features' >/dev/null; do sleep 0.2; done")
            node.sh(f"systemctl set-environment {BOOTED}; systemctl restart slurmd")
            node.sh("systemctl unset-environment SLURMD_OPTIONS")


@pytest.mark.campaign
@pytest.mark.timeout(3 * QUEUE_SECONDS)
def test_a_queue_of_mixed_jobs_loses_none(cluster: Cluster) -> None:
    """Meanwhile virtual machines take GPUs, services and slurmd start anew, and jobs are cancelled."""
    chance = random.Random(20261130)  # noqa: S311 -- the same queue each time
    slurm = cluster(n1=(), n2=())
    ends = time.monotonic() + QUEUE_SECONDS
    jobs: dict[str, str] = {}
    cancelled: set[str] = set()
    disturbed: set[str] = set()
    while time.monotonic() < ends:
        for _ in range(chance.randint(1, 4)):
            kind = chance.choice((VFIO, CUDA, CUDA, PROCESSOR))
            jobs[submit(slurm, kind, seconds=chance.randint(0, 8))] = kind
        name = chance.choice(sorted(slurm.nodes))
        node = slurm.nodes[name]
        match chance.randrange(5):
            case 0:
                last = max(jobs, key=int)
                slurm.controller.sh(f"scancel {last}")
                cancelled.add(last)
            case 1:
                # A simulated host begins anew with its service, and its GPUs are at home: who has them then sees that.
                disturbed |= running(slurm, name)
                node.sh("systemctl restart gpuswitchd")
                disturbed |= running(slurm, name)
            case 2:
                node.sh("systemctl restart slurmd")
            case 3:
                # as jobs here hold no GPU, a machine would take it from them
                if slurm.node(name)["State"] in {"IDLE", "MIXED", "ALLOCATED"}:
                    slurm.update(name, "state=drain", "reason=win11")
                    slurm.until(f"scontrol show node {name} | grep -q 'State=IDLE+DRAIN '")
                    ctl(node, ACQUIRE)
                    slurm.update(name, "state=resume")
                    slurm.controller.sh("sleep 12")
                    ctl(node, RELEASED)
            case 4:
                slurm.controller.sh("systemctl restart slurmctld")
        # as many as can be worked off: each change of features takes Slurm half a minute
        while waiting(slurm) > 5:
            mend(slurm)
    while waiting(slurm):
        mend(slurm)
    slurm.until("[ $(sinfo -h -t idle -o %D) = 2 ]")
    ends_of = {job: slurm.job(job)["JobState"] for job in jobs}
    assert {job for job, state in ends_of.items() if state != "COMPLETED"} <= cancelled
    wanted = {VFIO: {"vfio"}, CUDA: {"host"}}
    ended = {job for job, state in ends_of.items() if state == "COMPLETED" and jobs[job] in wanted}
    done = sorted(ended - disturbed)
    assert len(done) > len(ended) // 2
    assert {job: seen(slurm, job) for job in done} == {job: wanted[jobs[job]] for job in done}
