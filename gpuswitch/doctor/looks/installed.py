"""Which files of ours are where the bus and polkit look for them."""

from __future__ import annotations

from gpuswitch.doctor.machine import Files
from gpuswitch.doctor.remedies import MAINTAIN
from gpuswitch.doctor.seen import Installation


def look(files: Files) -> Installation:
    return Installation(
        packaged=files.there(MAINTAIN),
        bus_policy=any(
            files.there(f"{folder}/org.gpuswitch1.conf")
            for folder in ("/etc/dbus-1/system.d", "/usr/share/dbus-1/system.d")
        ),
        actions=files.there("/usr/share/polkit-1/actions/org.gpuswitch1.policy"),
    )
