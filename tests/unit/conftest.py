"""Settings of hypothesis for the unit tests, and a worker on a made-up sysfs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import settings

from gpuswitch.cli.translate import speak
from gpuswitch.host.linux.kernel import LinuxKernel
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import GPU, fill

# The same examples each run, and none of them fails because the machine is busy.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def english() -> None:
    """Whatever language the environment asks for."""
    speak("en")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    fill(tree)
    return tree


@pytest.fixture
async def kernel(tree: Tree) -> AsyncIterator[LinuxKernel]:
    kernel = LinuxKernel(str(GPU), tree.roots)
    yield kernel
    await kernel.close()
