"""What a type hint says beyond the type, for those who read values by their hints."""

from __future__ import annotations


class OneOf:
    """The values that there are: `Annotated[str, OneOf("auto", "on")]`."""

    def __init__(self, *values: object) -> None:
        self.values = values


class Attribute:
    """Where sysfs has a value of a function: `path` below the function's folder.

    `at_boot`: what it says before anybody writes to it, for hosts that are not there; "": nothing.
    """

    def __init__(self, path: str, at_boot: str) -> None:
        self.path = path
        self.at_boot = at_boot
