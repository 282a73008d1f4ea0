"""Real managers of units and sessions: systemd, a user's systemd, logind, asked from within the service's own sandbox.

tests/real_bus asks the same cases of managers in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.containers import sandbox
from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, PYTHON
from tests.harness.machines.errors import Result
from tests.real_system.conftest import Boot
from tests.systemd_contract.cases import CASES
from tests.systemd_contract.units import ALIASES, MENDED, RUNNING, SAMPLES, STOPPING

TESTS = Path(__file__).parents[1]
SUITE = [TESTS / "__init__.py", *sorted((TESTS / "systemd_contract").glob("*.py"))]

OTHER = "0000:02:00.0"

KIM = 1234
AS_KIM = f"setpriv --reuid={KIM} --regid={KIM} --clear-groups env XDG_RUNTIME_DIR=/run/user/{KIM}"
LOGIND = "org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager"
LOCKS = f"busctl --json=short call {LOGIND} ListInhibitors"


def files() -> dict[str, str]:
    """The program that asks, and the units that it asks about."""
    units = {name: sample.text for name, sample in SAMPLES.items()}
    units["mend.service"] = f"[Service]\nType=oneshot\nExecStart=/bin/touch %t/{MENDED}\n"
    laid = {f"/srv/suite/tests/{path.relative_to(TESTS)}": path.read_text() for path in SUITE}
    return laid | {f"/run/systemd/{of}/{name}": text for of in ("system", "user") for name, text in units.items()}


@pytest.fixture
def suite(boot: Boot, system: System) -> Container:
    """A machine with the units and a user whose systemd runs."""
    machine = boot(system.installed, files())
    links = [f"ln -s {to} /run/systemd/{of}/{name}" for of in ("system", "user") for name, to in ALIASES.items()]
    running = " ".join(RUNNING)
    machine.sh(
        f"""set -e
        {"; ".join(links)}
        mkfifo /run/{STOPPING}
        systemctl daemon-reload
        systemctl start {running}
        useradd -m -u {KIM} kim
        loginctl enable-linger kim
        systemctl start user@{KIM}.service
        {AS_KIM} mkfifo /run/user/{KIM}/{STOPPING}
        {AS_KIM} systemctl --user start {running}"""
    )
    return machine


def ask(machine: Container, what: str, *, check: bool = True) -> Result:
    """What the program says that is asked, within the sandbox of the service."""
    return sandbox.ask(machine, f"{PYTHON} -m tests.systemd_contract {what}", folder="/srv/suite", check=check)


def locks(machine: Container) -> list[int]:
    """The processes that hold a lock of ours, as logind has them."""
    (rows,) = json.loads(machine.sh(LOCKS).stdout)["data"]
    return [pid for _, who, _, _, _, pid in rows if who == "gpuswitch"]


ALL_KEPT = "".join(f"{name}: kept\n" for name in CASES)


def test_units_of_the_system(suite: Container) -> None:
    assert ask(suite, "cases").stdout == ALL_KEPT


def test_units_of_a_user(suite: Container) -> None:
    assert ask(suite, f"cases --user {KIM}").stdout == ALL_KEPT


def test_systemd_executes_itself_anew_while_a_unit_stops(suite: Container) -> None:
    # Not in a unit: systemctl would lose its connection while it waits for that.
    stop = suite.start(f"cd /srv/suite && {PYTHON} -m tests.systemd_contract stop hangs.service", timeout=200)
    suite.sh(f"read -r line </run/{STOPPING}")
    suite.sh("systemctl daemon-reexec")
    suite.sh("kill -9 $(systemctl show -P ControlPID hangs.service)")
    stopped = stop.wait(check=False)
    assert stopped.stdout == "stop: done\n", stopped.stderr


def test_a_lock_outlives_the_service(suite: Container) -> None:
    """Killed, stopped, started again: the lock stays, is found, and nothing of it is left when it is let go."""
    ask(suite, f"inhibit_and_die {GPU}", check=False)
    (holder,) = locks(suite)
    assert suite.sh(f"ls -l /proc/{holder}/fd").stdout.count("/dev/null") == 3
    assert ask(suite, f"inhibit {GPU}").stdout == "inhibit: done\n"
    assert locks(suite) == [holder]
    ask(suite, f"inhibit {OTHER}")
    both = locks(suite)
    assert len(both) == 2
    below = [int(pid) for each in both for pid in suite.sh(f"pgrep -P {each}").stdout.split()]
    assert len(below) == 2
    for gpu in (GPU, OTHER, GPU):
        assert ask(suite, f"release {gpu}").stdout == "release: done\n"
    # logind hears of the end of a holder when it comes to it, and so does the program below it.
    suite.sh(f"while {LOCKS} | grep gpuswitch || ps -p {','.join(map(str, both + below))}; do :; done")


def test_whom_a_lock_keeps_from_sending_the_machine_to_sleep(suite: Container) -> None:
    """Systemd sees a kernel that would sleep, and that writes down what it is told."""
    suite.sh(
        """set -e
        mkdir /run/power
        echo freeze mem >/run/power/state
        echo s2idle >/run/power/mem_sleep
        mount --bind /run/power /sys/power
        systemctl restart systemd-logind"""
    )
    ask(suite, f"inhibit {GPU}")
    # Root is asked for nothing unless it wants to be, and from 257 on it is refused.
    asked = suite.sh("systemctl suspend --check-inhibitors=yes", check=False)
    assert asked.status != 0
    assert f"GPU {GPU} is being switched" in asked.stderr
    told = suite.sh("systemctl suspend", check=False)
    if int(suite.sh("systemctl --version").stdout.split()[1]) >= 257:
        assert told.status != 0
        assert "denied" in told.stderr
        ask(suite, f"release {GPU}")
        suite.sh(f"while {LOCKS} | grep gpuswitch; do :; done; systemctl suspend")
    suite.sh("until grep -qx mem /run/power/state; do :; done")


def test_without_logind(suite: Container) -> None:
    suite.sh("systemctl mask --runtime --now systemd-logind.service")
    asked = ask(suite, f"inhibit {GPU}")
    assert "nothing is done to keep this machine awake: there is no logind (" in asked.stdout
    assert ask(suite, f"release {GPU}").stdout == "release: done\n"
    ended = ask(suite, "end_session 1", check=False)
    assert ended.stdout.startswith("cannot end session 1: there is no org.freedesktop.login1 on the system bus (")
    assert ask(suite, f"sessions {KIM}").stdout == "sessions: \n"


def test_a_session_ends(suite: Container) -> None:
    """A login on a terminal of its own, by PAM; its shell is gone when the call returns."""
    suite.push(
        f"""[Service]
User=kim
PAMName=login
TTYPath=/dev/console
StandardInput=tty-force
ExecStart=/bin/sh -c 'echo $$ >/run/user/{KIM}/shell; exec sleep infinity'
""",
        "/run/systemd/system/login.service",
    )
    suite.sh(f"systemctl start login; until [ -s /run/user/{KIM}/shell ]; do :; done")
    shell = suite.sh(f"cat /run/user/{KIM}/shell").stdout.strip()
    said = ask(suite, f"sessions {KIM}").stdout
    (session,) = said.removeprefix("sessions: ").split()
    assert ask(suite, f"end_session {session}").stdout == "end_session: done\n"
    assert suite.sh(f"loginctl show-session {session}", check=False).status != 0
    assert suite.sh(f"kill -0 {shell}", check=False).status != 0
    again = ask(suite, f"end_session {session}", check=False)
    assert again.stdout == f"cannot end session {session}: there is no such session\n"


def test_the_system_is_not_stopping(suite: Container) -> None:
    assert ask(suite, "stopping").stdout == "stopping: False\n"
    assert ask(suite, "booting").stdout == "booting: False\n"


def test_the_service_sees_those_who_log_in_after_its_start(suite: Container) -> None:
    """Its file system is its own, and a user's runtime folder is mounted when the user comes."""
    service = suite.sh("systemctl show -P MainPID gpuswitchd").stdout.strip()
    suite.sh(f"nsenter --mount --target {service} test -S /run/user/{KIM}/systemd/private")
