"""What is measured: ourselves as we are developed, or revisions of us, each installed for itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.debian.cache import Cache, content_key, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.project import project_sources
from tests.harness.debian.tools import PROJECT, run


@dataclass(frozen=True)
class Build:
    """An installation, and the tree that it is made of. Nothing of it is imported here: it is run."""

    name: str
    python: Path
    tree: Path

    def command(self, name: str) -> list[str]:
        """One of its commands, whatever PYTHONPATH says.

        The interpreter is named, since the first line of the file may name one that was moved with the build.
        """
        return [str(self.python), "-E", str(self.python.with_name(name))]

    def libraries(self) -> set[str]:
        """Names and versions of what is installed with it."""
        found = self.python.parents[1].glob("lib/python*/site-packages/*.dist-info")
        return {path.stem for path in found if not path.name.startswith("gpuswitch-")}


def open_cache() -> Cache:
    """Where builds are kept. What goes on in it is told beside the tables."""
    return Cache(default_folder(), lambda line: print(line, file=sys.stderr, flush=True))


DEVELOPED = Build("this", Path(sys.executable), PROJECT)


def build_tree(cache: Cache, name: str, tree: Path) -> Build:
    """Install what lies in a tree, in a virtual environment of its own; kept by what `make install` would read of it.

    Raises HarnessError.
    """
    with project_sources(tree) as sources:

        def build(folder: Path) -> None:
            cache.say(f"  installing {name}")
            shutil.copytree(sources, folder / "tree")
            run([sys.executable, "-m", "venv", folder / "venv"])
            python = folder / "venv/bin/python"
            run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", sources])

        key = content_key(sys.version, Path(__file__), sources)
        if (entry := cache.find("revision", key)) is None:
            with cache.lock():
                entry = cache.make("revision", key, build)
    return Build(name, entry / "venv/bin/python", entry / "tree")


@contextmanager
def checked_out(commit: str, repository: Path = PROJECT) -> Iterator[Path]:
    """The tree of a commit, in a folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="gpuswitch-revision-") as folder:
        packed = run(["git", "-C", repository, "archive", "--format=tar", commit])
        run(["tar", "-x", "-C", folder], stdin=packed)
        yield Path(folder)


def find_commit(revision: str, repository: Path = PROJECT) -> str:
    """The short id of the commit that a branch, a tag or an id stands for.

    Raises:
        HarnessError: git knows none.
    """
    asked = ["rev-parse", "--verify", "--quiet", "--short", "--end-of-options", f"{revision}^{{commit}}"]
    found = subprocess.run(["git", "-C", repository, *asked], check=False, capture_output=True, text=True)
    if found.returncode != 0:
        why = found.stderr.strip() or "git knows no such commit; BASE is a branch, a tag or an id"
        raise HarnessError(f"cannot compare with {revision!r}: {why}")
    return found.stdout.strip()
