"""What gpuswitchctl ends with when it did not do what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuswitch.errors import Failed, GpuswitchError, snake_case


class CtlError(Exception):
    """Text for a person, an exit status, and what programs get: the `name` of the error, and the `blockers` of a
    refusal. An empty text has been told already.
    """

    def __init__(
        self, text: str, exit_code: int, *, name: str = "", blockers: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.name = name
        self.blockers = blockers

    @classmethod
    def of(cls, kind: type[GpuswitchError], text: str) -> CtlError:
        """One of those that the service has, too."""
        return cls(text, kind.exit_code, name=kind.name)

    def as_json(self) -> dict[str, Any]:
        """docs/json.md has the form."""
        return {
            "error": {
                "kind": snake_case(self.name or Failed.name),
                "text": str(self),
                "exit_status": self.exit_code,
            },
            "blockers": [dict(blocker) for blocker in self.blockers],
        }


class AskedForError(CtlError):
    """A person has to prove that they may do this."""
