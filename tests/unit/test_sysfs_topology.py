"""A look at what is not just a card in a slot, over a fake sysfs."""

from __future__ import annotations

from pathlib import Path

from gpuswitch.host.linux.sysfs import Sysfs
from tests.unit.parts import at
from tests.unit.sysfs_tree import Tree

GPU = "0000:01:00.0"


def test_an_accelerator_has_nodes_of_two_classes(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.function(GPU, class_code="120000", driver="amdgpu")
    for place, number in (("drm/card0", "226:0"), ("accel/accel3", "261:3")):
        tree.class_device(GPU, place, number)
    tree.node("dri/card0")
    tree.node("accel/accel3")
    seen = Sysfs(tree.roots).look().functions[at(GPU)]
    assert (seen.kind, seen.nodes) == ("accelerator", ("/dev/accel/accel3", "/dev/dri/card0"))
