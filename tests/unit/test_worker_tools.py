"""Modules that leave, and nvidia's persistence mode: by programs that are shell scripts here.

The answers are kmod's own (tools/rmmod.c, version 30) and nvidia-smi's.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from gpuswitch.host.linux.kernel import LinuxKernel
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import GPU, refused


async def test_one_module_is_unloaded_and_no_other(tree: Tree, kernel: LinuxKernel, tmp_path: Path) -> None:
    """By rmmod, since `modprobe -r` goes on; with an environment of its own, and nothing that it could hold open."""
    module = tree.loaded("i2c_nvidia_gpu", 0)
    tree.tool(
        "rmmod",
        f'echo "$* $(readlink /proc/self/fd/0)" > {tmp_path}/seen; ls /proc/self/fd > {tmp_path}/open; '
        f"rm {module}/initstate",
    )
    await kernel.unload("i2c-nvidia-gpu")
    assert (tmp_path / "seen").read_text() == "i2c-nvidia-gpu /dev/null\n"
    assert (tmp_path / "open").read_text().split() == ["0", "1", "2", "3"]  # 3 is the folder that ls reads


async def test_a_module_that_is_not_loaded_is_not_unloaded(tree: Tree, kernel: LinuxKernel) -> None:
    """Nor one that is built in, which has a folder."""
    (tree.sys / "module/xhci_pci").mkdir()
    await kernel.unload("xhci_pci")
    await kernel.unload("nouveau")


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("rmmod: ERROR: Module nouveau is in use by: nvidia_uvm nvidia_modeset", errno.EAGAIN),
        ("rmmod: ERROR: Module nouveau is in use", errno.EAGAIN),
        ("rmmod: ERROR: could not remove module nouveau: Resource temporarily unavailable", errno.EAGAIN),
        ("rmmod: ERROR: could not remove module nouveau: Device or resource busy", errno.EBUSY),
        ("rmmod: ERROR: could not remove module nouveau: Operation not permitted", errno.EPERM),
    ],
)
async def test_a_module_that_stays(tree: Tree, kernel: LinuxKernel, said: str, number: int) -> None:
    tree.loaded("nouveau", 1)
    tree.tool("rmmod", f'echo "{said}" >&2; exit 1')
    error = await refused(kernel.unload("nouveau"))
    assert (error.errno, str(error)) == (number, f"cannot unload nouveau: rmmod ended with status 1: {said}")


async def test_a_module_that_somebody_else_unloaded_first(tree: Tree, kernel: LinuxKernel) -> None:
    state = tree.loaded("nouveau", 0) / "initstate"
    tree.tool("rmmod", f'rm {state}; echo "rmmod: ERROR: Module nouveau is not currently loaded" >&2; exit 1')
    await kernel.unload("nouveau")


async def test_an_unload_that_does_not_return(tree: Tree, kernel: LinuxKernel, tmp_path: Path) -> None:
    """It is rmmod that sits in the kernel, and the worker that is found again."""
    tree.loaded("nvidia", 0)
    for name in ("started", "go_on"):
        os.mkfifo(tmp_path / name)
    tree.tool("rmmod", f"echo $$ >{tmp_path}/started; read line <{tmp_path}/go_on")
    unloading = asyncio.create_task(kernel.unload("nvidia"))
    pid = int(await asyncio.to_thread((tmp_path / "started").read_text))
    pending = kernel.pending
    assert pending is not None
    assert pending.worker is not None
    assert (pending.what, pending.pid) == ("unload nvidia", pid)
    assert pending.worker.pid != pid
    await asyncio.to_thread((tmp_path / "go_on").write_text, "now\n")
    await unloading
    assert kernel.pending is None


async def test_what_is_no_module_is_not_unloaded(tree: Tree, kernel: LinuxKernel) -> None:
    tree.tool("rmmod", "exit 1")
    for name in ("-f", "../nvidia", "nvidia\n", "", "nvidia drm"):
        assert (await refused(kernel.unload(name))).errno == errno.EINVAL, name


NVIDIA_SMI = f"""
case "$*" in
"-i {GPU} --query-gpu=persistence_mode --format=csv,noheader") cat $0.mode ;;
"-i {GPU} -pm 0") echo Disabled > $0.mode ;;
"-i {GPU} -pm 1") echo Enabled > $0.mode ;;
*) echo "unexpected: $*"; exit 3 ;;
esac
"""


async def test_persistence_mode(tree: Tree, kernel: LinuxKernel) -> None:
    tree.tool("nvidia-smi", NVIDIA_SMI)
    await kernel.set_persistence(GPU, on=True)
    assert await kernel.persistence(GPU) is True
    await kernel.set_persistence(GPU, on=False)
    assert await kernel.persistence(GPU) is False


async def test_nobody_to_ask_for_the_persistence_mode(kernel: LinuxKernel) -> None:
    assert await kernel.persistence(GPU) is None
    error = await refused(kernel.set_persistence(GPU, on=True))
    assert error.errno == errno.ENOENT
    assert "there is no nvidia-smi in " in str(error)


@pytest.mark.parametrize("status", [0, 6])
async def test_no_answer_is_no_persistence_mode(tree: Tree, kernel: LinuxKernel, status: int) -> None:
    """Its first line is the reason, the others are advice; and `[N/A]` is no mode."""
    said = "No devices were found" if status else "[N/A]"
    tree.tool("nvidia-smi", f'echo; echo "{said}"; echo "See the manual."; exit {status}')
    error = await refused(kernel.persistence(GPU))
    said = f"nvidia-smi ended with status 6: {said}" if status else f"nvidia-smi says '{said}'"
    assert (error.errno, str(error)) == (errno.EIO, f"cannot read the persistence mode of {GPU}: {said}")
