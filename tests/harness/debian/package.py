"""The Debian package of the project, made in a system of a release as a user makes it: `make deb RELEASE=trixie`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.harness.debian import tools
from tests.harness.debian.cache import Cache, content_key, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.fast_tests import say
from tests.harness.debian.project import (
    PIP_SETTINGS,
    find_wheels,
    project_sources,
    put_sources,
    requirements_of,
)
from tests.harness.debian.releases import Release, find_release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import PROJECT, require_root, require_tools, run_on_top

BUILD_PACKAGES = (
    *("dpkg-dev", "debhelper", "make", "python3", "python3-venv", "lintian"),
    # where the distribution's own libraries are used
    *("dh-python", "pybuild-plugin-pyproject", "python3-all", "python3-hatchling"),
)
MORE_SOURCES = ("CHANGELOG.md",)
SOURCES = "/usr/src/gpuswitch"
NEWER_VERSION = "99.1"

BUILD = f"make --no-print-directory -C {SOURCES} deb"
NEWER = f"""
cd {SOURCES}/dist
dpkg-deb --raw-extract gpuswitch_*.deb newer
sed -i 's/^Version: .*/Version: {NEWER_VERSION}/' newer/DEBIAN/control
find newer -path '*/gpuswitch/__init__.py' -exec sed -i 's/^__version__ = .*/__version__ = "{NEWER_VERSION}"/' '{{}}' +
mkdir newer-version
dpkg-deb --root-owner-group --build newer newer-version
rm -r newer
"""
"""A package of the next version, of which nothing else is new."""


def find_package(cache: Cache, release: Release, page: Path | None = None) -> Path:
    """The folder with gpuswitch_VERSION_ARCHITECTURE.deb and .changes, and newer-version/, with the next one. `page` is
    a folder with the page for Cockpit, as `make cockpit` builds it.

    The caller holds the cache's lock. Raises HarnessError.
    """
    require_root()
    root = find_tools(cache, release)
    with project_sources(PROJECT, MORE_SOURCES) as sources:
        if page is not None:
            shutil.copytree(page, sources / "dist/cockpit/gpuswitch")
        wheels = find_wheels(cache, release, requirements_of(sources))

        def build(folder: Path) -> None:
            with (
                tempfile.TemporaryDirectory(prefix="gpuswitch-package-") as layer,
                tempfile.TemporaryDirectory(prefix="gpuswitch-package-") as changes,
            ):
                Path(layer).chmod(0o755)
                put_sources(Path(layer), sources, wheels)
                run_on_top([Path(layer), root], Path(changes), f"{BUILD}; {NEWER}", env=PIP_SETTINGS)
                shutil.copytree(Path(changes) / SOURCES[1:] / "dist", folder, dirs_exist_ok=True)

        key = content_key(root.parent.name, wheels.name, Path(__file__), Path(tools.__file__), tools.OVERLAY, sources)
        return cache.make(f"package-{release.name}", key, build)


def find_tools(cache: Cache, release: Release) -> Path:
    """The system that packages are made and looked at in. The caller holds the cache's lock."""
    return find_root(cache, "package-tools", release, BUILD_PACKAGES)


def main() -> int:
    try:
        release = find_release(os.environ.get("RELEASE", "bookworm"))
        require_tools("system")
        cache = Cache(default_folder(), say)
        with cache.lock():
            package = find_package(cache, release)
    except HarnessError as error:
        say(str(error))
        return 1
    (PROJECT / "dist").mkdir(exist_ok=True)
    for file in package.glob("gpuswitch_*"):
        shutil.copy2(file, PROJECT / "dist")
        if file.suffix == ".deb":
            say(f"made; to install it on {release.name}: apt-get install ./dist/{file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
