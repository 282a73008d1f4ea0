"""The journal: what is owed to each GPU, and what the kernel has not returned from, for as long as it is so.

One small JSON file per GPU in the runtime directory, which lives as long as the kernel whose state it describes.
Written before the first step of a switch, dropped when the GPU is home; atomically replaced, so never half there.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpuswitch.errors import Failed, GpuswitchError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, Driver
from gpuswitch.model.holders import Process, Unit
from gpuswitch.switch.host import Pending
from gpuswitch.switch.owed import NOTHING, Owed

_FORMAT = 2
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept for one GPU. `stuck` has nothing but `what` and `worker`."""

    owed: Owed = NOTHING
    stuck: Pending | None = None


class Journal:
    """The files of one runtime directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, gpu: PciAddress) -> Entry:
        """What is kept for `gpu`, empty if nothing. A file that cannot be read is set aside, with a warning."""
        path = self._path(gpu)
        try:
            return _decode(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return Entry()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, GpuswitchError) as error:
            _log.warning("cannot read %s (%s): set aside, the drivers are told from the hardware instead", path, error)
            self._set_aside(path)
            return Entry()

    def away(self) -> list[PciAddress]:
        """The GPUs for which something is kept."""
        return [PciAddress.parse(f"pci_{path.stem}") for path in sorted(self._directory.glob("????*_??_??_?.json"))]

    def save(self, gpu: PciAddress, owed: Owed, stuck: Pending | None = None) -> None:
        """Keep what is owed, and what the kernel has not returned from, durably.

        Raises:
            Failed: it could not be written, so the GPU must not be touched.
        """
        path = self._path(gpu)
        fresh = path.with_suffix(".new")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with fresh.open("w") as file:
                json.dump(_encode(Entry(owed, stuck)), file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise Failed(f"cannot write the journal {path} ({error.strerror}), so nothing was changed") from error

    def drop(self, gpu: PciAddress) -> None:
        """The GPU is home: nothing is owed."""
        try:
            self._path(gpu).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot remove the journal of %s: %s", gpu, error)

    def _path(self, gpu: PciAddress) -> Path:
        return self._directory / f"{gpu.identifier}.json"

    def _set_aside(self, path: Path) -> None:
        try:
            path.replace(path.with_suffix(".bad"))
        except OSError as error:
            _log.warning("cannot set %s aside: %s", path, error)


def _encode(entry: Entry) -> dict[str, Any]:
    owed, stuck = entry.owed, entry.stuck
    return {
        "format": _FORMAT,
        "boot": boot_id(),
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
        "boot_framebuffers": [list(pair) for pair in owed.boot_framebuffers],
        "persistent": [str(address) for address in owed.persistent],
        "stuck": stuck and stuck.worker and [stuck.what, stuck.worker.pid, stuck.worker.started],
    }


def _decode(content: dict[str, Any]) -> Entry:
    """All of it is done to the host one day: nothing but what `_encode` wrote may pass."""
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}, not {_FORMAT}")
    if content["boot"] != boot_id():
        raise ValueError("it describes the kernel of an earlier boot")
    owed = Owed(
        functions={PciAddress.parse(address): _captured(kept) for address, kept in content["functions"].items()},
        units=tuple(_unit(*_is(list, pair)) for pair in _is(list, content["units"])),
        modules=tuple(_is(str, module) for module in _is(list, content["modules"])),
        terminals=tuple(_is(int, terminal) for terminal in _is(list, content["terminals"])),
        vtconsoles=tuple(_is(str, name) for name in _is(list, content["vtconsoles"])),
        boot_framebuffers=tuple(_pair(*_is(list, pair)) for pair in _is(list, content["boot_framebuffers"])),
        persistent=tuple(PciAddress.parse(address) for address in _is(list, content["persistent"])),
    )
    if content["stuck"] is None:
        return Entry(owed)
    what, pid, started = _is(list, content["stuck"])
    return Entry(owed, Pending(_is(str, what), worker=Process(_is(int, pid), _is(int, started))))


def _captured(kept: dict[str, Any]) -> Captured:
    driver, module, override = (_text(kept[key]) for key in ("driver", "module", "override"))
    if kept["power_control"] not in {"auto", "on"}:
        raise ValueError(f"power_control {kept['power_control']!r}")
    return Captured(Driver(driver, module) if driver else None, override, kept["power_control"])


def _unit(name: object, user: object) -> Unit:
    return Unit(_is(str, name), user if user is None else _is(int, user))


def _pair(device: object, driver: object) -> tuple[str, str]:
    return _is(str, device), _is(str, driver)


def _text(value: object) -> str | None:
    return value if value is None else _is(str, value)


def _is(kind: type[_T], value: object) -> _T:
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise TypeError(f"{value!r} is no {kind.__name__}")


def boot_id() -> str:
    """Names this run of the kernel (random(4)); a journal that names another describes nothing that is there."""
    return _BOOT_ID.read_text().strip()
