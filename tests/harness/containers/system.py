"""The systems that containers are made of: the packages of a release, and the project on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.debian import project, tools
from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.project import (
    INSTALL,
    PIP_SETTINGS,
    find_wheels,
    project_sources,
    put_sources,
    requirements_of,
)
from tests.harness.debian.releases import Release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import require_root, run_on_top

PACKAGES = (
    # the system
    *("systemd", "systemd-sysv", "dbus", "polkitd"),
    # a person at the machine: logs in, and has a service manager
    *("login", "passwd", "libpam-systemd", "dbus-user-session"),
    # what the project and its tests use
    *("python3", "python3-venv", "make", "kmod", "procps", "strace"),
    # other people's clients of the bus
    *("libglib2.0-bin", "dbus-tests", "cockpit-bridge", "python3-dbusmock"),
)
BUSES = {"dbus-daemon": (), "dbus-broker": ("dbus-broker",)}
"""What runs as the system bus, and the packages that see to that."""


@dataclass(frozen=True)
class System:
    """Folders, each a layer of a file system.

    `root` has the packages, `project` what `make install` changed in it, `sources` all that an installation needs.
    """

    root: Path
    project: Path
    sources: Path

    @property
    def bare(self) -> tuple[Path, ...]:
        """Without the project, which can be installed."""
        return self.sources, self.root

    @property
    def installed(self) -> tuple[Path, ...]:
        return self.project, self.root

    @property
    def upgradable(self) -> tuple[Path, ...]:
        """With the project, which can be installed once more."""
        return self.sources, self.project, self.root


def find_bus(name: str) -> tuple[str, ...]:
    """Its packages. Raises HarnessError where there is no such bus."""
    if name not in BUSES:
        raise HarnessError(f"cannot make a system with the bus {name!r}: it is one of {', '.join(BUSES)}")
    return BUSES[name]


def find_system(cache: Cache, release: Release, bus: str, more: Sequence[str] = (), name: str = "") -> System:
    """The system of a release, built first where need be: that takes a minute or two.

    `more` are further packages, and `name` says in a word what they are for.

    Raises:
        HarnessError: it cannot be built; the text says why.
    """
    require_root()
    with cache.lock(), project_sources() as files:
        kind = f"{name}-{bus}" if name else bus
        root = find_root(cache, f"system-{kind}", release, (*PACKAGES, *find_bus(bus), *more))
        sources = find_sources(cache, release, files)
        return System(root, find_project(cache, release, kind, root, sources), sources)


def find_sources(cache: Cache, release: Release, files: Path) -> Path:
    wheels = find_wheels(cache, release, requirements_of(files))

    def build(folder: Path) -> None:
        put_sources(folder, files, wheels)

    return cache.make(f"sources-{release.name}", content_key(str(wheels.name), Path(project.__file__), files), build)


def find_project(cache: Cache, release: Release, kind: str, root: Path, sources: Path) -> Path:
    key = content_key(root.parent.name, sources.name, Path(tools.__file__), tools.OVERLAY, Path(__file__))

    def build(folder: Path) -> None:
        run_on_top([sources, root], folder, f"{INSTALL}; rm -r /usr/src/gpuswitch", env=PIP_SETTINGS)

    return cache.make(f"project-{kind}-{release.name}", key, build)
