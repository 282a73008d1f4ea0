#!/bin/sh
# asyncio (Python 3.11, 3.13) and trio 0.31.0: a Unix socket whose listener has no room counts as connected; uvloop says so.
#
# connect() on a non-blocking Unix stream socket says EAGAIN when the listener's backlog is full, and then nothing is
# under way: unix(7) has no EINPROGRESS, and the socket stays unconnected for ever. (On TCP, EINPROGRESS means: wait
# until it is writable.) Python gives BlockingIOError for both, and asyncio and trio wait for it to be writable, which an
# unconnected Unix socket is at once, without an error in SO_ERROR. So open_unix_connection() returns a connection that
# is none; the first read or write fails with EINVAL or ENOTCONN, or, for one who only listens, at some later time.
# A daemon meets this with a bus or a manager that is busy for a moment, as at boot: it must try again on that errno, and
# not believe that it is connected before an answer has come.
#
# Needs python3 (3.11 or later) with venv. Seen with Python 3.11.7 and 3.13.0, uvloop 0.22.1, trio 0.31.0:
#   socket: no room, EAGAIN
#   asyncio: connected; first read: EINVAL
#   trio: connected; first write: ENOTCONN
#   uvloop: no connection, EAGAIN
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check uvloop==0.22.1 trio==0.31.0
"$folder/venv/bin/python" - "$folder/socket" <<'END'
import asyncio
import errno
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import trio
import uvloop

PATH = sys.argv[1]
SECONDS = 10
Seen = list[str]


def name_of(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
    return errno.errorcode[cause.errno] if isinstance(cause, OSError) and cause.errno else repr(error)


async def with_asyncio(seen: Seen) -> None:
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_unix_connection(PATH)
    except OSError as error:
        seen.append(f"no connection, {name_of(error)}")
        return
    try:
        async with asyncio.timeout(SECONDS):
            await reader.read(1)
    except OSError as error:
        seen.append(f"connected; first read: {name_of(error)}")
    finally:
        writer.close()


async def with_trio(seen: Seen) -> None:
    with trio.fail_after(SECONDS):
        stream = await trio.open_unix_socket(PATH)
        try:
            await stream.send_all(b"hello")
        except trio.BrokenResourceError as error:
            seen.append(f"connected; first write: {name_of(error)}")


def said(run: Callable[[Awaitable[None]], object], work: Callable[[Seen], Awaitable[None]]) -> str:
    seen: Seen = []
    run(work(seen))
    return seen[0] if seen else "nothing"


with ExitStack() as stack:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(PATH)
    listener.listen(0)
    while True:
        one = stack.enter_context(socket.socket(socket.AF_UNIX))
        one.setblocking(False)
        try:
            one.connect(PATH)
        except BlockingIOError as error:
            found = {"socket": f"no room, {name_of(error)}"}
            break
    found["asyncio"] = said(asyncio.run, with_asyncio)
    seen: Seen = []
    trio.run(with_trio, seen)
    found["trio"] = seen[0] if seen else "nothing"
    found["uvloop"] = said(uvloop.run, with_asyncio)

for who, what in found.items():
    print(f"{who}: {what}")
assert found["socket"] == "no room, EAGAIN", "changed: the kernel says another thing"
assert found["asyncio"].startswith("connected;"), "changed: asyncio knows that it is not connected"
assert found["trio"].startswith("connected;"), "changed: trio knows that it is not connected"
assert found["uvloop"] == "no connection, EAGAIN", "changed: uvloop says another thing"
END
