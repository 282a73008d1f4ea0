"""Work that two processes share: two threads of this one would wait for each other most of the time."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

_Result = TypeVar("_Result")


def in_two(work: Callable[[Sequence[str]], _Result], names: Sequence[str]) -> tuple[_Result, _Result]:
    """The results of both halves of the work; a result must be something that JSON can say.

    Raises:
        OSError: half of the work could not be done, and why.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)  # else nobody would tell us that nobody reads
        _other_half(work, names[1::2], writer)
    os.close(writer)
    try:
        own = work(names[::2])
        with open(reader, "rb", closefd=False) as pipe:
            said = pipe.read()
    finally:
        os.close(reader)
        os.waitpid(child, 0)
    if not said:
        raise OSError(errno.EIO, "half of the look failed")
    result, error = json.loads(said)
    if error is not None:
        raise OSError(*error)
    return own, result


def _other_half(work: Callable[[Sequence[str]], _Result], names: Sequence[str], writer: int) -> None:
    """Does not return. It says its result, or what went wrong; where it says nothing, it did not come that far."""
    try:
        try:
            said: object = (work(names), None)
        except OSError as error:
            said = (None, (error.errno, error.strerror, error.filename))
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(said).encode())
    finally:
        os._exit(0)  # as the child that it is: what the parent has to say at its end is not ours
