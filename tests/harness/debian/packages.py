"""Whether Debian has packages of these names, as its own apt says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.releases import Release
from tests.harness.debian.tools import require_root, run_apart


def check_installable(cache: Cache, release: Release, packages: Sequence[str]) -> None:
    """Have apt find them in this release, with all that they need, and install nothing. Each list is asked for once.

    Raises:
        HarnessError: it does not find them all; the text names which.
    """
    require_root()
    command = [
        *("mmdebstrap", "--simulate", "--mode=root", "--format=null", "--variant=minbase"),
        *(f"--include={','.join(packages)}", *(f"--aptopt={option}" for option in release.apt_options)),
        release.name,
    ]

    def build(_: Path) -> None:
        run_apart(command)

    with cache.lock():
        cache.make(f"packages-{release.name}", content_key(release.name, *packages), build)
