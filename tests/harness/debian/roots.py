"""The unpacked system of a release, for what runs beside this machine's own: containers, programs newer than ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.harness.debian import releases
from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.releases import Release, make_system
from tests.harness.debian.tools import require_root


def find_root(cache: Cache, kind: str, release: Release, packages: Sequence[str]) -> Path:
    """The folder with these packages unpacked and configured; nobody writes to it. The caller holds the cache's lock.

    `kind` says what it is for, in a word. Raises HarnessError.
    """

    def build(folder: Path) -> None:
        require_root()
        cache.say(f"  installing {release.name} and {len(packages)} packages, about a minute")
        make_system(release, folder / "root", packages)

    key = content_key(release.name, Path(releases.__file__), *packages)
    return cache.make(f"{kind}-{release.name}", key, build) / "root"
