"""Programs that hold device nodes."""

from __future__ import annotations

from pathlib import Path

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.virtual_machines.machine import Machine

GUEST = Path(__file__).parent / "inside"
PLACE = "/usr/local/lib/setups"

UNIT = """\
[Unit]
Description={description}
[Service]
Type=notify
User={user}
SupplementaryGroups=video render
ExecStart={place}/hold.py {arguments}
{more}
"""

# systemd's own patience with a program that does not end is no part of what is tested
STUBBORN = "TimeoutStopSec=infinity"


def install(machine: Machine, program: str) -> str:
    """Put a program of the folder `inside` into the machine; gives its path."""
    path = f"{PLACE}/{program}"
    machine.push((GUEST / program).read_bytes(), path, mode=0o755)
    return path


def card(gpu: str) -> str:
    """The card node of a GPU whose driver is a DRM driver: by its address, as numbers change with every bind."""
    return f"/dev/dri/by-path/pci-{gpu}-card"


def start_holder(
    machine: Machine, unit: str, *nodes: str, options: str = "", user: str = "root", more: str = ""
) -> str:
    """Start a service that holds nodes; returns its pid. The options are those of guest/hold.py."""
    arguments = f"{options} {' '.join(nodes)}"
    install(machine, "hold.py")
    text = UNIT.format(description=f"The program of {unit}", user=user, place=PLACE, arguments=arguments, more=more)
    machine.push(text, f"/etc/systemd/system/{unit}")
    units.start(machine, unit)
    return units.main_pid(machine, unit)


def start_game(machine: Machine, *nodes: str) -> str:
    """game.service, of the user tester: ends when it is asked to."""
    return start_holder(machine, "game.service", *nodes, user="tester")


def start_stubborn(machine: Machine, *nodes: str) -> str:
    """stubborn.service: does not end when it is asked to."""
    return start_holder(machine, "stubborn.service", *nodes, options="--stubborn", more=STUBBORN)


def start_mapper(machine: Machine, *nodes: str) -> str:
    """mapper.service: has the nodes mapped, and no descriptor of them."""
    return start_holder(machine, "mapper.service", *nodes, options="--map")


def hide_descriptor(machine: Machine, *nodes: str) -> str:
    """hidden.service: what it holds lies in a message on a socket, where no look at processes finds it."""
    return start_holder(machine, "hidden.service", *nodes, options="--hide")


def holders(machine: Machine, node: str) -> set[str]:
    """The pids that have a node, or what a link leads to, open or mapped: as fuser sees it."""
    return set(machine.sh(f"fuser $(realpath {node}) 2>/dev/null", check=False).stdout.split())


def await_free(machine: Machine, node: str) -> None:
    """Wait until no process has a node open or mapped."""
    machine.sh(f"while fuser -s $(realpath {node}); do :; done")


def await_end(machine: Machine, pid: str) -> None:
    machine.do(words.await_end, int(pid))


def await_process_state(machine: Machine, pid: str, state: str) -> None:
    """Wait until a process is in a state of ps: R, S, D."""
    machine.do(words.await_process_state, int(pid), state)
