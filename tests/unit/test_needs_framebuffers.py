"""Who may have a GPU open by the firmware's frame buffer, whatever driver it is on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuswitch.model.facts import BootFramebuffer, HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.policy import ModulePolicy
from gpuswitch.switch.planning.requirements import boot_framebuffers, bound_drivers, everything, query
from tests.harness.facts import VGA, at, facts, function

GPU = Gpu(at("0000:01:00.0"), (at("0000:01:00.0"),))
OWN = BootFramebuffer("simple-framebuffer.0", "simple-framebuffer", GPU.address, ("dri/card0", "fb0"))
OTHERS = BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", at("0000:02:00.0"), ("fb1",))


def host(on: str | None) -> HostFacts:
    seen = facts([function("0000:01:00.0", VGA, on, group=7), function("0000:02:00.0", VGA, group=8)])
    return replace(seen, boot_framebuffers=(OWN, OTHERS))


def test_those_in_its_own_memory() -> None:
    assert boot_framebuffers(GPU, host(None)) == (OWN,)


@pytest.mark.parametrize("on", [None, "vfio-pci", "amdgpu"])
def test_their_nodes_are_looked_for(on: str | None) -> None:
    """And on no host driver, for a machine that has it by hand, which no steps of ours would tell."""
    seen = host(on)
    nodes = query(GPU, seen, bound_drivers(GPU, seen, ModulePolicy.AUTO)).nodes
    assert {"dri/card0", "fb0"} <= {*nodes}
    assert "fb1" not in nodes
    assert ("vfio/7" in nodes) is (on != "amdgpu")
    assert {*nodes, "vfio/7"} == {*everything(GPU, seen).nodes}
