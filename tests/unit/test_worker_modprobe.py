"""Modules, by a modprobe that is a shell script here: what the worker asks of it, and makes of its answers.

The answers are kmod's own (tools/modprobe.c, version 30).
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import Candidate
from tests.harness.sysfs_tree import Tree

GPU = PciAddress.parse("0000:01:00.0")
MODALIAS = "pci:v000010DEd00002484sv00001043sd000087C1bc03sc00i00"

# What `modprobe -R` prints for the alias, and `modprobe -D -b` for each of those.
LOOKUP = f"""
case "$*" in
"-R {MODALIAS}") printf 'nvidiafb\\nnouveau\\nnvidia_vgpu_vfio\\nnvidia_current_drm\\nnvidia\\nradeon\\nnouveau\\n' ;;
"-D -b nvidiafb") ;;
"-D -b nouveau")
    echo 'insmod /lib/modules/6.1.0/kernel/drivers/gpu/drm/drm.ko '
    echo 'insmod /lib/modules/6.1.0/kernel/drivers/gpu/drm/nouveau/nouveau.ko.xz modeset=1' ;;
"-D -b nvidia_current_drm")
    echo 'insmod /lib/modules/6.1.0/updates/dkms/nvidia-current.ko '
    echo 'install modprobe nvidia ; modprobe -i nvidia-current-modeset $CMDLINE_OPTS '
    echo 'insmod /lib/modules/6.1.0/updates/dkms/nvidia-current-drm.ko modeset=1' ;;
"-D -b nvidia") echo 'install modprobe -i nvidia-current $CMDLINE_OPTS ' ;;
"-D -b radeon") echo 'install /bin/false ' ;;
*) echo "unexpected: $*" >&2; exit 3 ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    tree.function(str(GPU))
    return tree


async def test_candidates_leave_out_what_would_not_be_loaded(tree: Tree, kernel: LinuxKernel) -> None:
    """Here nvidiafb is blacklisted, and radeon's install command is `false`; vfio's modules are never host drivers."""
    tree.tool("modprobe", LOOKUP)
    assert await kernel.candidates(GPU) == (
        Candidate("nouveau", frozenset({"drm"})),
        Candidate("nvidia_current_drm", frozenset({"nvidia_current"})),
        Candidate("nvidia"),
    )


async def test_loadable(tree: Tree, kernel: LinuxKernel) -> None:
    tree.tool("modprobe", LOOKUP)
    asked = ("nvidiafb", "nouveau", "nvidia_current_drm", "nvidia", "radeon", "nobody")
    assert await kernel.loadable(asked) == ("nouveau", "nvidia_current_drm", "nvidia")


BY_NAME = """
case "$*" in
"-D nvidia") echo 'install modprobe -i nvidia-current $CMDLINE_OPTS ' ;;
"-D nvidia_old") echo 'insmod /lib/modules/6.1.0/updates/dkms/nvidia-390.ko ' ;;
"-D radeon") echo 'install /bin/false ' ;;
"-D odd") echo 'modprobe: ERROR: something else' >&2; exit 1 ;;
*) echo "modprobe: FATAL: Module $2 not found in directory /lib/modules/6.1.0" >&2; exit 1 ;;
esac
"""


async def test_what_is_found_by_name(tree: Tree, kernel: LinuxKernel) -> None:
    """Whether it is blacklisted is not asked; what cannot be told counts as there."""
    tree.tool("modprobe", BY_NAME)
    asked = ("nvidia", "nvidia_old", "radeon", "odd", "nobody")
    assert await kernel.loadable(asked, by_name=True) == ("nvidia", "nvidia_old", "odd")


async def test_no_candidates(tree: Tree, kernel: LinuxKernel) -> None:
    tree.tool(
        "modprobe", f"echo 'modprobe: FATAL: Module {MODALIAS} not found in directory /lib/modules/6.1.0' >&2; exit 1"
    )
    assert await kernel.candidates(GPU) == ()


async def test_a_modprobe_that_fails_is_not_one_that_found_nothing(tree: Tree, kernel: LinuxKernel) -> None:
    tree.tool("modprobe", "echo 'modprobe: ERROR: could not open moddep file: No such file or directory' >&2; exit 1")
    with pytest.raises(
        KernelError, match=f"cannot find the modules for {GPU}: modprobe ended with status 1: "
    ) as error:
        await kernel.candidates(GPU)
    assert error.value.errno == errno.ENOENT


async def test_load(tree: Tree, kernel: LinuxKernel, tmp_path: Path) -> None:
    """Fixed arguments, an environment of its own, and nothing that it could read from or hold open."""
    tree.tool(
        "modprobe",
        f'cat; echo "$* options=$MODPROBE_OPTIONS input=$(readlink /proc/self/fd/0)" > {tmp_path}/seen; '
        f"ls /proc/self/fd > {tmp_path}/open",
    )
    await kernel.load("vfio_pci")
    assert (tmp_path / "seen").read_text() == "vfio_pci options= input=/dev/null\n"
    assert (tmp_path / "open").read_text().split() == ["0", "1", "2", "3"]  # 3 is the folder that ls reads


async def test_a_module_that_is_there_is_not_loaded_again(tree: Tree, kernel: LinuxKernel) -> None:
    tree.driver("vfio-pci", "vfio_pci")
    await kernel.load("vfio-pci")


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("modprobe: FATAL: Module nobody not found in directory /lib/modules/6.1.0", errno.ENOENT),
        ("modprobe: ERROR: could not insert 'nobody': No such device", errno.ENODEV),
        ("modprobe: ERROR: could not insert 'nobody': Operation not permitted", errno.EPERM),
        ("modprobe: ERROR: could not insert 'nobody': something that no errno says", errno.EIO),
    ],
)
async def test_a_module_that_cannot_be_loaded(tree: Tree, kernel: LinuxKernel, said: str, number: int) -> None:
    tree.tool("modprobe", f'echo "a warning" >&2; echo "{said}" >&2; exit 1')
    with pytest.raises(KernelError) as error:
        await kernel.load("nobody")
    assert error.value.errno == number
    assert str(error.value) == f"cannot load nobody: modprobe ended with status 1: {said}"


async def test_whoever_keeps_modprobes_output_open_is_not_waited_for(tree: Tree, kernel: LinuxKernel) -> None:
    """An install command may start something that stays."""
    tree.tool("modprobe", "sleep 600 & echo $! >&2; exit 1")
    with pytest.raises(KernelError, match="modprobe ended with status 1") as error:
        await kernel.load("nobody")
    os.kill(int(error.value.message.rpartition(" ")[2]), signal.SIGKILL)  # fails if it is not there any more


async def test_a_modprobe_that_does_not_return_is_the_one_that_sits_in_the_kernel(
    tree: Tree, kernel: LinuxKernel, tmp_path: Path
) -> None:
    """Not the worker, which waits for it: what people need to see is what the module's own code waits for."""
    for name in ("started", "go_on"):
        os.mkfifo(tmp_path / name)
    tree.tool("modprobe", f"echo $$ >{tmp_path}/started; read line <{tmp_path}/go_on")
    loading = asyncio.create_task(kernel.load("nvidia"))
    pid = int(await asyncio.to_thread((tmp_path / "started").read_text))
    assert kernel.pending is not None
    assert (kernel.pending.what, kernel.pending.pid) == ("load nvidia", pid)
    await asyncio.to_thread((tmp_path / "go_on").write_text, "now\n")
    await loading
    assert kernel.pending is None


async def test_there_is_no_modprobe(kernel: LinuxKernel) -> None:
    with pytest.raises(KernelError, match="cannot load nobody: there is no modprobe in ") as error:
        await kernel.load("nobody")
    assert error.value.errno == errno.ENOENT
