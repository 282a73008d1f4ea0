"""What a type hint says beyond the type, for those who read values by their hints."""

from __future__ import annotations


class OneOf:
    """The values that there are: `Annotated[str, OneOf("auto", "on")]`."""

    def __init__(self, *values: object) -> None:
        self.values = values
