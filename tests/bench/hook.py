"""What the libvirt hook takes: where it has nothing to do, beside the hook that people have; and on top of a switch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jeepney import new_method_call
from jeepney.io.blocking import DBusConnection

from tests.bench import here
from tests.bench.builds import DEVELOPED, Build
from tests.bench.here import Service
from tests.bench.rounds import Experiment, Quantity, figures, ratios
from tests.bench.table import Compared, Row, microseconds
from tests.harness.domains import HOSTDEV, domain, table

_ENVIRON = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
"""As libvirt sets it."""

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


@dataclass(frozen=True)
class Hooks:
    """A build's hook with its service, and the usual one."""

    ours: Path
    usual: Path
    service: Service


def measure() -> Iterator[Row]:
    with _hooks(DEVELOPED) as hooks:
        yield from figures(EXPERIMENTS, hooks)
    with _hooks(DEVELOPED, on_release="stay") as hooks:
        here.switch(hooks.service.connection, "ToVfio")
        yield from figures(STAYING, hooks)


def compare(this: Build, base: Build) -> Iterator[Compared]:
    """The usual hook, which is no build's, shows how alike the circumstances were."""
    with _hooks(this) as ours, _hooks(base) as theirs:
        yield from ratios(EXPERIMENTS, ours, theirs)


def gate(build: Build) -> Path:
    """What libvirt runs."""
    return build.tree / "contrib/libvirt/qemu.d/50-gpuswitch"


@contextmanager
def _hooks(build: Build, **rules: object) -> Iterator[Hooks]:
    """With a GPU whose table says this, too."""
    with here.serving(build, table("0000:01:00.0", **rules)) as service:
        text = gate(build).read_text().replace("@hook@", str(build.tree / "gpuswitch/hook.py"))
        folder = service.place.folder
        yield Hooks(_program(folder / "50-gpuswitch", text), _program(folder / "qemu", USUAL), service)


def _program(path: Path, text: str) -> Path:
    path.write_text(text)
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


def _idle(hooks: Hooks) -> Iterable[float]:
    """In turn, so that what else the machine does is the same for all."""
    yield _run_alone(hooks.usual, "prepare begin")
    yield _run_alone(hooks.ours, "start begin")
    yield _run_alone(hooks.ours, "prepare begin")


def _on_vfio(hooks: Hooks) -> Iterable[float]:
    """All that libvirt waits for in a machine's start and end, where the GPU is on vfio and stays there."""
    operations = ("prepare begin", "start begin", "started begin", "stopped end", "release end")
    yield sum(_run(hooks.ours, operation, WITH, hooks.service.place.bus) for operation in operations)


def _switching(hooks: Hooks) -> Iterable[float]:
    connection, bus = hooks.service.connection, hooks.service.place.bus
    seconds = _run(hooks.ours, "prepare begin", WITH, bus)
    switch = {key: value for key, (_, value) in _read(connection, "Switch").items()}
    yield seconds - (switch["finished"] - switch["started"])
    yield _run(hooks.ours, "release end", WITH, bus)
    while _read(connection, "State") != "host":
        pass


EXPERIMENTS = (
    Experiment(
        (
            Quantity("the usual bash hook, for another domain", microseconds),
            Quantity("ours, for an operation that it needs nothing of", microseconds, "≤ the usual"),
            Quantity(
                f"ours, for a domain without devices of the host ({len(WITHOUT) / 1e3:.1f} KB)",
                microseconds,
                "≤ the usual",
            ),
        ),
        _idle,
        times=500,
        pairs=500,
    ),
    Experiment(
        (
            Quantity("prepare of 4 functions, on top of the switch", target="≤ 30 ms"),
            Quantity("release, which does not wait for the switch"),
        ),
        _switching,
        times=20,
        pairs=20,
    ),
)


STAYING = (
    Experiment(
        (Quantity("all hooks of a machine's start and end, the GPU on vfio already", target="≤ 100 ms"),),
        _on_vfio,
        times=10,
        pairs=10,
    ),
)


def _read(connection: DBusConnection, name: str) -> Any:
    """A property of the GPU."""
    message = new_method_call(here.PROPERTIES, "Get", "ss", (here.GPU.interface, name))
    [[_, value]] = connection.send_and_get_reply(message, timeout=10).body
    return value
