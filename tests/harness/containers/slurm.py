"""A cluster of Slurm, as Debian packages it: a machine with slurmctld, and nodes with slurmd.

What Slurm needs lies below the system's own layers, so all else is as it is in every other container.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.harness.containers.container import Container
from tests.harness.containers.network import Network
from tests.harness.debian.cache import Cache
from tests.harness.debian.releases import Release
from tests.harness.debian.roots import find_root

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
SHARE = "/usr/local/share/gpuswitch/slurm"
CONTROLLER = "ctl"
JOBS = "/srv/jobs"
"""Where jobs may write, on each machine."""

UNITS = ("munge", "slurmd", "slurmctld")
NOT_YET = {f"/run/systemd/system/{unit}.service": "" for unit in UNITS}
"""Masked: the users that they want are made when the system is up."""

MAKE_USERS = """\
set -e
for name in munge slurm; do
    getent passwd $name >/dev/null || useradd --system --home-dir /nonexistent --no-create-home $name
done
useradd --create-home --uid 1100 kim
install -d -m 1777 /srv/jobs
chown -R munge:munge /etc/munge /var/lib/munge /var/log/munge
chown -R slurm:slurm /var/lib/slurm /var/log/slurm
"""

BRIEF = {"ResumeTimeout": "20", "HealthCheckInterval": "5"}
"""Seconds that an administrator would have longer. Slurm 26.05 notes that a health check may take longer than that."""

SETTINGS = f"""\
ClusterName=lab
SlurmctldHost={CONTROLLER}
SlurmUser=slurm
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
# the machine's own kernel has control groups that slurmd does not know
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=1
# jobs that have ended stay known, for tests to ask about
MinJobAge=7200
GresTypes=gpu
DebugFlags=NodeFeatures
"""
NODE_SETTINGS = """\
NodeName={nodes} CPUs=2 RealMemory=100 Gres=gpu:2 Features={features} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES
"""


def find_below(cache: Cache, release: Release) -> Path:
    """The layer with Slurm as the release has it: about two minutes."""
    with cache.lock():
        return find_root(cache, "slurm", release, PACKAGES)


class Slurm:
    """Machines by their names, the controller among them; slurmd runs on all others when this is made.

    Each node has `features`, and ours.
    """

    def __init__(self, controller: Container, nodes: dict[str, Container], network: Network, *features: str) -> None:
        self.controller = controller
        self.nodes = nodes
        machines = {CONTROLLER: controller, **nodes}
        addresses = {name: network.connect(machine, at) for at, (name, machine) in enumerate(machines.items(), 1)}
        hosts = "".join(f"{address} {name}\n" for name, address in addresses.items())
        ours = controller.read(f"{SHARE}/slurm.conf")
        for key, value in BRIEF.items():
            ours = re.sub(rf"^{key}=.*$", f"{key}={value}", ours, flags=re.MULTILINE)
        all_features = ",".join((*features, "gpu_host", "gpu_vfio"))
        settings = SETTINGS + ours + NODE_SETTINGS.format(nodes=",".join(nodes), features=all_features)
        for name, machine in machines.items():
            machine.push(f"127.0.0.1 localhost\n{hosts}", "/etc/hosts")
            machine.push(settings, "/etc/slurm/slurm.conf")
            machine.push("CgroupPlugin=disabled\n", "/etc/slurm/cgroup.conf")
            copies = " ".join(f"{SHARE}/{file}" for file in ("helpers.conf", "gres.conf", "job_submit.lua"))
            here = " ".join(f"/run/systemd/system/{unit}.service" for unit in UNITS)
            machine.sh(
                f"{MAKE_USERS}hostname {name}; cp {copies} /etc/slurm/; systemd-tmpfiles --create {SHARE}/devices.conf"
                f"; rm {here}; systemctl daemon-reload; systemctl start munge"
            )
        controller.sh("systemctl start slurmctld")
        for machine in nodes.values():
            machine.sh("systemctl start slurmd")
        for name in nodes:
            # by then the health check has said where its GPUs are
            self.until(
                f"scontrol --oneliner show node {name} | grep 'State=IDLE '"
                " | grep 'ActiveFeatures=[^ ]*gpu_host' | grep -qv 'ActiveFeatures=[^ ]*gpu_vfio'"
            )

    def submit(self, script: str, options: str = "") -> str:
        """Send a job of a user; its number."""
        said = self.controller.sh(f"su kim -c {shlex.quote(f'cd; sbatch --parsable {options}')}", stdin=script)
        return said.stdout.strip()

    def until(self, condition: str, *, timeout: float = 180) -> None:
        """Wait until a shell command succeeds on the controller."""
        self.controller.sh(f"until {condition}; do sleep 0.2; done", timeout=timeout)

    def until_job(self, job: str, *states: str, timeout: float = 180) -> None:
        self.until(f"scontrol show job {job} | grep -qE 'JobState=({'|'.join(states)})'", timeout=timeout)

    def job(self, job: str) -> dict[str, str]:
        return fields(self.controller.sh(f"scontrol --oneliner show job {job}").stdout)

    def node(self, name: str) -> dict[str, str]:
        """With the reason as `Reason`, without who gave it."""
        said = self.controller.sh(f"scontrol --oneliner show node {name}").stdout
        reason = re.search(r"Reason=(.*?) \[", said)
        return fields(said) | {"Reason": reason[1] if reason else ""}

    def update(self, name: str, *what: str) -> None:
        self.controller.sh(shlex.join(("scontrol", "update", f"nodename={name}", *what)))


def fields(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", text))
