"""The project in a system that has no network: a copy of its sources, the wheels that it needs, and `make install`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.harness.debian.cache import Cache, content_key, remove
from tests.harness.debian.releases import Release
from tests.harness.debian.tools import PROJECT, run, run_in

INSTALL_READS = (
    *("pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("gpuswitch", "units", "contrib", "docs"),
)
"""What `make install` reads of the project, but for contrib/ansible and contrib/kubernetes. An older tree may have
less."""

PIP_SETTINGS = {
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "/usr/src/gpuswitch/wheels",
    "PIP_ROOT_USER_ACTION": "ignore",
}


LOCKS = ("contrib/build.lock", "contrib/requirements.lock")
"""What is installed, by version and hash; an older tree may have none."""


@contextmanager
def project_sources(tree: Path = PROJECT, more: Sequence[str] = ()) -> Iterator[Path]:
    """A copy of what `make install` reads: what is hashed is what is installed, whoever edits meanwhile.

    `more` is copied, too.
    """
    with tempfile.TemporaryDirectory(prefix="gpuswitch-sources-") as folder:
        sources = Path(folder) / "gpuswitch"
        sources.mkdir()
        for name in (*INSTALL_READS, *more):
            origin, copy = tree / name, sources / name
            copy.parent.mkdir(exist_ok=True)
            if origin.is_dir():
                shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__", "ansible", "kubernetes"))
            elif origin.exists():
                shutil.copy2(origin, copy)
        yield sources


def requirements_of(sources: Path) -> list[str]:
    """What an installation needs, and the tools that belong to it: their versions, where the tree says them."""
    if not all((sources / lock).exists() for lock in LOCKS):
        return declared_requirements(sources)
    lines = (line for lock in LOCKS for line in (sources / lock).read_text().splitlines())
    return [line.removesuffix("\\").strip() for line in lines if "==" in line]


def declared_requirements(sources: Path, *extras: str) -> list[str]:
    """What pyproject.toml asks for, in any version that will do."""
    metadata = tomllib.loads((sources / "pyproject.toml").read_text())
    project = metadata["project"]
    more = (requirement for extra in extras for requirement in project["optional-dependencies"][extra])
    return [*metadata["build-system"]["requires"], *project["dependencies"], *more]


def find_wheels(cache: Cache, release: Release, requirements: Sequence[str], kind: str = "wheels") -> Path:
    """The folder with the wheels of these and of what they need. The caller holds the cache's lock."""
    major, minor = release.python

    def build(folder: Path) -> None:
        cache.say(f"  downloading {len(requirements)} packages and what they need, for Python {major}.{minor}")
        # PEP 600: a wheel runs on any glibc that is not older than the one it names
        platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{of}_x86_64" for of in range(17, release.glibc[1] + 1))]
        run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", folder),
                *("--implementation", "cp", "--python-version", f"{major}.{minor}"),
                *("--abi", f"cp{major}{minor}", "--abi", "abi3", "--abi", "none"),
                *(word for platform in platforms for word in ("--platform", platform)),
                *requirements,
            ]
        )

    key = content_key(release.name, Path(__file__), *requirements)
    return cache.make(f"{kind}-{release.name}", key, build)


INSTALL = "make -C /usr/src/gpuswitch install"
"""In a system with the sources; with `PIP_SETTINGS` where it has no network."""


def put_sources(root: Path, sources: Path, wheels: Path) -> Path:
    """Lay sources and wheels where `PIP_SETTINGS` look for them; gives the folder."""
    inside = root / "usr/src/gpuswitch"
    shutil.copytree(sources, inside)
    shutil.copytree(wheels, inside / "wheels")
    return inside


def install_project(root: Path, sources: Path, wheels: Path) -> None:
    """`make install` in the unpacked system, as a user would, but for the network."""
    inside = put_sources(root, sources, wheels)
    run_in(root, INSTALL, env=PIP_SETTINGS)
    remove(inside)
