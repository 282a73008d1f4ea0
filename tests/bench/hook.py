"""What the libvirt hook takes: where it has nothing to do, beside the hook that people have; and on top of a switch."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from jeepney import new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from tests.bench import here
from tests.bench.table import Row, median
from tests.unit.hook_parts import HOSTDEV, domain, table, write

ROOT = Path(__file__).parents[2]
_ENVIRON = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
"""As libvirt sets it."""
ROUNDS = 500
SWITCHES = 20

USUAL = """#!/bin/bash
OBJECT="$1"
OPERATION="$2"
if [[ $OBJECT == "win10" ]]; then
    case "$OPERATION" in
    "prepare")
        systemctl start libvirt-nosleep@"$OBJECT" 2>&1 | tee -a /var/log/libvirt/custom_hooks.log
        /bin/vfio-startup.sh 2>&1 | tee -a /var/log/libvirt/custom_hooks.log
        ;;
    "release")
        systemctl stop libvirt-nosleep@"$OBJECT" 2>&1 | tee -a /var/log/libvirt/custom_hooks.log
        /bin/vfio-teardown.sh 2>&1 | tee -a /var/log/libvirt/custom_hooks.log
        ;;
    esac
fi
"""
"""The hook of the widely copied scripts."""

CONTROLLER = """
    <controller type='pci' index='{0}' model='pcie-root-port'>
      <model name='pcie-root-port'/>
      <target chassis='{0}' port='0x{0:x}'/>
      <alias name='pci.{0}'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0' multifunction='on'/>
    </controller>"""
WITHOUT = domain("".join(map(CONTROLLER.format, range(20))))
"""As long as a domain of virt-manager."""
WITH = domain("".join(HOSTDEV.format(f"domain='0x0000' bus='0x01' slot='0x00' function='0x{n}'") for n in range(4)))


def measure() -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuswitch-bench-")))
        bus = stack.enter_context(here.private_bus(folder))
        ours = _program(folder / "50-gpuswitch", (ROOT / "contrib/libvirt/qemu.d/50-gpuswitch").read_text())
        rows = list(_idle(ours, _program(folder / "qemu", USUAL)))
        write(folder / "etc", config=table("0000:01:00.0"))
        stack.enter_context(here.daemon(bus, folder, "--simulate=laptop"))
        connection = stack.enter_context(open_dbus_connection(bus))
        rows += _switching(ours, bus, connection)
    return rows


def _program(path: Path, text: str) -> Path:
    path.write_text(text.replace("@hook@", str(ROOT / "gpuswitch/hook.py")))
    path.chmod(0o755)
    return path


def _run(program: Path, operation: str, xml: str, bus: str) -> float:
    """Seconds that libvirt waits."""
    environ = {**_ENVIRON, "DBUS_SYSTEM_BUS_ADDRESS": bus}
    command = [str(program), "other", *operation.split(), "-"]
    begun = time.perf_counter()
    ended = subprocess.run(command, input=xml, env=environ, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if ended.returncode or ended.stderr:
        sys.exit(f"cannot measure the hook: {operation} ended with {ended.returncode}: {ended.stderr}")
    return seconds


def _run_alone(program: Path, operation: str) -> float:
    """The same for a domain without devices of the host, and nothing but that: one pipe, no reader."""
    inner, outer = os.pipe()
    begun = time.perf_counter()
    pid = os.posix_spawn(
        program,
        [str(program), "other", *operation.split(), "-"],
        _ENVIRON,
        file_actions=[(os.POSIX_SPAWN_DUP2, inner, 0)],
        setsigdef=[signal.SIGPIPE],
    )
    os.close(inner)
    with suppress(BrokenPipeError):  # who does not read it
        os.write(outer, WITHOUT.encode())
    os.close(outer)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        sys.exit(f"cannot measure the hook: {operation} ended with {os.waitstatus_to_exitcode(status)}")
    return seconds


def _idle(ours: Path, usual: Path) -> Iterator[Row]:
    """In turn, so that what else the machine does is the same for all."""
    cases = {
        "the usual bash hook, for another domain": (usual, "prepare begin"),
        "ours, for an operation that it needs nothing of": (ours, "start begin"),
        f"ours, for a domain without devices of the host ({len(WITHOUT) / 1e3:.1f} KB)": (ours, "prepare begin"),
    }
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case, (program, operation) in cases.items():
            seconds[case].append(_run_alone(program, operation))
    for case, (program, _) in cases.items():
        microseconds = f"{statistics.median(seconds[case]) * 1e6:.0f} µs"
        yield Row(f"{case} (median of {ROUNDS})", microseconds, "≤ the usual" if program is ours else "")


def _switching(ours: Path, bus: str, connection: DBusConnection) -> Iterator[Row]:
    on_top, back = [], []
    for _ in range(SWITCHES):
        seconds = _run(ours, "prepare begin", WITH, bus)
        switch = {key: value for key, (_, value) in _read(connection, "Switch").items()}
        on_top.append(seconds - (switch["finished"] - switch["started"]) / 1e6)
        back.append(_run(ours, "release end", WITH, bus))
        while _read(connection, "State") != "host":
            pass
    yield Row(f"prepare of 4 functions, on top of the switch (median of {SWITCHES})", median(on_top), "< 60 ms")
    yield Row(f"release, which does not wait for the switch (median of {SWITCHES})", median(back))


def _read(connection: DBusConnection, name: str) -> Any:
    """A property of the GPU."""
    message = new_method_call(here.PROPERTIES, "Get", "ss", (here.GPU.interface, name))
    [[_, value]] = connection.send_and_get_reply(message, timeout=10).body
    return value
