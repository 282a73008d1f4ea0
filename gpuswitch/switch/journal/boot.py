"""What is kept of this boot, beside the pages of the GPUs: whose turn at boot has begun, and whether all that is over.

It stands in the runtime directory, which is empty when the machine starts, and names the boot all the same: a container
may keep its /run, and nothing is moved at boot twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpuswitch.errors import Failed
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.journal.codec import decode, encode
from gpuswitch.switch.journal.store import Store

_NAME = "at_boot"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BootNote:
    """`begun` are the GPUs whose switch at boot has begun, however it ended. `over`: there are no more at this boot."""

    begun: tuple[PciAddress, ...] = ()
    over: bool = False

    def with_begun(self, gpu: PciAddress) -> BootNote:
        return replace(self, begun=(*self.begun, gpu))


class BootNotes:
    """The note of this boot. `boot_id` names it."""

    def __init__(self, store: Store, boot_id: Callable[[], str]) -> None:
        self._store = store
        self._boot_id = boot_id

    def load(self) -> BootNote:
        """The note, empty where this boot has none. One that says nothing counts as over: it was begun, at least.

        Raises:
            Failed: it cannot be read now.
        """
        try:
            content = json.loads(self._store.read(_NAME))
            if content.pop("boot") != self._boot_id():
                return BootNote()
            return decode(BootNote, content)
        except FileNotFoundError:
            return BootNote()
        except OSError as error:
            raise Failed(f"cannot read {self._store.where(_NAME)} now ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _log.warning("cannot read %s (%s): nothing more is moved at this boot", self._store.where(_NAME), error)
            return BootNote(over=True)

    def save(self, note: BootNote) -> None:
        """Keep this, durably.

        Raises:
            Failed: that could not be done.
        """
        try:
            content = {"boot": self._boot_id(), **encode(note)}
            self._store.replace(_NAME, json.dumps(content).encode())
        except OSError as error:
            raise Failed(f"cannot write {self._store.where(_NAME)} ({error.strerror})") from error
