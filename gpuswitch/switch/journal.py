"""The journal: what is owed to each GPU, how far its switch has come, and who owns it.

One small page per GPU in the runtime directory, which lives as long as the kernel whose state it describes. Written
before each step touches anything; taken away when the GPU is home and nothing is left to say. A service that starts
anew compares it with what the kernel shows.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpuswitch.errors import Failed, GpuswitchError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, Driver
from gpuswitch.model.holders import Process, Unit
from gpuswitch.model.owner import Owner
from gpuswitch.model.states import State
from gpuswitch.switch.host import Pending
from gpuswitch.switch.owed import NOTHING, Owed
from gpuswitch.switch.pause import Pause
from gpuswitch.switch.record import Asker
from gpuswitch.switch.store import Store

_FORMAT = 3
_TEXT = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_TARGETS = {str(state): state for state in (State.HOST, State.VFIO)}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
"""What says nothing about the page itself."""
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A switch that is not over: its `id`, where it goes, and the step of `count` that is under way.

    Every step before `index` is done; with `back`, every one after it was taken back, or never begun. `started` is in
    seconds since the epoch. `worker` is the process that does it: what it was sent goes on when the service has died.
    """

    id: str
    target: State
    asker: Asker
    started: float
    index: int = 0
    count: int = 0
    title: str = ""
    back: bool = False
    worker: Process | None = None

    def at(self, index: int, count: int, title: str, *, back: bool, worker: Process | None) -> Unfinished:
        """The same switch, come to this step."""
        return Unfinished(self.id, self.target, self.asker, self.started, index, count, title, back, worker)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept for one GPU; False when it is nothing.

    `stuck` has nothing but `what` and `worker`. `failed` says why no known-good state could be reached, `stays_out` why
    the last way home ended elsewhere.
    """

    owed: Owed = NOTHING
    stuck: Pending | None = None
    unfinished: Unfinished | None = None
    owner: Owner | None = None
    failed: str = ""
    stays_out: str = ""

    def at(self, unfinished: Unfinished) -> Entry:
        """The same, with the switch come to another step."""
        return Entry(self.owed, self.stuck, unfinished, self.owner, self.failed, self.stays_out)

    def __bool__(self) -> bool:
        some = (self.unfinished, self.owner, self.stuck)
        return some != (None, None, None) or bool(self.failed or self.stays_out or self.owed)


class Journal:
    """All pages of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owed: dict[PciAddress, tuple[Owed, str]] = {}
        """What was last written as owed, and its text: one and the same at most steps of a switch."""

    def load(self, gpu: PciAddress) -> Entry:
        """What is kept for `gpu`, empty if nothing. A page that says nothing is set aside, with a warning.

        Raises:
            Failed: it cannot be read now.
        """
        try:
            return _decode(json.loads(self._store.read(gpu.identifier)))
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
        owed, text = self._owed.get(gpu, (None, ""))
        if owed is not entry.owed:
            text = _TEXT.encode(_encode_owed(entry.owed))
            self._owed[gpu] = entry.owed, text
        try:
            self._store.replace(gpu.identifier, _page(entry, text))
        except OSError as error:
            where = self._store.where(gpu.identifier)
            raise Failed(f"cannot write the journal {where} ({error.strerror})") from error

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
            _log.warning("%s", error)

    def _set_aside(self, gpu: PciAddress) -> None:
        try:
            self._store.set_aside(gpu.identifier)
        except OSError as error:
            _log.warning("cannot set %s aside: %s", self._store.where(gpu.identifier), error)


class Page:
    """What the journal keeps for one GPU: `entry`, in memory as on the disk, unless that cannot be written.

    What could not be written is tried again, for a disk that has room again makes no event.
    """

    def __init__(self, journal: Journal, gpu: PciAddress) -> None:
        self._journal = journal
        self._gpu = gpu
        self.entry = journal.load(gpu)
        self._behind = False
        """Whether the disk still says something older."""
        self._closed = False
        self._pause = Pause()
        self._again: asyncio.Handle | None = None

    def reserve(self) -> None:
        """As `Journal.reserve`."""
        self._journal.reserve(self._gpu)

    def write(self, entry: Entry) -> None:
        """From now on it is this, durably.

        Raises:
            Failed: it could not be written; it is what it was then.
        """
        if self._behind or entry != self.entry:
            self._journal.save(self._gpu, entry)
            self.entry, self._behind = entry, False
            self._pause.over()

    def write_if_possible(self, entry: Entry) -> None:
        """From now on it is this: should that not be written, a service that starts anew does more than it need."""
        try:
            self.write(entry)
        except Failed as error:
            _log.error("%s", error)
            self.entry, self._behind = entry, True
            if self._again is None and not self._closed:
                self._again = asyncio.get_running_loop().call_later(self._pause.seconds(), self._catch_up)

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


def _gpu(name: str) -> PciAddress | None:
    try:
        return PciAddress.parse(f"pci_{name}")
    except GpuswitchError:
        return None


def _page(entry: Entry, owed: str) -> bytes:
    """The page as it is written; `owed` is the text of `_encode_owed`."""
    rest = _TEXT.encode(_encode_rest(entry)).removeprefix("{")
    return f'{{"format":{_FORMAT},"boot":{_TEXT.encode(boot_id())},"owed":{owed},{rest}'.encode()


def _encode_rest(entry: Entry) -> dict[str, Any]:
    """All but what is owed."""
    stuck, unfinished, owner = entry.stuck, entry.unfinished, entry.owner
    return {
        "stuck": stuck and stuck.worker and [stuck.what, stuck.worker.pid, stuck.worker.started],
        "unfinished": unfinished
        and {
            "id": unfinished.id,
            "target": str(unfinished.target),
            "asker": _encode_asker(unfinished.asker),
            "started": unfinished.started,
            "index": unfinished.index,
            "count": unfinished.count,
            "title": unfinished.title,
            "back": unfinished.back,
            "worker": unfinished.worker and [unfinished.worker.pid, unfinished.worker.started],
        },
        "owner": owner and [owner.name, owner.uuid],
        "failed": entry.failed,
        "stays_out": entry.stays_out,
    }


def _encode_asker(asker: Asker) -> dict[str, Any]:
    return {
        "uid": asker.uid,
        "pid": asker.pid,
        "unit": asker.unit,
        "command": asker.command,
        "vm": asker.vm,
        "service": asker.service,
    }


def _encode_owed(owed: Owed) -> dict[str, Any]:
    return {
        "functions": {
            str(address): {
                "driver": captured.driver and captured.driver.name,
                "module": captured.driver and captured.driver.module,
                "override": captured.override,
                "power_control": captured.power_control,
            }
            for address, captured in owed.functions.items()
        },
        "units": [[unit.name, unit.user] for unit in owed.units],
        "modules": list(owed.modules),
        "terminals": list(owed.terminals),
        "vtconsoles": list(owed.vtconsoles),
        "beside": [[terminal, str(address)] for terminal, address in owed.beside],
        "boot_framebuffers": [list(pair) for pair in owed.boot_framebuffers],
        "persistent": [str(address) for address in owed.persistent],
        "announced": [[subsystem, [str(address) for address in cards]] for subsystem, cards in owed.announced],
    }


def _decode(content: dict[str, Any]) -> Entry:
    """All of it is done to the host one day: nothing but what `_page` wrote may pass."""
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}, not {_FORMAT}")
    if content["boot"] != boot_id():
        raise ValueError("it describes the kernel of an earlier boot")
    return Entry(
        _decode_owed(_is(dict, content["owed"])),
        _stuck(content["stuck"]),
        _unfinished(content["unfinished"]),
        _owner(content["owner"]),
        _is(str, content["failed"]),
        # Pages of earlier versions have none.
        _is(str, content.get("stays_out", "")),
    )


def _decode_owed(content: Mapping[str, Any]) -> Owed:
    return Owed(
        functions={PciAddress.parse(address): _captured(kept) for address, kept in content["functions"].items()},
        units=tuple(_unit(*_is(list, pair)) for pair in _is(list, content["units"])),
        modules=tuple(_is(str, module) for module in _is(list, content["modules"])),
        terminals=tuple(_is(int, terminal) for terminal in _is(list, content["terminals"])),
        vtconsoles=tuple(_is(str, name) for name in _is(list, content["vtconsoles"])),
        beside=tuple(_beside(*_is(list, pair)) for pair in _is(list, content.get("beside", []))),
        boot_framebuffers=tuple(_pair(*_is(list, pair)) for pair in _is(list, content["boot_framebuffers"])),
        persistent=_addresses(content["persistent"]),
        announced=tuple(_announced(*_is(list, pair)) for pair in _is(list, content["announced"])),
    )


def _stuck(content: object) -> Pending | None:
    if content is None:
        return None
    what, pid, started = _is(list, content)
    return Pending(_is(str, what), worker=Process(_is(int, pid), _is(int, started)))


def _unfinished(content: object) -> Unfinished | None:
    if content is None:
        return None
    kept = _is(dict, content)
    return Unfinished(
        _is(str, kept["id"]),
        _TARGETS[kept["target"]],
        _asker(_is(dict, kept["asker"])),
        float(_is(float, kept["started"])),
        _is(int, kept["index"]),
        _is(int, kept["count"]),
        _is(str, kept["title"]),
        bool(kept["back"]),
        None if kept["worker"] is None else Process(*(_is(int, number) for number in _is(list, kept["worker"]))),
    )


def _asker(kept: Mapping[str, object]) -> Asker:
    uid, pid = (number if number is None else _is(int, number) for number in (kept["uid"], kept["pid"]))
    unit, command, vm = (_is(str, kept[key]) for key in ("unit", "command", "vm"))
    return Asker(uid, pid, unit, command, vm, service=bool(kept["service"]))


def _owner(content: object) -> Owner | None:
    if content is None:
        return None
    name, uuid = _is(list, content)
    return Owner(_is(str, name), _is(str, uuid))


def _captured(kept: dict[str, Any]) -> Captured:
    driver, module, override = (_text(kept[key]) for key in ("driver", "module", "override"))
    if kept["power_control"] not in {"auto", "on"}:
        raise ValueError(f"power_control {kept['power_control']!r}")
    return Captured(Driver(driver, module) if driver else None, override, kept["power_control"])


def _unit(name: object, user: object) -> Unit:
    return Unit(_is(str, name), user if user is None else _is(int, user))


def _pair(device: object, driver: object) -> tuple[str, str]:
    return _is(str, device), _is(str, driver)


def _beside(terminal: object, function: object) -> tuple[int, PciAddress]:
    return _is(int, terminal), PciAddress.parse(_is(str, function))


def _announced(subsystem: object, functions: object) -> tuple[str, tuple[PciAddress, ...]]:
    return _is(str, subsystem), _addresses(functions)


def _addresses(values: object) -> tuple[PciAddress, ...]:
    return tuple(PciAddress.parse(_is(str, value)) for value in _is(list, values))


def _text(value: object) -> str | None:
    return value if value is None else _is(str, value)


def _is(kind: type[_T], value: object) -> _T:
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise TypeError(f"{value!r} is no {kind.__name__}")


def boot_id() -> str:
    """Names this run of the kernel (random(4)); a journal that names another describes nothing that is there."""
    return _BOOT_ID.read_text().strip()
