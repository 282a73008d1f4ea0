"""Debian's releases, and how a system of one is made out of its packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.debian.errors import HarnessError
from tests.harness.debian.tools import run_apart


@dataclass(frozen=True)
class Release:
    """A release; `python` and `glibc` decide which wheels fit it.

    `libraries` are its own packages of what the project needs of Python, where all are new enough.
    """

    name: str
    python: tuple[int, int]
    glibc: tuple[int, int]
    apt_options: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


FORKY_LIBRARIES = (
    *("python3-asyncinotify", "python3-dbus-next", "python3-jeepney", "python3-prometheus-client", "python3-pydantic"),
    *(
        "python3-pydantic-settings",
        "python3-pyudev",
        "python3-rich",
        "python3-transitions",
        "python3-typing-extensions",
    ),
)

RELEASES = {
    release.name: release
    for release in (
        Release("bookworm", (3, 11), (2, 36)),
        Release("trixie", (3, 13), (2, 41)),
        # Not released: a copy of the archive may be older than its own date of expiry allows.
        Release("forky", (3, 14), (2, 43), ('Acquire::Check-Valid-Until "false"',), FORKY_LIBRARIES),
    )
}

LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")


def find_release(name: str) -> Release:
    """Raises HarnessError where there is none of this name."""
    if name not in RELEASES:
        raise HarnessError(f"cannot make a system of the release {name!r}: it is one of {', '.join(RELEASES)}")
    return RELEASES[name]


def make_system(
    release: Release,
    root: Path,
    packages: Sequence[str],
    *,
    variant: str = "minbase",
    env: Mapping[str, str] | None = None,
) -> None:
    """Unpack and configure packages, with all that they need, in the new folder `root`. Raises HarnessError."""
    options = [
        *(f"--variant={variant}", "--mode=root", "--format=directory", f"--include={','.join(packages)}"),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        *(f"--aptopt={option}" for option in release.apt_options),
    ]
    run_apart(["mmdebstrap", *options, release.name, root], env=env)
