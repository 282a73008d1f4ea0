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
        OSError: half of the work could not be done.
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
            other = pipe.read()
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    if status:
        raise OSError(errno.EIO, "half of the look failed")
    return own, json.loads(other)


def _other_half(work: Callable[[Sequence[str]], _Result], names: Sequence[str], writer: int) -> None:
    """Does not return. Whatever goes wrong, the status tells."""
    status = 1
    try:
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(work(names)).encode())
        status = 0
    finally:
        os._exit(status)  # as the child that it is: what the parent has to say at its end is not ours
