"""Packages of a release as apt has them, with what they need beyond a minimal system: for systems without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.releases import Release
from tests.harness.debian.tools import require_root, run_apart


def find_downloads(cache: Cache, kind: str, release: Release, packages: Sequence[str], *, place: str = "") -> Path:
    """The folder with their .deb files, below it at `place`. The caller holds the cache's lock.

    `kind` says what it is for, in a word. Raises HarnessError.
    """

    def build(folder: Path) -> None:
        require_root()
        cache.say(f"  downloading {len(packages)} packages of {release.name}, and what they need")
        (target := folder / place).mkdir(parents=True, exist_ok=True)
        download = f'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --yes --download-only install {" ".join(packages)}'
        options = [
            *("--variant=minbase", "--mode=root", "--format=directory"),
            *(f"--aptopt={option}" for option in release.apt_options),
            *(f"--customize-hook={download}", f'--customize-hook=cp "$1"/var/cache/apt/archives/*.deb {target}'),
        ]
        with TemporaryDirectory(prefix="gpuswitch-downloads-") as system:
            run_apart(["mmdebstrap", *options, release.name, Path(system) / "root"])

    return cache.make(f"{kind}-{release.name}", content_key(release.name, Path(__file__), place, *packages), build)
