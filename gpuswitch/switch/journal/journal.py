"""The journal: what each GPU has to restore, how far its switch has come, and who owns it.

One small page per GPU in the runtime directory, which lives as long as the kernel whose state it describes. Written
before each step touches anything; taken away when the GPU is home and nothing is left to say. A service that starts
anew compares it with what the kernel shows.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from gpuswitch.errors import Failed, GpuswitchError
from gpuswitch.host.port import Pending
from gpuswitch.log.fields import told
from gpuswitch.model.address import PciAddress
from gpuswitch.model.hints import OneOf
from gpuswitch.model.holders import Process
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Options
from gpuswitch.model.states import State
from gpuswitch.model.trial import Trial
from gpuswitch.runtime.pause import Pause
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.journal.boot import BootNotes
from gpuswitch.switch.journal.codec import decode, encoders_of
from gpuswitch.switch.journal.store import Store
from gpuswitch.switch.record import Requester, StepRecord, Switch
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState

_FORMAT = 4
_TEXT = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""What says nothing about the page itself."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A switch that is not over: its `id`, where it goes, and the step of `count` that is under way.

    Every step before `index` is done; with `back`, every one after it was taken back, or never begun, for the sake of
    `failure`, where that is known. `started` and `step_started` are in seconds since the epoch. `worker` is the process
    that does it: what it was sent goes on when the service has died. `waiting_for` is for whom that step waits, a
    sentence a line. `options` and `steps`, those that ended, are for whoever looks it up later.
    """

    id: str
    target: Annotated[State, OneOf(State.HOST, State.VFIO)]
    requester: Requester
    started: float
    index: int = 0
    count: int = 0
    title: str = ""
    back: bool = False
    worker: Process | None = None
    kind: str = ""
    step_started: float = 0.0
    waiting_for: str = ""
    failure: str = ""
    options: Options = field(default_factory=Options)
    steps: tuple[StepRecord, ...] = ()

    def at(self, event: StepEvent, worker: Process | None, switch: Switch | None) -> Unfinished:
        """The same switch, come to this step; `switch` is its record, None where there is none any more."""
        come = replace(
            self,
            index=event.index,
            count=event.count,
            title=event.step.title,
            back=event.status is Status.REVERTING,
            worker=worker,
            kind=event.step.kind,
            waiting_for="",
        )
        if switch is None or switch.id != self.id:
            return come
        return replace(come, step_started=switch.step_started, failure=switch.failure, steps=tuple(switch.steps))

    def interrupted(self) -> tuple[StepRecord, ...]:
        """Its steps until now, with the one that was under way when the service ended."""
        if not self.index:
            return self.steps
        last = StepRecord(self.index, self.title, self.kind, Status.INTERRUPTED, self.step_started or self.started, 0.0)
        return (*self.steps, last)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept for one GPU; False when it is nothing.

    `stuck` has nothing but `what` and `worker`. `failed` says why no known-good state could be reached, `stays_out` why
    the last way home ended elsewhere. `trial` is what was promised of one that is on vfio, or on its way there.
    """

    restore_state: RestoreState = NOTHING_TO_RESTORE
    stuck: Pending | None = None
    unfinished: Unfinished | None = None
    owner: Owner | None = None
    failed: str = ""
    stays_out: str = ""
    trial: Trial | None = None

    def at(self, unfinished: Unfinished) -> Entry:
        """The same, with the switch come to another step."""
        return replace(self, unfinished=unfinished)

    def __bool__(self) -> bool:
        some = (self.unfinished, self.owner, self.stuck, self.trial)
        return some != (None, None, None, None) or bool(self.failed or self.stays_out or self.restore_state)


_FIELDS = tuple(encoders_of(Entry).items())
_VALUES = attrgetter(*(name for name, _ in _FIELDS))
_NEVER = (_FIELDS, [""] * len(_FIELDS))
"""Of a GPU that nothing was written for: no value is one of these."""


class Journal:
    """All pages of one store, and the note of this `boot` beside them."""

    def __init__(self, store: Store) -> None:
        self.boot = BootNotes(store, boot_id)
        self._boot_id = ""
        self._store = store
        self._written: dict[PciAddress, tuple[tuple[object, ...], list[str]]] = {}
        """The fields as they were last written, and their texts: most are the same from step to step."""

    def load(self, gpu: PciAddress) -> Entry:
        """What is kept for `gpu`, empty if nothing. A page that says nothing is set aside, with a warning.

        Raises:
            Failed: it cannot be read now.
        """
        try:
            return _read(json.loads(self._store.read(gpu.identifier)))
        except FileNotFoundError:
            # With what a service that died in its first write left beside it.
            self._tidy(gpu)
            return Entry()
        except OSError as error:
            if error.errno not in _PASSING:
                return self._useless(gpu, error)
            raise Failed(f"cannot read {self._store.where(gpu.identifier)} now ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, GpuswitchError) as error:
            return self._useless(gpu, error)

    def _useless(self, gpu: PciAddress, error: Exception) -> Entry:
        """Nobody can make anything of its page, ever."""
        _log.warning(
            "cannot read %s (%s): set aside, the drivers are told from the hardware instead",
            self._store.where(gpu.identifier),
            error,
            extra=told(GPU=gpu),
        )
        self._set_aside(gpu)
        return Entry()

    def kept(self) -> list[PciAddress]:
        """The GPUs for which something is kept.

        Raises:
            Failed: that cannot be told now.
        """
        try:
            names = self._store.names()
        except OSError as error:
            if error.errno in _PASSING:
                raise Failed(f"cannot list the journal now ({error.strerror})") from error
            _log.warning("cannot list the journal: %s", error)
            return []
        return [gpu for name in names if (gpu := _gpu(name)) is not None]

    def reserve(self, gpu: PciAddress) -> None:
        """Keep room for the way back, should the disk be full by then.

        Raises:
            Failed: there is none, so the GPU must not be touched.
        """
        try:
            self._store.reserve(gpu.identifier)
        except OSError as error:
            where = self._store.where(gpu.identifier)
            raise Failed(f"cannot write the journal {where} ({error.strerror}), so nothing was changed") from error

    def save(self, gpu: PciAddress, entry: Entry) -> None:
        """Keep this, durably; take the page away where it is nothing.

        Raises:
            Failed: that could not be done.
        """
        if not entry:
            self._drop(gpu)
            return
        if entry.stuck is not None:
            entry = replace(entry, stuck=_findable(entry.stuck))
        try:
            self._store.replace(gpu.identifier, self._page(gpu, entry))
        except OSError as error:
            where = self._store.where(gpu.identifier)
            raise Failed(f"cannot write the journal {where} ({error.strerror})") from error

    def _page(self, gpu: PciAddress, entry: Entry) -> bytes:
        """The page as it is written."""
        values = _VALUES(entry)
        before, texts = self._written.get(gpu, _NEVER)
        texts = [
            text if value is old else f'"{name}":{_TEXT.encode(encoder(value))}'
            for (name, encoder), value, old, text in zip(_FIELDS, values, before, texts, strict=True)
        ]
        self._written[gpu] = values, texts
        self._boot_id = self._boot_id or boot_id()
        return f'{{"format":{_FORMAT},"boot":"{self._boot_id}",{",".join(texts)}}}'.encode()

    def _drop(self, gpu: PciAddress) -> None:
        try:
            self._store.remove(gpu.identifier)
        except OSError as error:
            where = self._store.where(gpu.identifier)
            raise Failed(f"cannot remove the journal {where} ({error.strerror})") from error

    def _tidy(self, gpu: PciAddress) -> None:
        """Take away what is left of a page that is not there."""
        try:
            self._drop(gpu)
        except Failed as error:
            _log.warning("%s", error, extra=told(GPU=gpu))

    def _set_aside(self, gpu: PciAddress) -> None:
        try:
            self._store.set_aside(gpu.identifier)
        except OSError as error:
            where = self._store.where(gpu.identifier)
            _log.warning("cannot set %s aside: %s", where, error, extra=told(GPU=gpu))


class Page:
    """What the journal keeps for one GPU: `entry`, in memory as on the disk, unless that cannot be written.

    What could not be written is tried again, for a disk that has room again makes no event. `kept` is called with each
    entry that is kept from then on.
    """

    def __init__(self, journal: Journal, gpu: PciAddress, kept: Callable[[Entry], None]) -> None:
        self._journal = journal
        self._gpu = gpu
        self._kept = kept
        self.entry = journal.load(gpu)
        self._behind = False
        """Whether the disk still says something older."""
        self._closed = False
        self._pause = Pause()
        self._again: asyncio.Handle | None = None

    def write(self, entry: Entry) -> None:
        """From now on it is this, durably.

        Raises:
            Failed: it could not be written; it is what it was then.
        """
        if self._behind or entry != self.entry:
            self._journal.save(self._gpu, entry)
            self.entry, self._behind = entry, False
            self._pause.over()
        self._kept(entry)

    def write_if_possible(self, entry: Entry) -> None:
        """From now on it is this: where it cannot be written, a service that starts anew gives back too much."""
        try:
            self.write(entry)
        except Failed as error:
            _log.error("%s", error, extra=told(GPU=self._gpu))
            self.entry, self._behind = entry, True
            if self._again is None and not self._closed:
                self._again = asyncio.get_running_loop().call_later(self._pause.seconds(), self._catch_up)
            self._kept(entry)

    def close(self) -> None:
        """Write what could not be written when it was time, if that is possible now; no more is tried after that."""
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self._catch_up()

    def _catch_up(self) -> None:
        self._again = None
        if self._behind:
            self.write_if_possible(self.entry)

    def begin(self, switch: Switch, restore_state: RestoreState, trial: Trial | None) -> None:
        """This switch is under way from here on, and this is to be restored after it, and is promised: the next service
        finds all of it here.

        Raises:
            Failed: that could not be written; nothing was changed.
        """
        unfinished = Unfinished(
            switch.id,
            switch.target,
            switch.requester,
            switch.started,
            count=switch.count,
            failure=switch.failure,
            options=switch.options,
            steps=tuple(switch.steps),
        )
        self._journal.reserve(self._gpu)
        try:
            entry = replace(self.entry, restore_state=restore_state, unfinished=unfinished, trial=trial)
            self.write(replace(entry, stuck=None, failed=""))
        except Failed as error:
            raise Failed(f"{error}, so nothing was changed") from error

    def begin_step(self, event: StepEvent, worker: Process | None, switch: Switch | None, *, durably: bool) -> None:
        """This step is begun next, or taken back, by this worker; unless `durably`, as `write_if_possible`. `switch` is
        the GPU's last one.

        Raises:
            Failed: that could not be written.
        """
        if (unfinished := self.entry.unfinished) is None:
            return
        unfinished = unfinished.at(event, worker, switch)
        (self.write if durably else self.write_if_possible)(self.entry.at(unfinished))

    def waits(self, what: str) -> None:
        """The step that is under way waits for these, a sentence a line."""
        unfinished = self.entry.unfinished
        if unfinished is not None and unfinished.waiting_for != what:
            self.write_if_possible(self.entry.at(replace(unfinished, waiting_for=what)))


def _gpu(name: str) -> PciAddress | None:
    try:
        return PciAddress.parse(f"pci_{name}")
    except GpuswitchError:
        return None


def _findable(stuck: Pending) -> Pending | None:
    """What it takes to find it again; None where no process sits in it."""
    return Pending(stuck.what, worker=stuck.worker) if stuck.worker else None


def _read(page: dict[str, Any]) -> Entry:
    """All of it is done to the host one day: nothing but what `Journal.save` wrote may pass."""
    content = dict(page)
    version = content.pop("format")
    if content.pop("boot") != boot_id():
        raise ValueError("it describes the kernel of an earlier boot")
    if version == 3:
        content = _from_3(content)
    elif version != _FORMAT:
        raise ValueError(f"format {version!r}, not {_FORMAT}")
    return decode(Entry, content)


def _from_3(page: Mapping[str, Any]) -> dict[str, Any]:
    """A page as gpuswitch wrote it until it had the codec: a service that is upgraded has its predecessor's pages."""
    owed, unfinished, stuck = page["owed"], page["unfinished"], page["stuck"]
    functions = {
        address: {
            "driver": {"name": kept["driver"], "module": kept["module"]} if kept["driver"] else None,
            "override": kept["override"],
            "power_control": kept["power_control"],
        }
        for address, kept in owed["functions"].items()
    }
    return {
        "restore_state": {
            "functions": functions,
            "units": [_named(unit, "name", "user") for unit in owed["units"]],
            "modules": owed["modules"],
            "terminals": owed["terminals"],
            "vtconsoles": owed["vtconsoles"],
            "shown_by_others": owed.get("beside", []),
            "boot_framebuffers": owed["boot_framebuffers"],
            "persistent": owed["persistent"],
            "announced": owed["announced"],
        },
        "stuck": stuck and {"what": stuck[0], "worker": _named(stuck[1:], "pid", "started")},
        "unfinished": unfinished
        and {
            **{key: value for key, value in unfinished.items() if key != "asker"},
            "requester": unfinished["asker"],
            "worker": _named(unfinished["worker"], "pid", "started"),
        },
        "owner": _named(page["owner"], "name", "uuid"),
        "failed": page["failed"],
        "stays_out": page.get("stays_out", ""),
    }


def _named(values: list[Any] | None, *names: str) -> dict[str, Any] | None:
    return None if values is None else dict(zip(names, values, strict=True))


def boot_id() -> str:
    """Names this run of the kernel (random(4)); a journal that names another describes nothing that is there."""
    return _BOOT_ID.read_text().strip()
