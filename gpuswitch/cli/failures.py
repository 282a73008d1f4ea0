"""What gpuswitchctl ends with when it did not do what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuswitch.errors import Failed, GpuswitchError, snake_case

EXIT_INTERRUPTED = 130
"""What a shell expects of a program that ^C ended."""
_NOTHING_CHANGED = frozenset({2, 3, 4})
"""Exit statuses of what was not begun, or is as before. After others, only a look can tell."""
_OF_BLOCKER = ("kind", "text", "error")


def called(name: str, address: str) -> str:
    """What a GPU is called in sentences: `rtx3070 (0000:01:00.0)`, or its address alone."""
    return f"{name} ({address})" if name else address


class CtlError(Exception):
    """Text for a person, an exit status, and what programs get: the `name` of the error, the `blockers` of a refusal,
    and the address and the name of the `gpu` that it is about, where that is one.
    """

    gpu: str | None = None
    gpu_name: str = ""
    is_whole = False
    """Whether the text says all by itself: not what could not be done, but that nobody looks any longer."""
    lead = ""
    """What stands before the text, with its colon, where that is not what could not be done."""

    def __init__(
        self, text: str, exit_code: int, *, name: str = "", blockers: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.name = name
        self.blockers = blockers

    @classmethod
    def of(cls, kind: type[GpuswitchError], text: str, *, is_whole: bool = False) -> CtlError:
        """One of those that the service has, too."""
        error = cls(text, kind.exit_code, name=kind.name)
        error.is_whole = is_whole
        return error

    @classmethod
    def interrupted(cls, text: str) -> CtlError:
        """Nobody looks any longer: ^C."""
        error = cls(text, EXIT_INTERRUPTED, name="Interrupted")
        error.is_whole = True
        return error

    def about(self, address: str, name: str) -> None:
        """Say which GPU it is about."""
        self.gpu, self.gpu_name = address, name

    @property
    def title(self) -> str:
        """What the GPU that it is about is called in sentences; "" where it is about none."""
        return called(self.gpu_name, self.gpu or "")

    def as_json(self) -> dict[str, Any]:
        """docs/json.md has the form."""
        return {
            "event": "error",
            "gpu": self.gpu,
            "name": self.gpu_name,
            "changed": False if self.exit_code in _NOTHING_CHANGED else None,
            "error": {
                "kind": snake_case(self.name or Failed.name),
                "text": str(self),
                "exit_status": self.exit_code,
            },
            "blockers": list(map(blocker_record, self.blockers)),
        }


def blocker_record(told: Mapping[str, Any]) -> dict[str, Any]:
    """One reason as programs get it. What its sentence is made of is for whoever words it anew, as we do."""
    return with_error_kind({key: told[key] for key in _OF_BLOCKER})


def with_error_kind(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the service tells, with the name of an error in it as programs have it: `not_viable`."""
    return {**{key: value for key, value in told.items() if key != "error"}, "error_kind": snake_case(told["error"])}


class AskedForError(CtlError):
    """A person has to prove that they may do this."""
