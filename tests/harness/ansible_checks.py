"""Ansible's own checks of the collection, `make ansible-check`: ansible-test sanity of two releases, and ansible-lint.

They come from PyPI, minutes the first time, and are kept beside what other tests keep.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.harness.debian.cache import default_folder
from tests.harness.debian.tools import PROJECT

FOLDER = default_folder() / "ansible-check"
COLLECTION = PROJECT / "contrib/ansible"
PYTHON = "3.11"
"""The one that both releases run on."""

BOOTSTRAP = """\
import runpy, subprocess, sys
subprocess.run([sys.executable, "-m", "ensurepip", "--default-pip"], check=True, stdout=subprocess.DEVNULL)
left_out = ("--no-setuptools", "--no-wheel")
sys.argv[1:] = ["install", "--upgrade", *(word for word in sys.argv[1:] if word not in left_out)]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""In the place of the script that ansible-test downloads from a host of its own: pip out of Python and PyPI."""


@dataclass(frozen=True)
class Release:
    """An ansible-core: its version, the pip that its ansible-test wants, and what else is installed beside it."""

    version: str
    pip: str
    more: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / self.version


RELEASES = (Release("2.14.18", "21.3.1"), Release("2.19.14", "24.2", ("ansible-lint==26.10.1",)))
"""The oldest that the collection is for, and the newest that this Python runs."""


def main() -> int:
    if "{}.{}".format(*sys.version_info) != PYTHON:
        print(f"cannot check the collection: ansible-core 2.14 and 2.19 need Python {PYTHON}", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    return max(map(check, RELEASES))


def check(release: Release) -> int:
    """The exit status: 0 where nothing is complained of."""
    prepare(release)
    # In no checkout: ansible-test passes over files that git does not know.
    with tempfile.TemporaryDirectory(prefix="gpuswitch-collection-") as folder:
        copy = Path(folder) / "ansible_collections/gpuswitch/gpuswitch"
        shutil.copytree(COLLECTION, copy, ignore=shutil.ignore_patterns("__pycache__"))
        env = {
            # not what this shell has set for Ansible
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "HOME": str(release.folder / "home"),
            "PATH": f"{release.folder / 'bin'}:/usr/bin:/bin",
            "ANSIBLE_COLLECTIONS_PATH": folder,
        }
        commands = [["ansible-test", "sanity", "--python", PYTHON]]
        if release.more:
            commands.append(["ansible-lint", "--offline"])
        return max(subprocess.run(command, cwd=copy, env=env, check=False).returncode for command in commands)


def prepare(release: Release) -> None:
    wanted = [f"ansible-core=={release.version}", *release.more]
    stamp = release.folder / "has"
    if stamp.exists() and stamp.read_text().split() == wanted:
        return
    shutil.rmtree(release.folder, ignore_errors=True)
    # a real Python: ansible-test takes none that a program such as pyenv stands before
    base = Path(sys.base_prefix) / f"bin/python{PYTHON}"
    subprocess.run([base, "-m", "venv", release.folder], check=True)
    subprocess.run([release.folder / "bin/pip", "install", "--quiet", *wanted], check=True)
    script = release.folder / f"home/.ansible/test/cache/get_pip_{release.pip.replace('.', '_')}.py"
    script.parent.mkdir(parents=True)
    script.write_text(BOOTSTRAP)
    stamp.write_text("\n".join(wanted))


if __name__ == "__main__":
    sys.exit(main())
