"""The test drivers in modules/, built for the kernel of a base.

The compiler and the kernel's headers lie in a system of their own: no machine needs them, and a change of the sources
builds nothing but the modules.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.harness.debian.cache import Cache, content_key, remove
from tests.harness.debian.releases import Release, make_system
from tests.harness.debian.tools import run_in
from tests.harness.virtual_machines.base import base_key

SOURCES = Path(__file__).parent / "modules"

NVIDIA_VERSIONS = ("580.142", "550.54")
"""The first is installed. The other cannot let go of one of several GPUs while nvidia_drm has modeset on."""


def modules_key(release: Release) -> str:
    return content_key(base_key(release), Path(__file__), SOURCES)


def find_modules(cache: Cache, release: Release, kernel: str) -> Path:
    """The folder with one folder of modules for each version. The caller holds the cache's lock."""
    compiler = find_compiler(cache, release, kernel) / "root"

    def build(folder: Path) -> None:
        for version in NVIDIA_VERSIONS:
            work = compiler / "build"
            remove(work)
            shutil.copytree(SOURCES, work)
            run_in(compiler, f"make -s -C /lib/modules/{kernel}/build M=/build NVIDIA_VERSION={version} modules")
            (folder / version).mkdir()
            for module in work.glob("*.ko"):
                shutil.copy2(module, folder / version)
            remove(work)

    return cache.make(f"modules-{release.name}", modules_key(release), build)


def find_compiler(cache: Cache, release: Release, kernel: str) -> Path:
    packages = (f"linux-headers-{kernel}", "make")

    def build(folder: Path) -> None:
        cache.say("  installing the compiler and the kernel's headers")
        make_system(release, folder / "root", packages, variant="essential")

    return cache.make(f"compiler-{release.name}", content_key(base_key(release), *packages), build)
