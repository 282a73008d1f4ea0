"""What the guides have people type on Debian, before there is a virtual machine."""

from __future__ import annotations

import pytest

from tests.harness.containers.container import Container
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.packages import check_installable
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.pages import typed_where
from tests.real_system.conftest import RELEASE


def test_apt_finds_the_packages(request: pytest.FixtureRequest) -> None:
    lines = [command.split() for block in typed_where("debian, packages") for command, _ in block.commands]
    assert {tuple(words[:2]) for words in lines} == {("apt", "install")}
    packages = sorted({package for words in lines for package in words[2:]})
    check_installable(Cache(default_folder(), progress(request.config)), find_release(RELEASE), packages)


def test_the_iommu_is_added_to_the_kernel_command_line(machine: Container) -> None:
    """As grub-mkconfig reads it: /etc/default/grub first, then /etc/default/grub.d/*.cfg."""
    [block] = typed_where("debian, grub")
    (write, _), *then = block.commands
    assert [command for command, _ in then] == ["update-grub", "reboot"]
    machine.sh(f"mkdir -p /etc/default/grub.d; {write}\n")
    read = "GRUB_CMDLINE_LINUX=quiet; for each in /etc/default/grub.d/*.cfg; do . $each; done; echo $GRUB_CMDLINE_LINUX"
    assert machine.sh(read).stdout == "quiet intel_iommu=on\n"
