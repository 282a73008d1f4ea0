"""Nodes of a fleet, as a Prometheus sees them: `nodes.py PORT FOLDER`.

What is asked for at `/NAME` is the file NAME of the folder, or the file `all`, read when it starts.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path


async def main(port: int, texts: Mapping[str, bytes]) -> None:

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                body = texts.get(asked.split()[1].decode()[1:], texts["all"])
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            """Prometheus has what it wanted."""
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), {file.name: file.read_bytes() for file in Path(sys.argv[2]).iterdir()}))
