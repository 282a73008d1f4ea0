"""Puts the parts of gpuswitchd together. The only module that sees both the host and the API."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import fcntl
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

from gpuswitch.api.authority import Authority
from gpuswitch.api.bus import Bus
from gpuswitch.api.encoders import sentence_values
from gpuswitch.api.exposition import Exposition
from gpuswitch.api.manager import ManagerObject
from gpuswitch.api.metrics import MetricsObserver
from gpuswitch.api.observer import BusObserver
from gpuswitch.api.paths import NAME, ROOT
from gpuswitch.api.tls import server_context
from gpuswitch.api.vms import VirtualMachines
from gpuswitch.config.places import ConfigFaultsError, Fault
from gpuswitch.config.reading import read
from gpuswitch.config.settings import DIRECTORY, Config, Setting
from gpuswitch.errors import ConfigError, Failed, GpuswitchError, InvalidArgument, KernelError
from gpuswitch.fleet.fitting import fitted
from gpuswitch.fleet.fleet import Fleet
from gpuswitch.fleet.host_drivers import missing_host_drivers
from gpuswitch.fleet.matching import found
from gpuswitch.fleet.watchdog import Watchdog
from gpuswitch.gpu.actor import Actor
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.gpu.observer import Observer
from gpuswitch.history.history import History
from gpuswitch.host.linux.host import LinuxHost
from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.port import Host
from gpuswitch.log.journald import log_handler
from gpuswitch.log.observer import LogObserver
from gpuswitch.model.gpu import discover
from gpuswitch.runtime.buses import system_bus
from gpuswitch.runtime.hangups import HANGUPS
from gpuswitch.runtime.notify import notify, reloading, watchdog_seconds
from gpuswitch.runtime.threads import run_in_thread
from gpuswitch.switch.engine import StepEvent
from gpuswitch.switch.journal.journal import Journal
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Drift, Switch

_log = logging.getLogger("gpuswitch")
_STANDARD_ERROR = 2
"""The descriptor itself, which is there whatever has become of `sys.stderr`."""


class Observers:
    """Tells each of several observers. An `Observer` (`gpuswitch.gpu.observer`)."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def appeared(self, actor: Actor) -> None:
        for observer in self._observers:
            observer.appeared(actor)

    def vanished(self, actor: Actor) -> None:
        for observer in self._observers:
            observer.vanished(actor)

    def changed(self, record: GpuRecord) -> None:
        for observer in self._observers:
            observer.changed(record)

    def stepped(self, record: GpuRecord, switch: Switch, event: StepEvent) -> None:
        for observer in self._observers:
            observer.stepped(record, switch, event)

    def waits(self, record: GpuRecord) -> None:
        for observer in self._observers:
            observer.waits(record)

    def finished(self, record: GpuRecord, switch: Switch) -> None:
        for observer in self._observers:
            observer.finished(record, switch)

    def returned(self, record: GpuRecord, switch: Switch) -> None:
        for observer in self._observers:
            observer.returned(record, switch)

    def drifted(self, record: GpuRecord, drift: Drift) -> None:
        for observer in self._observers:
            observer.drifted(record, drift)

    def recovered(self, record: GpuRecord) -> None:
        for observer in self._observers:
            observer.recovered(record)


class Daemon:
    """One run of the service, from its start to its end."""

    def __init__(
        self,
        host: Host,
        config: Config,
        config_directory: Path,
        bus: Bus,
        *,
        runtime: Path,
        state: Path,
        simulated: str = "",
    ) -> None:
        self._host = host
        self._config_directory = config_directory
        self._bus = bus
        self._simulated = simulated
        self._metrics = metrics = MetricsObserver()
        bus.authorize_by(Authority(bus, metrics.denied))
        journal = Journal(DirectoryStore(runtime / "gpus"))
        self._history = History(state / "history.db", config.history)
        self._fleet = Fleet(
            host,
            config,
            journal,
            Observers(LogObserver(), BusObserver(bus, metrics.refusals), metrics, self._history),
        )
        metrics.show(self._fleet)
        host.processes.noticed = metrics.noticed
        self._exposition = Exposition(metrics)
        self._ending = asyncio.Event()
        self._ready = False
        self._reloading = asyncio.Lock()
        self._reload_task: asyncio.Task[None] | None = None
        self._restoring: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or the loss of the bus.

        Raises:
            Failed: the bus was lost, or another service has our name.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        vms = VirtualMachines(self._fleet, self._bus, self._metrics.refusals)
        manager = ManagerObject(
            self._fleet,
            vms,
            self._history,
            self.reload,
            directory=str(self._config_directory.absolute()),
            simulated=self._simulated,
        )
        self._bus.export(ROOT, manager, manages=True)
        self._history.start()
        try:
            await self._start()
            await self._serve()
        finally:
            # Also where it could not start: the last word is why.
            await self._history.close()

    async def reload(self) -> None:
        """Read the configuration again; a faulty one changes nothing.

        Raises:
            ConfigError: with every fault.
        """
        async with self._reloading:
            reloading()
            try:
                # A disk may not answer, and where much is wrong, to find where takes a moment.
                config = await run_in_thread(partial(read, self._config_directory))
                await self._exposition.follow(config.metrics)
                self._history.configure(config.history)
                self._fleet.reconfigure(config)
            finally:
                notify("READY=1")

    def _hung_up(self) -> None:
        if self._ready:
            self._reload_on_signal()
        else:
            HANGUPS.note()

    def _reload_on_signal(self) -> None:
        def log(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                _log.error("the configuration stays as it was: %s", error)

        self._reload_task = asyncio.get_running_loop().create_task(self.reload())
        self._reload_task.add_done_callback(log)

    async def _start(self) -> None:
        await self._bus.ask_apart()
        # What a dead daemon left half-way is home before anybody can ask, and before systemd starts what comes after.
        await self._fleet.start()
        await self._bus.own(NAME)
        await self._exposition.start(self._fleet.config.metrics)
        notify("READY=1", f"STATUS={len(self._fleet.actors)} GPUs")
        self._ready = True
        if HANGUPS.taken():  # while it started, with a configuration that it had read by then
            self._reload_on_signal()
        # Not before: systemd may be waiting for us with the very job that we would wait for.
        self._restoring = asyncio.create_task(self._fleet.restore_deferred())

    async def _serve(self) -> None:
        watchdog = asyncio.create_task(self._watchdog())
        lost = asyncio.create_task(self._bus.lost())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait([watchdog, lost, ending], return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        await self._fleet.stop("the service is stopping")
        await self._exposition.stop()
        await self._host.close()
        for task in (watchdog, ending):
            task.cancel()
        if lost.done():
            raise Failed("the connection to the bus was lost")
        if watchdog.done() and not watchdog.cancelled():
            watchdog.result()
        lost.cancel()
        await self._bus.close()

    async def _watchdog(self) -> None:
        """Tell systemd as often as it wants to hear it that we are well."""
        interval = watchdog_seconds()
        watchdog = Watchdog(self._fleet, partial(notify, "WATCHDOG=1"))
        while interval is not None:
            watchdog.look()
            await asyncio.sleep(interval)
        await asyncio.Event().wait()


async def serve(options: argparse.Namespace, configuration: Callable[[], Config]) -> None:
    """Make the parts and run them."""
    directory = Path(options.config) if options.config else DIRECTORY
    config = await run_in_thread(configuration)
    host = _host(options)
    with ExitStack() as until_the_end:
        runtime = Path(options.runtime) if options.runtime else None
        state = Path(options.state) if options.state else None
        if options.simulate and None in (runtime, state):
            own = Path(until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="gpuswitch-")))
            runtime, state = runtime or own / "run", state or own / "state"
        runtime = runtime or Path(os.environ.get("RUNTIME_DIRECTORY", "/run/gpuswitch"))
        state = state or Path(os.environ.get("STATE_DIRECTORY", "/var/lib/gpuswitch"))
        until_the_end.enter_context(_lock(runtime))
        bus = await Bus.connect(options.bus or system_bus())
        await Daemon(host, config, directory, bus, runtime=runtime, state=state, simulated=options.simulate or "").run()


def _host(options: argparse.Namespace) -> Host:
    if not options.simulate:
        return LinuxHost()
    # By need: a service that moves a machine's own GPUs has no machine in memory.
    from gpuswitch.host.simulated.faultspec import inject  # noqa: PLC0415 -- as above
    from gpuswitch.host.simulated.scenarios import SCENARIOS  # noqa: PLC0415 -- as above

    host = SCENARIOS[options.simulate]()
    # Whoever asks for a GPU of it is a process of this machine.
    host.processes.elsewhere = LinuxProcesses(Roots()).wait_for_change
    for fault in options.fault:
        inject(host, fault)
    return host


def _lock(runtime: Path) -> IO[str]:
    """Be the only one in this runtime directory, for as long as the file is open.

    Raises:
        Failed: another gpuswitchd is.
    """
    try:
        runtime.mkdir(parents=True, exist_ok=True)
        lock = (runtime / "lock").open("a+")
    except OSError as error:
        raise Failed(f"cannot use the runtime directory {runtime}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise Failed(f"another gpuswitchd is running (it has {runtime / 'lock'})") from error
    return lock


def check_config(options: argparse.Namespace) -> int:
    """Say what is wrong with a configuration, and what of it has no effect on this host. Changes nothing.

    Returns the exit status of the program: 2 where the service would refuse it.
    """
    path = Path(options.check_config)
    file, copy = options.instead or ("", "")
    instead = {Path(file): Path(copy)} if file else {}
    faults: list[Fault] = []
    warnings: list[str] = []
    settings: tuple[Setting, ...] = ()
    files: tuple[Path, ...] = ()
    if fault := _out_of_reach(path):
        faults.append(Fault(fault))
    else:
        try:
            # By need: the service itself has it read by another process.
            from gpuswitch.config.loading import load  # noqa: PLC0415 -- as above

            config = load(path, instead=instead, as_root=path == DIRECTORY)
            settings, files = config.settings, config.files
            warnings += config.warnings
            warnings += _without_certificate(config)
            warnings += _without_effect(config, _host(options))
        except ConfigFaultsError as error:
            faults += error.faults
        except ConfigError as error:
            faults.append(Fault(str(error)))
    if options.json:
        found = {
            "faults": [{**asdict(fault), "words": sentence_values(fault.what)} for fault in faults],
            "files": [str(file) for file in files],
            "warnings": warnings,
            "settings": list(map(asdict, settings)),
        }
        print(json.dumps(found))  # noqa: T201 -- what was asked for
    else:
        for sentence in (*(f"warning: {each}" for each in warnings), *(fault.text for fault in faults)):
            print(f"gpuswitchd: {sentence}", file=sys.stderr)  # noqa: T201 -- as above
    return 2 if faults else 0


def _out_of_reach(path: Path) -> str:
    """Why it cannot be looked at; "": it can, or is the directory that need not be there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "" if path == DIRECTORY else f"cannot check {path}: there is no such file or directory"
    except OSError as error:
        return f"cannot check {path}: {error.strerror}"
    return ""


def _without_certificate(config: Config) -> Iterator[str]:
    """What a reload would refuse. No fault here: whoever only checks may read less than the service."""
    try:
        server_context(config.metrics)
    except ConfigError as error:
        yield str(error)


def _without_effect(config: Config, host: Host) -> Iterator[str]:
    try:
        facts = host.look()
    except KernelError as error:
        yield f"nobody can tell what the [[gpu]] tables are about: {error}"
        return
    config, _, nowhere = found(config, facts)
    yield from missing_host_drivers(config, facts, host.installed)
    _, misfits = fitted(config, discover(facts, config.members), facts)
    yield from (misfit.sentence for misfit in (*nowhere, *misfits))


def run(options: argparse.Namespace, configuration: Callable[[], Config] | None) -> int:
    """Run the service; returns its exit status: 2 for what no second try makes better.

    `configuration` reads that, and raises as `Reading.result` does; None: it is only to be checked.
    """
    try:
        if configuration is None:
            return check_config(options)
        logging.basicConfig(
            level=logging.DEBUG if options.verbose else logging.INFO, format="%(message)s", handlers=[log_handler()]
        )
        # Where the event loop itself stands still, the watchdog's SIGABRT has it say where (systemd.service(5)).
        faulthandler.enable(_STANDARD_ERROR)
        # It tells of each edge as often as twice, where our own log tells of the state.
        logging.getLogger("transitions").setLevel(logging.WARNING)
        asyncio.run(serve(options, configuration))
    except (ConfigError, InvalidArgument) as error:
        print(f"gpuswitchd: {error}", file=sys.stderr)  # noqa: T201 -- before or after there is a log
        return 2
    except GpuswitchError as error:
        print(f"gpuswitchd: {error}", file=sys.stderr)  # noqa: T201 -- as above
        return 1
    return 0
