"""The machine's logind, asked from out here: who keeps the machine awake."""

from __future__ import annotations

from jeepney import MatchRule

from tests.harness.machines.bus import BusInterface
from tests.harness.setups.guest import SWITCH_SECONDS
from tests.harness.virtual_machines.machine import Machine

MANAGER = BusInterface("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")


def kept_awake(machine: Machine) -> bool:
    """Whether the machine may not sleep because of us."""
    [inhibitors] = machine.bus.call(MANAGER, "ListInhibitors")
    return any(who == "gpuswitch" for _, who, *_ in inhibitors)


def await_may_sleep(machine: Machine) -> None:
    """Wait until nothing of ours keeps the machine awake. Of an inhibitor that was let go, logind hears a bit later."""
    rule = MatchRule(type="signal", sender=MANAGER.name, path=MANAGER.path, member="PropertiesChanged")
    machine.bus.until(rule, lambda: not kept_awake(machine), timeout=SWITCH_SECONDS)
