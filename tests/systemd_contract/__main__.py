"""Ask things of real managers, on a machine that one can do without: `python -m tests.systemd_contract cases`.

The units of `units.py` have to be there, and those running that run. Says `CASE: kept` of each case, or what was found
instead. `--user UID`: of that user's manager. Or makes a single call of `LinuxSystemd`, and says what came of it:
`python -m tests.systemd_contract CALL ARGUMENT`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.systemd import LinuxSystemd
from gpuswitch.model.holders import Unit
from tests.systemd_contract.cases import CASES, ManagerHarness
from tests.systemd_contract.units import STOPPING

DEADLINE = 100.0


@dataclass(frozen=True)
class RealAdministrator:
    """`tests.systemd_contract.cases.Administrator`, by systemctl, with the rights of the manager's user."""

    user: int | None

    async def mend(self) -> None:
        await self._systemctl("start", "mend.service")

    async def stop_under_way(self) -> None:
        await asyncio.to_thread((self._runtime / STOPPING).read_text)

    async def job(self, name: str) -> str:
        jobs = await self._systemctl("list-jobs", "--plain", "--no-legend", "--full")
        return next((fields[2] for line in jobs.splitlines() if (fields := line.split())[1] == name), "")

    async def main_pid(self, name: str) -> int:
        return int(await self._systemctl("show", "--property=MainPID", "--value", name))

    async def begin(self, names: Sequence[str]) -> None:
        await self._systemctl("start", "--no-block", *names)

    @property
    def _runtime(self) -> Path:
        return Path("/run") if self.user is None else Path(f"/run/user/{self.user}")

    async def _systemctl(self, *arguments: str) -> str:
        command = ["systemctl", *arguments]
        if self.user is not None:
            uid = str(self.user)
            command = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "systemctl", "--user", *arguments]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(self._runtime)}
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
        output, _ = await process.communicate()
        assert process.returncode == 0, command
        return output.decode()


async def call(systemd: LinuxSystemd, name: str, argument: str) -> str:
    """One call, and what it returns, for a person."""
    match name:
        case "stop":
            await systemd.stop(Unit(argument))
        case "end_session":
            await systemd.end_session(argument)
        case "sessions":
            return " ".join(await systemd.sessions(int(argument)))
        case "stopping":
            return str(await systemd.stopping())
        case "booting":
            return str(await systemd.booting())
        case "inhibit":
            await systemd.inhibit(argument)
        case "inhibit_and_die":
            await systemd.inhibit(argument)
            os.kill(os.getpid(), signal.SIGKILL)
        case "release":
            await systemd.release(argument)
    return "done"


CALLS = ("stop", "end_session", "sessions", "stopping", "booting", "inhibit", "inhibit_and_die", "release")


async def cases(systemd: LinuxSystemd, user: int | None) -> None:
    for name, case in CASES.items():
        try:
            await case(ManagerHarness(systemd, RealAdministrator(user), user))
        except Exception as error:  # noqa: BLE001 - whatever a case ends with, the test outside is told
            say(f"{name}: {''.join(traceback.format_exception(error))}")
        else:
            say(f"{name}: kept")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


async def run(name: str, argument: str, user: int | None) -> int:
    systemd = LinuxSystemd("/usr/bin:/bin")
    async with asyncio.timeout(DEADLINE):
        try:
            if name == "cases":
                await cases(systemd, user)
            else:
                say(f"{name}: {await call(systemd, name, argument)}")
        except KernelError as error:
            say(str(error))
            return 1
        finally:
            await systemd.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.systemd_contract")
    parser.add_argument("name", choices=("cases", *CALLS))
    parser.add_argument("argument", nargs="?", default="")
    parser.add_argument("--user", type=int)
    asked = parser.parse_args()
    return asyncio.run(run(asked.name, asked.argument, asked.user))


if __name__ == "__main__":
    sys.exit(main())
