"""The fast tests with the Python of another release: `python -m tests.harness.debian.fast_tests [OPTION OF PYTEST...]`.

RELEASE chooses the release. They run in an unpacked system of it, on a copy of this tree, with what `make test` has.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.debian import tools
from tests.harness.debian.cache import Cache, content_key, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.project import declared_requirements, find_wheels
from tests.harness.debian.releases import Release, find_release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import PROJECT, require_root, require_tools, run_on_top, show_on_top

PACKAGES = (
    *("git", "python3", "python3-venv", "procps", "systemd"),
    *("dbus-daemon", "dbus-bin", "prometheus", "openssl", "bash-completion", "zsh", "fish", "man-db"),
    *("groff-base", "mandoc", "jq", "desktop-file-utils", "kubernetes-client"),
)
"""The last two lines as contrib/need.sh has them for `test`."""
TREE = "usr/src/gpuswitch"
WHEELS = "usr/src/wheels"
VENV = "/opt/tests"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".hypothesis", ".*_cache")


def find_systems(cache: Cache, release: Release) -> tuple[Path, Path]:
    """Two layers: what the tests need, in a virtual environment; and the packages below it."""
    # the last one is for an installation that goes on reading the sources where they are
    requirements = [*declared_requirements(PROJECT, "dev"), "editables"]
    install = f"python3 -m venv {VENV}; {VENV}/bin/pip install --quiet {shlex.join(requirements)}"
    with cache.lock():
        root = find_root(cache, "fast-tests", release, PACKAGES)
        wheels = find_wheels(cache, release, requirements, "wheels-dev")

        def build(folder: Path) -> None:
            cache.say("  a virtual environment")
            with tempfile.TemporaryDirectory(prefix="gpuswitch-wheels-") as layer:
                shutil.copytree(wheels, Path(layer) / WHEELS)
                settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"/{WHEELS}", "PIP_ROOT_USER_ACTION": "ignore"}
                run_on_top([Path(layer), root], folder, install, env=settings)

        key = content_key(root.parent.name, wheels.name, install, Path(tools.__file__), tools.OVERLAY)
        return cache.make(f"venv-{release.name}", key, build), root


@contextmanager
def tree() -> Iterator[Path]:
    """A layer with a copy of this tree."""
    with tempfile.TemporaryDirectory(prefix="gpuswitch-tree-") as layer:
        shutil.copytree(PROJECT, Path(layer) / TREE, ignore=LEFT_OUT)
        Path(layer).chmod(0o755)
        yield Path(layer)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    try:
        release = find_release(os.environ.get("RELEASE", "bookworm"))
        require_tools("system")
        require_root()
        layers = find_systems(Cache(default_folder(), say), release)
    except HarnessError as error:
        say(str(error))
        return 1
    install = f"{VENV}/bin/pip install --quiet --no-index --no-deps --no-build-isolation --editable ."
    pytest = f"{VENV}/bin/python -m pytest {shlex.join(sys.argv[1:])}"
    with tree() as copy:
        return show_on_top(
            [copy, *layers],
            f"systemd-machine-id-setup; cd /{TREE}; {VENV}/bin/python --version; {install}; {pytest}",
            env={"LANG": "C.UTF-8", "HOME": "/root", "PIP_ROOT_USER_ACTION": "ignore"},
        )


if __name__ == "__main__":
    sys.exit(main())
