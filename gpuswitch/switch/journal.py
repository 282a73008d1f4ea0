"""The journal: what each GPU had before we touched it, kept for exactly as long as we owe it.

One small JSON file per GPU in the runtime directory, which lives as long as the kernel whose state it describes.
Written before the first step of a switch, dropped when the GPU is home; atomically replaced, so never half there.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from gpuswitch.errors import Failed, GpuswitchError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, Driver
from gpuswitch.switch.plan import Baseline

_FORMAT = 1
_log = logging.getLogger(__name__)


class Journal:
    """The files of one runtime directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, gpu: PciAddress) -> Baseline | None:
        """What is owed to `gpu`, None if nothing. A file that cannot be read is set aside, with a warning."""
        path = self._path(gpu)
        try:
            return _decode(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, GpuswitchError) as error:
            _log.warning("cannot read %s (%s): set aside, the drivers are told from the hardware instead", path, error)
            self._set_aside(path)
            return None

    def away(self) -> list[PciAddress]:
        """The GPUs to which something is owed."""
        return [PciAddress.parse(f"pci_{path.stem}") for path in sorted(self._directory.glob("????*_??_??_?.json"))]

    def save(self, gpu: PciAddress, baseline: Baseline) -> None:
        """Keep what is owed, durably.

        Raises:
            Failed: it could not be written, so the GPU must not be touched.
        """
        path = self._path(gpu)
        fresh = path.with_suffix(".new")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with fresh.open("w") as file:
                json.dump(_encode(baseline), file)
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


def _encode(baseline: Baseline) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "baseline": {
            str(address): {
                "driver": captured.driver and captured.driver.name,
                "module": captured.driver and captured.driver.module,
                "override": captured.override,
                "power_control": captured.power_control,
            }
            for address, captured in baseline.items()
        },
    }


def _decode(content: dict[str, Any]) -> Baseline:
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}, not {_FORMAT}")
    return {PciAddress.parse(address): _decode_captured(kept) for address, kept in content["baseline"].items()}


def _decode_captured(kept: dict[str, Any]) -> Captured:
    # All of it is written to the kernel one day: nothing but what `_encode` wrote may pass.
    driver, module, override = (_text(kept[key]) for key in ("driver", "module", "override"))
    if kept["power_control"] not in {"auto", "on"}:
        raise ValueError(f"power_control {kept['power_control']!r}")
    return Captured(Driver(driver, module) if driver else None, override, kept["power_control"])


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"{value!r} is no text")
