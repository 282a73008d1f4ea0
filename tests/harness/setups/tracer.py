"""What happens to a worker of the service at a chosen write: from outside, by strace."""

from __future__ import annotations

from tests.harness.machines.inside import words
from tests.harness.setups.guest import ctl
from tests.harness.virtual_machines.machine import Machine

LOG = "/run/strace"


def inject(machine: Machine, gpu: str, path: str, what: str) -> None:
    """Do something to the writes to a file by the worker of a GPU: "signal=STOP:when=1", as strace has it.

    strace has the worker when this returns. The first who asks for a switch starts it, also where that is refused.
    """
    ctl(machine, f"to-vfio {gpu} --stop-unit no-such-unit.service", check=False)
    machine.sh(
        f"""worker=$(pgrep -f '[w]orker_main.*{gpu} worker$')
        setsid strace -o /dev/null -P {path} -e trace=write -e inject=write:{what} -p $worker \
            </dev/null >/dev/null 2>{LOG} &"""
    )
    machine.do(words.await_text, LOG, "attached")
