"""An attribute of a PCI function, as sysfs has it."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from gpuswitch.errors import InvalidArgument
from gpuswitch.model.address import PciAddress

_PATH = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


class FunctionAttribute(NamedTuple):
    """One attribute of one function; `path` is below the function's folder: `d3cold_allowed`, `power/control`."""

    function: PciAddress
    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` gives: `0000:00:01.0/power/control`.

        Raises:
            InvalidArgument: for anything else.
        """
        function, _, path = text.partition("/")
        if _PATH.fullmatch(path) is None:
            raise InvalidArgument(f"{text[:80]!r} is not an attribute of a PCI function")
        return cls(PciAddress.parse(function), path)

    def __str__(self) -> str:
        return f"{self.function}/{self.path}"
