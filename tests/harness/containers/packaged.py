"""The systems that the project's Debian package is tried on: all that it needs is there, and there is no network."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.harness.containers.system import PACKAGES, find_bus
from tests.harness.debian import tools
from tests.harness.debian.cache import Cache, content_key
from tests.harness.debian.package import find_package
from tests.harness.debian.releases import Release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import require_root, run_on_top

APT = "DEBIAN_FRONTEND=noninteractive apt-get --yes --quiet"
THIS, NEXT = "/srv/packages/this.deb", "/srv/packages/next.deb"
"""The package, and one of the next version."""


@dataclass(frozen=True)
class Packaged:
    """Folders, each a layer of a file system: `packages` has the packages, `project` what installing one changed."""

    root: Path
    packages: Path
    project: Path

    @property
    def bare(self) -> tuple[Path, ...]:
        """Without the project, which can be installed."""
        return self.packages, self.root

    @property
    def installed(self) -> tuple[Path, ...]:
        return self.project, self.packages, self.root


def find_packaged(cache: Cache, release: Release, bus: str) -> Packaged:
    """The systems of a release, built first where need be. Raises HarnessError."""
    require_root()
    with cache.lock():
        root = find_root(cache, f"system-{bus}", release, (*PACKAGES, *find_bus(bus), *release.libraries))
        made = find_package(cache, release)
        layer = find_layer(cache, release, made)

        def build(folder: Path) -> None:
            run_on_top([layer, root], folder, f"{APT} install {THIS}")

        key = content_key(root.parent.name, layer.name, Path(tools.__file__), tools.OVERLAY, Path(__file__))
        return Packaged(root, layer, cache.make(f"packaged-{bus}-{release.name}", key, build))


def find_layer(cache: Cache, release: Release, made: Path) -> Path:
    def build(folder: Path) -> None:
        for pattern, place in (("gpuswitch_*.deb", THIS), ("newer-version/*.deb", NEXT)):
            (package,) = made.glob(pattern)
            target = folder / place[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package, target)

    return cache.make(f"packages-{release.name}", content_key(made.name, Path(__file__)), build)
