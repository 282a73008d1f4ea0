"""The machine's systemd, asked from out here: what systemctl would say and do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jeepney import MatchRule

from tests.harness.machines.bus import BusError, BusInterface
from tests.harness.machines.errors import CommandFailedError, Result
from tests.harness.virtual_machines.machine import Machine

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = BusInterface(SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager")
JOB_SECONDS = 200.0

OF_ALL_UNITS = frozenset({"Id", "ActiveState"})
"""Properties of the interface that all units have; others are of that of services."""


def start(machine: Machine, unit: str) -> None:
    """Start a unit and wait for the end of that. A unit that nobody has asked for before may be new on the disk.

    Raises:
        CommandFailedError: it did not come up.
    """
    _do(machine, "start", unit)


def stop(machine: Machine, unit: str) -> None:
    _do(machine, "stop", unit)


def restart(machine: Machine, unit: str) -> None:
    _do(machine, "restart", unit)


def kill(machine: Machine, unit: str, signal: int, *, whom: str = "all") -> None:
    """Send a signal to the processes of a unit, or to the "main" one."""
    machine.bus.call(MANAGER, "KillUnit", "ssi", _full(unit), whom, signal)


def reload_manager(machine: Machine) -> None:
    """Have systemd read the units of which it knows already anew. Emulated, that takes seconds."""
    machine.bus.call(MANAGER, "Reload")


def show(machine: Machine, unit: str, name: str) -> Any:
    """A property, as it is on the bus: of the unit, or of the service that it is."""
    path = _path(machine, unit)
    interface = "Unit" if name in OF_ALL_UNITS else "Service"
    return machine.bus.get(BusInterface(SYSTEMD, path, f"{SYSTEMD}.{interface}"), name)


def main_pid(machine: Machine, unit: str) -> str:
    """The number of its main process; "0" where it has none."""
    return str(show(machine, unit, "MainPID"))


def active(machine: Machine, *units: str) -> list[str]:
    """The state of each: "active", "inactive", ..."""
    return [show(machine, unit, "ActiveState") for unit in units]


def await_active(machine: Machine, unit: str, wanted: str = "active") -> None:
    """Wait until a unit is in that state."""
    await_shown(machine, unit, "ActiveState", wanted)


def await_shown(machine: Machine, unit: str, name: str, wanted: Any) -> None:
    """Wait until a property of a unit has that value."""
    await_shown_so(machine, unit, name, lambda value: bool(value == wanted))


def await_shown_so(machine: Machine, unit: str, name: str, holds: Callable[[Any], bool]) -> None:
    """Wait until this holds for a property of a unit."""
    rule = MatchRule(type="signal", sender=SYSTEMD, path=_path(machine, unit), member="PropertiesChanged")
    with _subscribed(machine):
        machine.bus.until(rule, lambda: holds(show(machine, unit, name)), timeout=JOB_SECONDS)


def _full(unit: str) -> str:
    """The unit's name; without a type it is a service."""
    return unit if "." in unit else f"{unit}.service"


def _path(machine: Machine, unit: str) -> str:
    """Its object: also of another name of it."""
    [path] = machine.bus.call(MANAGER, "LoadUnit", "s", _full(unit))
    return str(path)


def _do(machine: Machine, what: str, unit: str) -> None:
    rule = MatchRule(type="signal", sender=SYSTEMD, path=MANAGER.path, member="JobRemoved")
    try:
        with _subscribed(machine), machine.bus.signals(rule) as signals:
            [job] = machine.bus.call(MANAGER, f"{what.title()}Unit", "ss", _full(unit), "replace")
            ended, result = "", ""
            while ended != job:
                _, ended, _, result = machine.bus.next_signal(signals, timeout=JOB_SECONDS)
    except BusError as error:
        result = str(error)
    if result != "done":
        failed = Result(f"systemctl {what} {unit}", 1, "", result)
        raise CommandFailedError("failed", failed, machine.console_tail())


@contextmanager
def _subscribed(machine: Machine) -> Iterator[None]:
    """Systemd sends signals only to whoever wants them."""
    machine.bus.call(MANAGER, "Subscribe")
    try:
        yield
    finally:
        machine.bus.call(MANAGER, "Unsubscribe")
