"""How a kernel operation is declared: once, as a method of `gpuswitch.host.port.Kernel`.

    @operation("unbind", raises={errno.ENODEV: "it is not bound to that driver"})
    def unbind(self, function: PciAddress, driver: str) -> Words[None]:
        return Words("unbind", function, f"{function} from {driver}")

Its callers `await kernel.unbind(function, driver)`, with these arguments, and get what stands between the brackets. Its
body says it to a person. Everything else follows: each host is handed a `Request`, and does it in its own `perform`.
"""

from __future__ import annotations

import errno
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, get_args, get_origin, get_type_hints

from gpuswitch.config.schema import Deadlines, check_kind
from gpuswitch.errors import KernelError
from gpuswitch.model.hints import OneOf

T = TypeVar("T")
P = ParamSpec("P")
K = TypeVar("K", bound="Operations")
_DECLARED = "declared"
ANY_OPERATION: Mapping[int, str] = {
    errno.EBUSY: "the kernel has not returned from an earlier one",
    errno.EINVAL: "an argument is none: no driver, module or function is named like that",
    errno.EIO: "the worker ended in it, or what it looked at shows that it did not work",
    errno.ENODEV: "the function is not there",
}
"""What each operation may raise, whatever it is."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel operation. `deadline` is the kind of deadline that its callers give it (`Deadlines`).

    `parameters` are its arguments, and `result` what it returns, as type hints. `raises` says what its errnos mean, but
    for those in ANY_OPERATION. `reads`: it changes nothing. `attribute`: what it does is a write of its one argument to
    this attribute of functions, by their folder in sysfs (`power/control`), so that no host needs to know more of it.
    """

    name: str
    deadline: str
    parameters: Mapping[str, Any]
    result: Any
    raises: Mapping[int, str]
    reads: bool
    attribute: str


class Words(Generic[T]):
    """An operation as it is said to a person: `cannot VERB WHOLE: ...`. T is what the operation returns.

    `whole`: the subject with all that belongs to it, as the step that does this is called: `0000:01:00.1 to vfio-pci`.
    """

    def __init__(self, verb: str, subject: object, whole: str = "") -> None:
        self.verb = verb
        self.subject = str(subject)
        self.whole = whole or self.subject
        self.what = f"{verb} {self.whole}"


@dataclass(frozen=True, slots=True)
class Request:
    """One operation with its arguments, by name."""

    operation: Operation
    arguments: Mapping[str, Any]
    words: Words[Any] = field(compare=False)


class Operations(ABC):
    """Who does operations."""

    @abstractmethod
    async def perform(self, request: Request) -> Any:
        """Do it; returns what the operation is declared to return.

        Raises:
            KernelError: with the kernel's own errno.
        """


class Declare(Protocol):
    """Makes a declaration what its callers see."""

    def __call__(
        self, method: Callable[Concatenate[K, P], Words[T]], /
    ) -> Callable[Concatenate[K, P], Coroutine[Any, Any, T]]: ...


def operation(
    deadline: str, *, raises: Mapping[int, str] | None = None, reads: bool = False, writes: str = ""
) -> Declare:
    """Declare an operation; the arguments are those of `Operation`, `writes` its `attribute`.

    Raises:
        TypeError: it cannot be declared so.
    """

    def declare(method: Callable[Concatenate[K, P], Words[T]]) -> Callable[Concatenate[K, P], Coroutine[Any, Any, T]]:
        declared = _declaration(method, deadline, raises or {}, reads, writes)
        signature = inspect.signature(method)

        @wraps(method)
        async def ask(self: K, /, *args: P.args, **kwargs: P.kwargs) -> T:
            given = signature.bind(self, *args, **kwargs)
            given.apply_defaults()
            arguments = dict(list(given.arguments.items())[1:])
            words = method(self, *args, **kwargs)
            if writes:
                _check_values(declared, arguments, words)
            result: T = await self.perform(Request(declared, arguments, words))
            return result

        setattr(ask, _DECLARED, declared)
        return ask

    return declare


def operations_of(port: type) -> dict[str, Operation]:
    """All that are declared in a class, by name."""
    return {name: method.declared for name, method in vars(port).items() if hasattr(method, _DECLARED)}


def seconds_for(asked: Callable[..., object], deadlines: Deadlines) -> float:
    """How long an operation may take that no step waits for: `seconds_for(Kernel.capture, config.deadlines)`."""
    declared: Operation = getattr(asked, _DECLARED)
    seconds: float = getattr(deadlines, declared.deadline)
    return seconds


def _declaration(
    method: Callable[..., Words[Any]], deadline: str, raises: Mapping[int, str], reads: bool, writes: str
) -> Operation:
    name = method.__name__
    hints = get_type_hints(method, include_extras=True)
    result = hints.pop("return", None)
    check_kind(deadline, f"the operation {name}")
    if get_origin(result) is not Words:
        raise TypeError(f"the operation {name} is declared to return {result}: write Words[...], with what it returns")
    if missing := set(inspect.signature(method).parameters) - {"self", *hints}:
        raise TypeError(f"the operation {name} does not say of which type {', '.join(sorted(missing))} is")
    if writes and (reads or len(hints) != 1 or get_origin(next(iter(hints.values()))) is not Mapping):
        raise TypeError(f"the operation {name} writes {writes}: it takes one Mapping, of functions to values")
    return Operation(name, deadline, hints, get_args(result)[0], raises, reads, writes)


def _check_values(declared: Operation, arguments: Mapping[str, Any], words: Words[Any]) -> None:
    [hint], [values] = declared.parameters.values(), arguments.values()
    allowed = [each.values for each in get_args(get_args(hint)[1]) if isinstance(each, OneOf)]
    for function, value in values.items():
        if any(value not in known for known in allowed):
            raise KernelError(words.verb, str(function), errno.EINVAL, f"{declared.attribute} has no value {value!r}")
