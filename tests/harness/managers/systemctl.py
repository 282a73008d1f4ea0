"""What stands in for `systemctl --user`: the words that systemd 252 has for what a manager in memory does.

The program itself only carries its arguments to the socket of the user's manager, and brings back what is answered:
so it may be killed at any time, and the manager goes on, as it is with the real one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.managers.memory import Job, Manager, RefusedError
from tests.systemd_contract.units import ALIASES

PROGRAM = f"""#!{sys.executable} -ISE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as manager:
    manager.connect(os.environ["XDG_RUNTIME_DIR"] + "/systemd/private")
    manager.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getuid()]).encode() + b"\\n")
    status, output, errors = json.loads(manager.makefile().readline())
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(status)
"""

Said = tuple[int, str, str]
"""Status, output, errors."""


@dataclass
class Systemctl:
    """The other end of it. `calls` are the arguments, environments and uids that it was run with."""

    manager: Manager
    calls: list[tuple[list[str], dict[str, str], int]] = field(default_factory=list)
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    async def begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one call, which is known until it is over."""
        task = asyncio.create_task(self.serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def close(self) -> None:
        """The jobs that are still at work end, and whoever waits for one is answered."""
        for job in list(self.manager.jobs.values()):
            self.manager.end(job, "canceled")
        await asyncio.gather(*self._serving)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arguments, environment, uid = json.loads(await reader.readline())
        self.calls.append((arguments, environment, uid))
        assert arguments[:2] == ["--user", "--no-ask-password"]
        said = await self._do(*arguments[2:])
        writer.write(json.dumps(said).encode() + b"\n")
        writer.close()

    async def _do(self, verb: str, *rest: str) -> Said:
        name = rest[-1]
        try:
            match verb:
                case "show":
                    return 0, self._show(name), ""
                case "list-jobs":
                    jobs = self.manager.jobs.values()
                    return 0, "".join(f" {job.number} {job.unit.name} {job.kind} running\n" for job in jobs), ""
                case "cancel":
                    self.manager.end(self.manager.jobs[int(name)], "canceled")
                    return 0, "", ""
                case "reset-failed":
                    self.manager.reset_failed(name)
                    return 0, "", ""
            return await self._job(verb, name)
        except RefusedError as error:
            hint = f"See user logs and 'systemctl --user status {name}' for details.\n"
            return 1, "", f"Failed to {verb} {name}: {error.text}\n{hint}"

    def _show(self, name: str) -> str:
        unit = self.manager.find(name)
        job = unit.job.number if unit.job else ""
        triggered_by = " ".join(unit.sample.triggered_by)
        values = f"TriggeredBy={triggered_by}\nLoadState={unit.load}\nActiveState={unit.state}\nJob={job}\n"
        return f"Id={ALIASES.get(name, name)}\n{values}"

    async def _job(self, verb: str, name: str) -> Said:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        job = self.manager.queue(name, verb)

        def removed(other: Job, result: str) -> None:
            if other is job and not ended.done():
                ended.set_result(result)

        self.manager.removed.append(removed)
        self.manager.work(job)
        result = await ended
        self.manager.removed.remove(removed)
        if result == "done":
            return 0, "", ""
        hint = f'See "systemctl --user status {name}" and "journalctl --user -xeu {name}" for details.\n'
        if result == "canceled":
            return 1, "", f"Job for {name} canceled.\n"
        return 1, "", f"Job for {name} failed because the control process exited with error code.\n{hint}"


@asynccontextmanager
async def user_manager(run: Path, uid: int, tools: Path, manager: Manager) -> AsyncIterator[Systemctl]:
    """A user's manager with its runtime folder below `run`, and the program that speaks to it in `tools`."""
    systemctl = Systemctl(manager)
    folder = run / f"user/{uid}/systemd"
    folder.mkdir(parents=True)
    program = tools / "systemctl"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    async with await asyncio.start_unix_server(systemctl.begin, folder / "private"):
        yield systemctl
        await systemctl.close()
