"""A worker outlives the service that started it, for as long as the kernel has it; the next run finds it again."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.port import Pending
from gpuswitch.model.holders import Process
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import AUDIO, GPU, refused
from tests.unit.test_worker import Blocked, abandoned, gone, pid_of


async def test_an_adopted_operation_is_pending_until_it_returns(tree: Tree, kernel: LinuxKernel) -> None:
    blocked = Blocked(tree)
    async with abandoned(kernel):
        left = kernel.pending
        assert left is not None
        await kernel.close()
        later = LinuxKernel(str(GPU), tree.roots)
        assert later.adopt(left)
        found = later.pending
        assert found is not None
        assert (found.what, found.pid, found.worker) == (left.what, left.pid, left.worker)
        error = await refused(later.probe(AUDIO))
        assert error.errno == errno.EBUSY
        assert left.what in str(error)
        returned = asyncio.create_task(later.returned())
        await asyncio.sleep(0)
        assert not returned.done()
        assert await blocked.release() == str(GPU)
        await returned
        assert later.pending is None
        assert not later.adopt(left)
        await later.probe(AUDIO)
        await later.close()


@pytest.fixture
def dead() -> Iterator[Process]:
    """A process that has ended, and that nobody has reaped."""
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        process = procfs.process(ended.pid)
        assert process is not None
        yield process


async def test_what_is_over_is_not_adopted(kernel: LinuxKernel, dead: Process) -> None:
    """Dead, gone, another of the same number, or a worker that never was."""
    assert not kernel.adopt(Pending("unbind it", worker=dead))
    await asyncio.to_thread(os.waitpid, dead.pid, 0)
    assert not kernel.adopt(Pending("unbind it", worker=dead))
    ours = procfs.process(os.getpid())
    assert ours is not None
    assert not kernel.adopt(Pending("unbind it", worker=replace(ours, started=ours.started - 1)))
    assert not kernel.adopt(Pending("unbind it"))
    assert not kernel.adopt(Pending("unbind it", worker=Process(1 << 40, 1)))
    assert kernel.pending is None
    await kernel.returned()


# The service, in short: it starts a worker, tells who that is, and gives it something to do if it is told what.
SERVICE = """
import asyncio, sys
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.model.address import PciAddress

async def main():
    kernel = LinuxKernel(sys.argv[1], Roots(*sys.argv[3:]))
    gpu = PciAddress.parse(sys.argv[1])
    await kernel.capture([gpu])
    call = asyncio.create_task(getattr(kernel, sys.argv[2])(gpu, "nvidia")) if sys.argv[2] else None
    await asyncio.sleep(0)
    print(kernel._worker.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def killed_service(tree: Tree, operation: str) -> Process:
    """The worker of a service that has died."""
    command = [sys.executable, "-c", SERVICE, str(GPU), operation, *astuple(tree.roots)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        worker = procfs.process(int(service.stdout.readline()))
        service.kill()
    assert worker is not None
    return worker


async def test_an_idle_worker_ends_with_its_service(tree: Tree) -> None:
    worker = await asyncio.to_thread(killed_service, tree, "")
    await gone(worker.pid)


async def test_a_worker_that_the_kernel_has_outlives_its_service(tree: Tree, kernel: LinuxKernel) -> None:
    blocked = Blocked(tree)
    worker = await asyncio.to_thread(killed_service, tree, "unbind")
    assert kernel.adopt(Pending(f"unbind {GPU} from nvidia", worker=worker))
    kernel.prepare()
    assert pid_of(kernel) != worker.pid
    assert (await refused(kernel.probe(GPU))).errno == errno.EBUSY
    assert await blocked.release() == str(GPU)
    await kernel.returned()
    await gone(worker.pid)
    await kernel.probe(GPU)


def test_a_kernel_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root sees it; others cannot read the file."""
    shown = "[<0>] msleep+0x2d/0x40\n[<0>] nv_pci_remove+0x1c9/0x3f0 [nvidia]\n[<0>] unbind_store+0xf6/0x120\n"
    monkeypatch.setattr(procfs, "_read", lambda _, name: {"stack": shown}.get(name, ""))
    assert procfs.stack(1) == ("msleep", "nv_pci_remove", "unbind_store")
    monkeypatch.undo()
    assert procfs.stack(2**22) == ()


def test_a_process_by_another_name(tmp_path: Path) -> None:
    """Its name may hold brackets and spaces, which the fields of its stat are told apart by."""
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "600"]) as process:
        found, state = procfs.process(process.pid), procfs.state(process.pid)
        # Only then does it end, whatever is found: the block waits for it.
        process.kill()
    assert found is not None
    # Seconds with two decimals, and a hundred ticks a second: a float of it may be a hair below the tick.
    booted = round(float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK"))
    assert 0 < found.started <= booted
    assert state in {"R", "S", "D"}
