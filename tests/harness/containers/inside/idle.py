"""Sit at the service's metrics: `idle.py COUNT` keeps so many connections that say nothing, and sends a large request.

A connection that is cut off is replaced at once. It prints a line when it has them all, and does not end.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys

WHERE = ("127.0.0.1", 9752)


def main() -> None:
    with selectors.DefaultSelector() as idle, socket.create_connection(WHERE) as large:
        for _ in range(int(sys.argv[1])):
            idle.register(socket.create_connection(WHERE), selectors.EVENT_READ)
        with contextlib.suppress(OSError):
            large.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 1_000_000)
        print("idle", flush=True)  # noqa: T201 -- whoever started us waits for it
        while True:
            for ready, _ in idle.select():
                connection = ready.fileobj
                assert isinstance(connection, socket.socket)
                idle.unregister(connection)
                connection.close()
                idle.register(socket.create_connection(WHERE), selectors.EVENT_READ)


if __name__ == "__main__":
    main()
