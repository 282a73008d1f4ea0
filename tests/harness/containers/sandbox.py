"""Other programs in the service's place: with all that its unit gives and takes away."""

from __future__ import annotations

import shlex

from tests.harness.containers.words import UNIT_FILE
from tests.harness.machines.errors import Result
from tests.harness.machines.machine import Machine

SANDBOX = f"""\
sed -E '/^(ExecStart|ExecReload|Type|NotifyAccess|Watchdog|Restart|RuntimeDirectory|StateDirectory|Config)/d' \\
    {UNIT_FILE} >/run/systemd/system/asking.service
mkdir -p /run/systemd/system/asking.service.d
cat >/run/systemd/system/asking.service.d/what.conf
systemctl daemon-reload
systemctl start asking.service
status=$?
cat /run/asked
exit $status
"""


def ask(machine: Machine, command: str, *, folder: str = "/", check: bool = True) -> Result:
    """Run a command, as a unit file has it, in the sandbox of the service; what it says is the output."""
    lines = (
        *("[Service]", "Type=oneshot", f"WorkingDirectory={folder}", f"ExecStart={command}"),
        *("StandardOutput=truncate:/run/asked", "StandardError=inherit", ""),
    )
    return machine.sh(SANDBOX, stdin="\n".join(lines), check=check, timeout=200)


def ask_shell(machine: Machine, script: str, *, check: bool = True) -> Result:
    """The same with a line for a shell."""
    return ask(machine, shlex.join(("/bin/sh", "-c", script)).replace("%", "%%").replace("$", "$$"), check=check)
