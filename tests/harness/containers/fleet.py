"""Hosts that are reached by ssh over a network between them, and the one that has Ansible: all are containers.

What ssh and Ansible need lies below the system's own layers, so all else is as it is in every other container.
"""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tests.harness.containers.container import Container
from tests.harness.containers.network import Network, address_of
from tests.harness.debian.cache import Cache
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.releases import Release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import PROJECT
from tests.harness.machines.errors import Result

PACKAGES = ("openssh-server", "openssh-client", "ansible-core")
COLLECTION = "contrib/ansible"
FOLDER = "/srv/fleet"
INSTALLED = f"{FOLDER}/collections/ansible_collections/gpuswitch/gpuswitch"
KEY = f"{FOLDER}/key"

NO_SSH_BY_ITSELF = {f"/etc/systemd/system/{unit}": "" for unit in ("ssh.service", "ssh.socket")}
"""Masked: the user that it wants is made when the system is up."""

SETTINGS = f"""\
[defaults]
inventory = {FOLDER}/hosts.yml
collections_path = {FOLDER}/collections
callbacks_enabled = gpuswitch.gpuswitch.report
remote_user = root
private_key_file = {KEY}
host_key_checking = false
forks = 20
timeout = 10
interpreter_python = auto_silent
nocows = true
[inventory]
enable_plugins = yaml, gpuswitch.gpuswitch.gpus
"""

START_SSH = """\
set -e
getent passwd sshd >/dev/null || useradd --system --home-dir /run/sshd --shell /usr/sbin/nologin sshd
mkdir -p /run/sshd ~/.ssh
chmod 700 ~/.ssh
cat >~/.ssh/authorized_keys
ssh-keygen -A >/dev/null
systemd-run --quiet --unit=fleet-sshd --property=KillMode=process /usr/sbin/sshd -D
"""


INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_EACH = 20
"""What a whole systemd with its services may take of it, and some for whatever else runs here."""


def require_inotify(machines: int) -> None:
    """Raises HarnessError where this machine's kernel gives root too few of them for so many containers at once."""
    needed = machines * INOTIFY_EACH
    if int(INOTIFY.read_text()) < needed:
        raise HarnessError(
            f"cannot run {machines} containers at once; run: sysctl fs.inotify.max_user_instances={needed}"
        )


def find_below(cache: Cache, release: Release) -> Path:
    """The layer with ssh and Ansible as the release has them: about a minute."""
    with cache.lock():
        return find_root(cache, "fleet", release, PACKAGES)


class Fleet:
    """Hosts by the names that Ansible has for them, in the group `gpu_hosts`, and the machine that runs it."""

    def __init__(self, controller: Container, network: Network) -> None:
        self.controller = controller
        self._network = network
        self._numbers: dict[str, int] = {}
        network.connect(controller, 1)
        controller.push(packed_collection(), f"{FOLDER}/collection.tar")
        controller.push(SETTINGS, f"{FOLDER}/ansible.cfg")
        unpack = f"mkdir -p {INSTALLED} && tar -xf {FOLDER}/collection.tar -C {INSTALLED}"
        controller.sh(f"{unpack} && ssh-keygen -q -t ed25519 -N '' -f {KEY}")
        self._public = controller.read(f"{KEY}.pub")

    def add(self, name: str, machine: Container | None) -> None:
        """A host that can be reached when this returns; None: one that nobody can reach."""
        number = self._numbers[name] = len(self._numbers) + 2
        if machine is not None:
            machine.sh(START_SSH, stdin=self._public)
            self._network.connect(machine, number)
            address = f"{address_of(number)}/22"
            self.controller.sh(f"until (exec 3<>/dev/tcp/{address}) 2>/dev/null; do :; done".join(("bash -c '", "'")))
        hosts = "".join(f"    {name}: {{ansible_host: {address_of(at)}}}\n" for name, at in self._numbers.items())
        self.controller.push(f"gpu_hosts:\n  hosts:\n{hosts}", f"{FOLDER}/hosts.yml")

    def play(self, text: str, options: str = "", *, check: bool = True, timeout: float = 300) -> Result:
        """Run a playbook. With check, it has to end well."""
        self.controller.push(text, f"{FOLDER}/play.yml")
        return self.run(f"ansible-playbook {options} {FOLDER}/play.yml", check=check, timeout=timeout)

    def ask(self, host: str, module: str, arguments: str = "", options: str = "") -> Result:
        """Run a module on a host."""
        words = f"{host} -m gpuswitch.gpuswitch.{module} -a {shlex.quote(arguments)} {options}"
        return self.run(f"ansible {words}", check=False)

    def run(self, command: str, *, check: bool = True, timeout: float = 300, **env: str) -> Result:
        variables = {"ANSIBLE_CONFIG": f"{FOLDER}/ansible.cfg", "ANSIBLE_NOCOLOR": "1", **env}
        return self.controller.sh(f"{words_of(variables)} {command}", check=check, timeout=timeout)


def words_of(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def packed_collection() -> bytes:
    """The collection as it is here."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(PROJECT / COLLECTION, ".", filter=lambda entry: None if "__pycache__" in entry.name else entry)
    return archive.getvalue()
