"""Where the demonstration plays: a message bus of its own, and on it the real service with a machine in memory.

All of it is child processes and one temporary directory, and gone when the context manager is left, however it is.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import IO, Any, cast

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.interrupts import end_by
from gpuswitch.cli.output import line
from gpuswitch.cli.programs import installed
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed

START_SECONDS = 30.0
"""How long the service may take until it is ready."""


@dataclass(frozen=True)
class DemoService:
    """A private bus at `address`; `folder` is for the files of all who are on it."""

    folder: Path
    address: str

    @property
    def environment(self) -> dict[str, str]:
        """Ours, without what would set up the service, and with the way to the bus."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("GPUSWITCH_", "WATCHDOG_"))}
        return {**environ, "GPUSWITCH_BUS": self.address, "GPUSWITCH_METRICS__ENABLED": "false"}

    @contextmanager
    def machine(self, scenario: str, *faults: str, config: str = "") -> Iterator[None]:
        """The service with such a machine, from the moment it is ready.

        Raises:
            CtlError: it did not start, or ended badly.
        """
        file = self.folder / "config.toml"
        file.write_text(config)
        file.chmod(0o644)
        options = ["--simulate", scenario, "--bus", self.address, "--config", self.folder]
        options += ["--runtime", self.folder, "--state", self.folder]
        with (self.folder / "log").open("w") as log, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            ready = self.folder / "ready"
            ready.unlink(missing_ok=True)
            notify.bind(str(ready))
            environ = {**self.environment, "NOTIFY_SOCKET": str(ready)}
            command = [installed("gpuswitchd"), *options, *(f"--fault={fault}" for fault in faults)]
            with _child(command, env=environ, stderr=log) as daemon:
                self._wait_until_ready(daemon, notify)
                yield
                daemon.terminate()
                if (status := daemon.wait(START_SECONDS)) != 0:
                    raise self._broken(_("it ended with status {status}", status=status))

    def ctl(self, *arguments: str, expect: int = 0) -> None:
        """Show a command and what it says.

        Raises:
            CtlError: it ended with another exit status than `expect`.
        """
        _show_command(f"gpuswitchctl {shlex.join(arguments)}")
        command = [installed("gpuswitchctl"), *arguments]
        ended = subprocess.run(command, env=self.environment, stderr=subprocess.PIPE, text=True, check=False)
        for text in ended.stderr.splitlines():
            line(text)
        _check(arguments, ended.returncode, expect)

    def ctl_at_once(self, *commands: tuple[str, ...]) -> None:
        """Show commands that run at the same time, each line with the last argument of the command that says it.

        Raises:
            CtlError: one of them failed.
        """
        _show_command(" & ".join(f"gpuswitchctl {shlex.join(arguments)}" for arguments in commands))
        with ExitStack() as stack:
            running = []
            for arguments in commands:
                child = stack.enter_context(
                    _child(
                        [installed("gpuswitchctl"), *arguments],
                        env=self.environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
                teller = Thread(target=_tell, args=(child.stdout, arguments[-1]))
                teller.start()
                stack.callback(teller.join)
                stack.callback(child.kill)
                running.append((arguments, child))
            for arguments, child in running:
                _check(arguments, child.wait(), 0)

    def look(self, gpu: str) -> str:
        """What `status --json` says of a GPU, without showing it."""
        command = [installed("gpuswitchctl"), "status", gpu, "--json"]
        return subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True, check=False).stdout

    def _wait_until_ready(self, daemon: subprocess.Popen[Any], notify: socket.socket) -> None:
        ended = os.pidfd_open(daemon.pid)
        try:
            while True:
                readable, _writable, _others = select.select([notify.fileno(), ended], [], [], START_SECONDS)
                if notify.fileno() not in readable:
                    raise self._broken(_("it did not start"))
                if notify.recv(4096).startswith(b"READY=1"):
                    return
        finally:
            os.close(ended)

    def _broken(self, what: str) -> CtlError:
        log = (self.folder / "log").read_text().splitlines()
        why = log[-1] if log else _("it said nothing")
        return CtlError.of(Failed, _("{program}: {what}: {why}", program="gpuswitchd", what=what, why=why))


@contextmanager
def demo_service() -> Iterator[DemoService]:
    """A bus that nobody else knows of.

    Raises:
        CtlError: there is no dbus-daemon.
    """
    program = shutil.which("dbus-daemon")
    if program is None:
        raise CtlError.of(
            Failed, _("dbus-daemon is missing; install it: {command}", command="apt-get install dbus-daemon")
        )
    with _SIGNALS.installed(), TemporaryDirectory(prefix="gpuswitch-demo-") as folder:
        options = ["--session", "--nofork", "--nopidfile", "--print-address", f"--address=unix:path={folder}/bus"]
        with _child([program, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as bus:
            address = cast("IO[str]", bus.stdout).readline().strip()
            if not address.startswith("unix:"):
                raise CtlError.of(Failed, _("{program} did not start: {why}", program=program, why=address))
            yield DemoService(Path(folder), address)


class _Signals:
    """Lets SIGTERM and SIGHUP unwind the stack as ^C does, so that everything is put away; but not in mid-`hold`."""

    def __init__(self) -> None:
        self._holding = False
        self._arrived = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What arrives now has its effect at the end: a child that is being started is known to us by then."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._arrived:
            self._end(self._arrived)

    def _receive(self, number: int, _: object) -> None:
        self._arrived = number
        if not self._holding:
            self._end(number)

    def _end(self, number: int) -> None:
        self._arrived = 0
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        end_by(number)


_SIGNALS = _Signals()
"""A process has one set of handlers."""


@contextmanager
def _child(command: list[Any], **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that ends with the context at the latest, and not by ^C on our terminal before."""
    with ExitStack() as stack:
        with _SIGNALS.held():
            child = stack.enter_context(subprocess.Popen(command, process_group=0, **how))
            stack.callback(child.kill)
        yield child


def _show_command(text: str) -> None:
    line("")
    line(f"$ {text}")


def _tell(lines: IO[str], who: str) -> None:
    for text in lines:
        line(f"{who} | {text.rstrip()}")


def _check(arguments: tuple[str, ...], status: int, expected: int) -> None:
    if status != expected:
        text = _(
            "{command} ended with status {status}, not {expected}; this is not how it goes",
            command=f"'gpuswitchctl {shlex.join(arguments)}'",
            status=status,
            expected=expected,
        )
        raise CtlError.of(Failed, text)
