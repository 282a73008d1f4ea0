"""The people of a machine: who they are, and their sessions, as logind has them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from tests.harness.containers.words import INSIDE, PYTHON
from tests.harness.machines.errors import Result
from tests.harness.machines.machine import Machine

PASSWORD = "correct horse"  # noqa: S105 -- of a user in a container that is thrown away

ADA, MAX, KIM, INA = "ada", "max", "kim", "ina"
"""An administrator; a member of the group gpuswitch; a user at the machine; one whose session is not in front."""
NOBODY = "nobody"
GROUPS = {ADA: "sudo", MAX: "gpuswitch", KIM: "users", INA: "users"}


def move_in(machine: Machine) -> None:
    """Make them users, with a password."""
    for name, group in GROUPS.items():
        machine.sh(f"useradd --create-home --groups {group} --shell /bin/bash {name}")
    machine.sh("chpasswd", stdin="".join(f"{name}:{PASSWORD}\n" for name in GROUPS))


def sit_down(machine: Machine, *names: str) -> None:
    """Log them in on the machine's seat, one after the other: the first has the active session."""
    for name in names:
        machine.push(
            f"""[Service]
User={name}
PAMName=login
Environment=XDG_SEAT=seat0 XDG_SESSION_TYPE=wayland XDG_SESSION_CLASS=user
ExecStart=/bin/sleep infinity
""",
            f"/run/systemd/system/seat-{name}.service",
        )
        machine.sh(f"systemctl start seat-{name}; until loginctl show-user {name} -P Display | grep -q .; do :; done")
    machine.sh(f"loginctl activate $(loginctl show-user {names[0]} -P Display)")


def as_user(name: str) -> str:
    """What runs a command as this user: in the session of those who have one, by its control group."""
    if name == "root":
        return ""
    scopes = f"/sys/fs/cgroup/user.slice/user-$(id -u {name}).slice/session-*.scope/cgroup.procs"
    enter = 'for scope in $0; do [ ! -e "$scope" ] || echo $$ >"$scope"; done; exec "$@"'
    user = f"setpriv --reuid={name} --regid=$(id -g {name}) --init-groups env HOME=/tmp"
    return f'sh -c {shlex.quote(enter)} "{scopes}" {user}'


class Call(NamedTuple):
    """`interface` may be empty. In the arguments, the values of an `a{sv}` are pairs of signature and value."""

    path: str
    interface: str
    member: str
    signature: str = ""
    arguments: Sequence[object] = ()
    interactive: bool = False


def errors(machine: Machine, name: str, calls: Sequence[Call]) -> list[str]:
    """The errors that these calls of that user are answered with, "" for none."""
    machine.push((INSIDE / "calls.py").read_text(), "/run/harness/calls.py")
    said = machine.sh(f"{as_user(name)} {PYTHON} /run/harness/calls.py", stdin=json.dumps(list(calls))).stdout
    return [json.loads(line) for line in said.splitlines()]


def on_terminal(machine: Machine, name: str, command: str, *, word: str = "", answer: str = PASSWORD) -> Result:
    """Run a command as this user on a terminal, and type an answer each time that a word is shown."""
    machine.push((INSIDE / "terminal.py").read_text(), "/run/harness/terminal.py")
    words = shlex.join([word, answer])
    return machine.sh(f"{as_user(name)} {PYTHON} /run/harness/terminal.py {words} {command}", check=False)
