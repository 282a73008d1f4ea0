"""make install, upgrade and uninstall on a running system, which gives back all that it was given."""

from __future__ import annotations

import pytest

from gpuswitch.log.events import DRIFT
from tests.harness.containers.container import Container
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    AS_NOBODY,
    GPU,
    JOURNAL,
    NAME,
    UNIT_FILE,
    call,
    ctl,
    history,
    prop,
    show,
    simulated,
    until,
    until_state,
)
from tests.harness.debian.project import PIP_SETTINGS
from tests.harness.machines.errors import Result
from tests.real_system.conftest import Boot

SOURCES = "/usr/src/gpuswitch"
SETTINGS = " ".join(f"{name}={value}" for name, value in PIP_SETTINGS.items())
NEWER = f"sed -i 's/^__version__ = .*/__version__ = \"99.1\"/' {SOURCES}/gpuswitch/__init__.py"

# All that is there, but for what passes by itself. Python writes down what it has compiled of its own.
EVERYTHING = r"""\
find / -xdev \( -path /usr/src/gpuswitch -o -path /var/log/journal -o -path /var/lib/systemd -o -name __pycache__ \) \
    -prune -o ! -type d -printf '%p\t%y\t%m\t%u\t%g\t%s\t%T@\t%l\n' -o -printf '%p\t%y\t%m\t%u\t%g\n'
"""


FOR_READERS_AND_SHELLS = {
    "/usr/local/lib/systemd/catalog/gpuswitch.catalog",
    "/usr/local/share/doc/gpuswitch/README.md",
    "/usr/local/share/doc/gpuswitch/docs/runbook.md",
    "/usr/local/share/man/man1/gpuswitchctl.1",
    "/usr/local/share/man/man8/gpuswitchd.8",
    "/usr/local/share/man/man5/gpuswitch.toml.5",
    "/usr/local/share/man/man5/org.gpuswitch1.5",
    "/usr/local/share/bash-completion/completions/gpuswitchctl",
    "/usr/local/share/zsh/site-functions/_gpuswitchctl",
    "/usr/share/fish/vendor_completions.d/gpuswitchctl.fish",
    "/usr/local/share/cockpit/gpuswitch/manifest.json",
    "/usr/local/share/applications/gpuswitch.desktop",
}
A_PAGE = (
    f"cd {SOURCES}; mkdir -p dist/cockpit/gpuswitch; echo '{{}}' >dist/cockpit/gpuswitch/manifest.json; "
    "sha256sum contrib/cockpit/build.js >dist/cockpit/gpuswitch/.sources"
)
"""Has a page for Cockpit built, as far as `make install` looks at it."""


def make(machine: Container, target: str, *, check: bool = True) -> Result:
    """Make install or uninstall, as a user would, but for the network."""
    return machine.sh(f"{SETTINGS} make -C {SOURCES} --no-print-directory {target} 2>&1", check=check, timeout=300)


@pytest.fixture
def bare(boot: Boot, system: System) -> Container:
    """A machine without the project."""
    return boot(system.bare, simulated())


@pytest.fixture
def upgradable(boot: Boot, system: System) -> Container:
    """A machine with the project, which runs, and sources to install. Its only GPU draws a desktop."""
    config = f'[[gpu]]\naddress = "{GPU}"\nname = "spare"\nallow_boot_display = true\n'
    return boot(system.upgradable, {**simulated(scenario="single"), "/etc/gpuswitch/config.toml": config})


def begin_to_wait(machine: Container) -> None:
    """Begin a switch that waits for people for so long that it will be cancelled."""
    ctl(machine, f"to-vfio {GPU} --no-wait --wait 3000")
    until_state(machine, "detaching")


def fields(line: str) -> list[str]:
    """Path, type, mode, user, group of a line of EVERYTHING; then size, time and target."""
    return line.split("\t")


ACCOUNTS = {f"/etc/{name}{copy}" for name in ("group", "gshadow") for copy in ("", "-")} | {"/etc/.pwd.lock"}
"""What a new group changes; it stays, as its number could be another's later."""


def everything(machine: Container) -> set[str]:
    return {line for line in machine.sh(EVERYTHING).stdout.splitlines() if fields(line)[0] not in ACCOUNTS}


def installations(machine: Container) -> list[str]:
    return machine.sh("ls /usr/local/lib/gpuswitch").stdout.split()


def version(machine: Container) -> str:
    return ctl(machine, "--version").stdout.split()[1]


def test_it_comes_works_and_goes_and_nothing_is_left(bare: Container) -> None:
    # it starts when it is first asked, and has folders of its own as long as it runs
    bare.sh("systemctl start polkit")
    bare.sh(A_PAGE)
    before = everything(bare)
    assert "is installed in /usr/local" in make(bare, "install").stdout
    installed = everything(bare) - before
    usual = {"f644", "f755", "d755", "l777"}
    assert [line for line in installed if "".join(fields(line)[1:3]) not in usual] == []
    assert {tuple(owner) for _, _, _, *owner in (fields(line)[:5] for line in installed)} == {("root", "root")}
    assert bare.sh("systemctl is-enabled gpuswitchd").stdout == "enabled\n"
    assert {fields(line)[0] for line in installed} >= FOR_READERS_AND_SHELLS
    assert DRIFT.message_id in bare.sh("journalctl --list-catalog").stdout

    # the bus knows it at once, and who may what
    assert GPU in bare.sh(f"{AS_NOBODY} gpuswitchctl list").stdout
    ctl(bare, f"to-vfio {GPU}")
    assert bare.sh(f"{AS_NOBODY} gpuswitchctl to-host {GPU}", check=False).status == 4

    said = make(bare, "uninstall").stdout
    assert "/etc/gpuswitch, /var/lib/gpuswitch and the group gpuswitch stay" in said
    assert bare.sh("getent group gpuswitch").stdout.startswith("gpuswitch:")
    assert bare.sh("pgrep -f gpuswitch[d]", check=False).stdout == ""
    after = everything(bare)
    assert before - after == set()
    assert DRIFT.message_id not in bare.sh("journalctl --list-catalog").stdout
    kept = {fields(line)[0] for line in after - before}
    assert kept == {"/etc/gpuswitch", "/var/lib/gpuswitch", "/var/lib/gpuswitch/history.db"}
    assert show(bare, "LoadState") == "not-found"
    asked = bare.sh(f"busctl call {NAME} /org/gpuswitch1 {NAME}.Manager Config 2>&1", check=False).stdout
    assert "was not provided by any .service files" in asked or "is not activatable" in asked


def test_an_upgrade_of_a_running_service(upgradable: Container) -> None:
    """It runs the new one at once, knows what the old one knew, and takes back what that was at."""
    ctl(upgradable, "to-vfio spare --stop-unit display-manager.service")
    ctl(upgradable, "to-host spare")
    old, first = show(upgradable, "MainPID"), installations(upgradable)
    begin_to_wait(upgradable)
    upgradable.sh(NEWER)
    assert "version 99.1 is installed" in make(upgradable, "install").stdout

    assert show(upgradable, "MainPID") not in {"0", old}
    assert (show(upgradable, "Result"), show(upgradable, "ActiveState")) == ("success", "active")
    assert version(upgradable) == "99.1"
    [shown] = call(upgradable, "/org/gpuswitch1", "org.freedesktop.DBus.Properties.GetAll", "s", f"{NAME}.Manager")
    assert shown["Version"]["data"] == "99.1"
    assert (prop(upgradable, "State"), prop(upgradable, "Name")) == ("host", "spare")
    assert history(upgradable) == [("vfio", "cancelled"), ("host", "done"), ("vfio", "done")]
    assert upgradable.sh(f"find {JOURNAL} -name '*.json'").stdout == ""
    assert len(installations(upgradable)) == 2
    assert set(installations(upgradable)) & set(first) == {"current"}


def test_an_upgrade_starts_nothing_that_is_off(upgradable: Container) -> None:
    upgradable.sh("systemctl disable --now gpuswitchd")
    make(upgradable, "install")
    assert upgradable.sh("systemctl is-enabled gpuswitchd", check=False).stdout == "disabled\n"
    assert show(upgradable, "ActiveState") == "inactive"
    assert GPU in ctl(upgradable, "list").stdout


BROKEN = {
    "the program cannot be loaded": f"echo 'import nothing_of_this_name' >>{SOURCES}/gpuswitch/daemon.py",
    "a library is missing": f"rm {SOURCES}/wheels/jeepney-*",
    "the page for Cockpit is of other sources": f"{A_PAGE}; echo >>contrib/cockpit/build.js",
    "it cannot be built": f"echo nonsense >{SOURCES}/pyproject.toml",
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_an_installation_that_fails_leaves_the_old_one(upgradable: Container, damage: str) -> None:
    before, running = everything(upgradable), show(upgradable, "MainPID")
    upgradable.sh(f"{NEWER}; {damage}")
    assert make(upgradable, "install", check=False).status != 0
    assert everything(upgradable) ^ before == set()
    assert show(upgradable, "MainPID") == running
    upgradable.sh("systemctl restart gpuswitchd")
    assert prop(upgradable, "State") == "host"


def test_an_installation_that_is_interrupted_leaves_the_old_one(upgradable: Container) -> None:
    before, running = everything(upgradable), show(upgradable, "MainPID")
    job = upgradable.start(f"{SETTINGS} make -C {SOURCES} install 2>&1", timeout=300)
    until(upgradable, "pgrep -f 'pip instal[l]'")
    upgradable.sh("kill -TERM $(pgrep -f 'contrib/install.s[h]')")
    assert job.wait(check=False).status != 0
    until(upgradable, "! pgrep -f 'pip instal[l]'")
    assert everything(upgradable) ^ before == set()
    assert show(upgradable, "MainPID") == running


def test_a_service_that_does_not_come_up_any_more_is_said(upgradable: Container) -> None:
    upgradable.push("[deadlines]\nunbnd = 3\n", "/etc/gpuswitch/config.toml")
    said = make(upgradable, "install", check=False)
    assert said.status != 0
    assert "cannot restart gpuswitchd.service: see journalctl -u gpuswitchd.service" in said.stdout
    assert "config.toml" in upgradable.sh("journalctl -u gpuswitchd -o cat").stdout


def test_an_uninstallation_waits_for_no_switch_and_ends_what_runs(upgradable: Container) -> None:
    begin_to_wait(upgradable)
    refused = make(upgradable, "uninstall", check=False)
    assert refused.status != 0
    assert f"cancel it: gpuswitchctl cancel {GPU}\ncannot remove gpuswitch: a GPU cannot come home\n" in refused.stdout
    assert prop(upgradable, "State") == "detaching"
    ctl(upgradable, f"cancel {GPU}")
    until_state(upgradable, "host")
    make(upgradable, "uninstall")
    assert upgradable.sh("pgrep -f gpuswitch[d]", check=False).stdout == ""
    assert upgradable.sh(f"ls {UNIT_FILE} /usr/local/lib/gpuswitch", check=False).stdout == ""
    again = make(upgradable, "uninstall", check=False)
    assert again.status != 0
    assert "cannot uninstall: there is no gpuswitch in /usr/local" in again.stdout
