"""A manager of units in memory: what it has in common with systemd is what the cases ask of both."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.systemd_contract.units import ALIASES, RUNNING, SAMPLES, Sample

Removed = Callable[["Job", str], None]
"""Told of each job that is over, and how it ended."""


class RefusedError(Exception):
    """A D-Bus error of org.freedesktop.systemd1, by the last part of its name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


@dataclass
class Job:
    number: int
    kind: str
    unit: MemoryUnit

    @property
    def path(self) -> str:
        return f"/org/freedesktop/systemd1/job/{self.number}"


@dataclass
class MemoryUnit:
    name: str
    sample: Sample
    load: str = "loaded"
    state: str = "inactive"
    result: str = "success"
    status: int = 0
    status_text: str = ""
    job: Job | None = None
    main_pid: int = 0
    condition: bool = True

    @property
    def path(self) -> str:
        return "/org/freedesktop/systemd1/unit/" + self.name.replace(".", "_2e").replace("-", "_2d")


@dataclass
class Manager:
    units: dict[str, MemoryUnit] = field(default_factory=dict)
    jobs: dict[int, Job] = field(default_factory=dict)
    removed: list[Removed] = field(default_factory=list)
    mended: bool = False
    stop_under_way: asyncio.Event = field(default_factory=asyncio.Event)
    start_under_way: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(100))

    def __post_init__(self) -> None:
        for name, sample in SAMPLES.items():
            self.units[name] = MemoryUnit(name, sample, load="loaded" if sample.text else "masked")
        for name in RUNNING:
            self._runs(self.units[name])

    def _runs(self, unit: MemoryUnit) -> None:
        unit.state, unit.main_pid = "active", next(self.numbers)

    def find(self, name: str) -> MemoryUnit:
        """Any unit; one that does not exist is "not-found". RefusedError: it cannot be the name of one."""
        if "/" in name or "*" in name or "." not in name:
            raise RefusedError("InvalidArgs", f"Unit name {name} is not valid.")
        name = ALIASES.get(name, name)
        return self.units.get(name) or MemoryUnit(name, Sample("-"), load="not-found")

    def reset_failed(self, name: str) -> None:
        unit = self.find(name)
        if unit.load == "not-found":
            raise RefusedError("NoSuchUnit", f"Unit {name} not loaded.")
        if unit.state == "failed":
            unit.state, unit.result = "inactive", "success"

    def queue(self, name: str, kind: str) -> Job:
        unit = self.find(name)
        if unit.load == "not-found":
            raise RefusedError("NoSuchUnit", f"Unit {name} not {'loaded' if kind == 'stop' else 'found'}.")
        if unit.load == "masked" and kind != "stop":
            raise RefusedError("UnitMasked", f"Unit {name} is masked.")
        if unit.sample.refuses and kind != "start":
            words = f"unit {name} may be requested by dependency only (it is configured to refuse manual start/stop)"
            raise RefusedError("OnlyByDependency", f"Operation refused, {words}.")
        if kind == "try-restart":
            kind = "restart" if unit.state == "active" else "nop"
        if unit.job is None or unit.job.kind != kind:
            if unit.job is not None:
                self.end(unit.job, "canceled")
            unit.job = Job(next(self.numbers), kind, unit)
            self.jobs[unit.job.number] = unit.job
        return unit.job

    def work(self, job: Job) -> None:
        """Do what the job is for, unless that takes its time."""
        unit = job.unit
        if job.kind == "nop":
            self.end(job, "done")
        elif job.kind != "start" and unit.sample.hangs:
            unit.state = "deactivating"
            self.stop_under_way.set()
        elif job.kind == "stop":
            unit.state = "inactive"
            self.end(job, "done")
        elif unit.sample.hangs:
            unit.state = "activating"
            self.start_under_way.set()
        elif unit.sample.fails or (unit.sample.tires and not self.mended) or unit.result == "start-limit-hit":
            unit.state, unit.result, unit.status = "failed", "exit-code", 3
            if unit.sample.tires:
                unit.result = "start-limit-hit"
            self.end(job, "failed")
        elif not (unit.sample.after and self.units[unit.sample.after].job):
            self._runs(unit)
            self.end(job, "done")

    def end(self, job: Job, result: str) -> None:
        if self.jobs.pop(job.number, None) is not None:
            job.unit.job = None
            for tell in list(self.removed):
                tell(job, result)


@dataclass(frozen=True)
class MemoryAdministrator:
    """`tests.systemd_contract.cases.Administrator`"""

    manager: Manager

    async def mend(self) -> None:
        self.manager.mended = True

    async def stop_under_way(self) -> None:
        await self.manager.stop_under_way.wait()

    async def job(self, name: str) -> str:
        job = self.manager.find(name).job
        return job.kind if job else ""

    async def main_pid(self, name: str) -> int:
        return self.manager.find(name).main_pid

    async def begin(self, names: Sequence[str]) -> None:
        for name in names:
            self.manager.work(self.manager.queue(name, "start"))
