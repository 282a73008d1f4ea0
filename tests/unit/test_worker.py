"""The life of a worker process: waiting, abandoned, dying, let go. A FIFO makes its write wait, as the kernel would."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpuswitch.host.linux import kernel as kernel_module
from gpuswitch.host.linux.kernel import LinuxKernel
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import AUDIO, GPU, refused


async def gone(pid: int) -> None:
    """Wait until a process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    await ended.wait()
    loop.remove_reader(descriptor)
    os.close(descriptor)


def kill_unseen(pid: int) -> None:
    """Kill a process and see its end, without a turn of the loop."""
    descriptor = os.pidfd_open(pid)
    os.kill(pid, 9)
    select.select([descriptor], [], [])
    os.close(descriptor)


async def sent(kernel: LinuxKernel) -> None:
    """Let a call that was just created get as far as the worker's socket."""
    await asyncio.sleep(0)
    assert kernel.pending is not None


def is_process(pid: int) -> bool:
    """Also a dead one that nobody reaped."""
    return Path(f"/proc/{pid}").exists()


def descriptors(pid: int) -> dict[int, str]:
    return {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def pid_of(kernel: LinuxKernel) -> int:
    assert kernel._worker is not None
    return kernel._worker.pid


class Blocked:
    """An unbind whose write waits, since nobody reads the FIFO; the kernel's own waits look the same from outside."""

    def __init__(self, tree: Tree) -> None:
        self.fifo = tree.sys / "bus/pci/drivers/nvidia/unbind"
        self.fifo.unlink()
        os.mkfifo(self.fifo)

    async def release(self) -> str:
        """Let the write return; gives what was written."""
        reader = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(reader, readable.set)
        await readable.wait()
        loop.remove_reader(reader)
        written = os.read(reader, 100).decode()
        os.close(reader)
        return written


@asynccontextmanager
async def abandoned(kernel: LinuxKernel) -> AsyncIterator[None]:
    """An unbind that waits in the kernel, and whose caller went away."""
    call = asyncio.create_task(kernel.unbind(GPU, "nvidia"))
    await sent(kernel)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    yield


async def test_a_group_is_held_until_it_is_released(tree: Tree, kernel: LinuxKernel) -> None:
    tree.node("vfio/15")

    def held() -> bool:
        return str(tree.dev / "vfio/15") in descriptors(pid_of(kernel)).values()

    error = await refused(kernel.hold_group(16))
    assert (error.errno, error.subject) == (errno.ENOENT, "/dev/vfio/16")
    await kernel.hold_group(15)
    await kernel.hold_group(15)
    assert held()
    await kernel.release_group(15)
    await kernel.release_group(15)
    assert not held()


async def test_nothing_is_unbound_after_a_held_group_got_lost(tree: Tree, kernel: LinuxKernel) -> None:
    """Somebody may have opened it since, and the unbind would wait for them."""
    tree.node("vfio/15")
    await kernel.hold_group(15)
    assert kernel._worker is not None
    lost = kernel._worker
    os.kill(lost.pid, 9)
    await lost.gone.wait()
    assert (await refused(kernel.unbind(GPU, "nvidia"))).errno == errno.EIO
    await kernel.set_override({GPU: None})
    await kernel.release_group(15)
    await kernel.unbind(GPU, "nvidia")


async def test_nothing_is_unbound_when_a_held_group_gets_lost_right_before(tree: Tree, kernel: LinuxKernel) -> None:
    tree.node("vfio/15")
    await kernel.hold_group(15)
    kill_unseen(pid_of(kernel))
    assert (await refused(kernel.unbind(GPU, "nvidia"))).errno in {errno.EIO, errno.EPIPE}
    assert (tree.sys / "bus/pci/drivers/nvidia/unbind").read_text() == ""


async def test_an_abandoned_operation_stays_pending(tree: Tree, kernel: LinuxKernel) -> None:
    blocked = Blocked(tree)
    async with abandoned(kernel):
        pending = kernel.pending
        assert pending is not None
        assert pending.what == f"unbind {GPU} from nvidia"
        assert pending.pid == pid_of(kernel)
        assert pending.process_state in {"R", "S", "D"}
        error = await refused(kernel.probe(AUDIO))
        assert error.errno == errno.EBUSY
        assert pending.what in str(error)
        returned = asyncio.create_task(kernel.returned())
        await asyncio.sleep(0)
        assert not returned.done()
        assert await blocked.release() == str(GPU)
        await returned
    assert kernel.pending is None


async def test_a_late_reply_is_nobody_elses(tree: Tree, kernel: LinuxKernel) -> None:
    blocked = Blocked(tree)
    async with abandoned(kernel):
        pid = pid_of(kernel)
        await blocked.release()
        await kernel.returned()
    assert list(await kernel.capture([AUDIO])) == [AUDIO]
    assert pid_of(kernel) == pid


async def test_a_worker_that_dies_in_an_operation(tree: Tree, kernel: LinuxKernel) -> None:
    Blocked(tree)
    call = asyncio.create_task(kernel.unbind(GPU, "nvidia"))
    await sent(kernel)
    dead = pid_of(kernel)
    os.kill(dead, 9)
    error = await refused(call)
    assert (error.errno, str(error)) == (errno.EIO, f"cannot unbind {GPU} from nvidia: its worker died of signal 9")
    assert kernel.pending is None
    assert list(await kernel.capture([GPU])) == [GPU]
    assert not is_process(dead)


async def test_a_worker_that_dies_in_an_abandoned_operation(tree: Tree, kernel: LinuxKernel) -> None:
    Blocked(tree)
    async with abandoned(kernel):
        os.kill(pid_of(kernel), 9)
        await kernel.returned()
    assert kernel.pending is None
    await kernel.probe(GPU)


async def test_a_worker_that_died_idle_is_replaced(kernel: LinuxKernel) -> None:
    """Whether or not the loop had a turn to tell us."""
    kernel.prepare()
    first = pid_of(kernel)
    kill_unseen(first)
    await kernel.probe(GPU)
    assert pid_of(kernel) != first
    assert kernel._worker is not None
    second = kernel._worker
    os.kill(second.pid, 9)
    await second.gone.wait()
    await kernel.probe(GPU)
    assert pid_of(kernel) not in {first, second.pid}


async def test_a_worker_is_started_once_and_reused(kernel: LinuxKernel) -> None:
    kernel.prepare()
    first = pid_of(kernel)
    kernel.prepare()
    await kernel.probe(GPU)
    await kernel.probe(AUDIO)
    assert pid_of(kernel) == first


async def test_an_idle_worker_goes_when_the_host_closes(kernel: LinuxKernel) -> None:
    kernel.prepare()
    pid = pid_of(kernel)
    await kernel.close()
    assert not is_process(pid)
    await kernel.close()


async def test_close_does_not_wait_for_a_worker_that_the_kernel_has(tree: Tree, kernel: LinuxKernel) -> None:
    """It ends by itself when the kernel lets it be."""
    blocked = Blocked(tree)
    async with abandoned(kernel):
        pid = pid_of(kernel)
        await kernel.close()
        assert kernel.pending is not None
        assert await blocked.release() == str(GPU)
        await gone(pid)
        await kernel.returned()


async def test_a_worker_has_no_descriptor_but_its_socket(tree: Tree, kernel: LinuxKernel) -> None:
    """What it inherits it would keep open for as long as the kernel has it."""
    with socket.socket() as ours:
        os.set_inheritable(ours.fileno(), True)
        await kernel.probe(GPU)
        has = descriptors(pid_of(kernel))
    assert has.pop(0).startswith("socket:")
    assert has == {1: "/dev/null", 2: "/dev/null"}


async def test_a_worker_is_in_a_session_of_its_own(kernel: LinuxKernel) -> None:
    """So that a terminal's ^C, meant for the daemon, does not reach it."""
    await kernel.probe(GPU)
    assert os.getsid(pid_of(kernel)) == pid_of(kernel)


async def test_a_program_that_talks_nonsense_is_let_go(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nonsense.py"
    program.write_text("import os\nos.read(0, 100)\nos.write(0, b'7\\0perhaps')\nos.read(0, 100)\n")
    monkeypatch.setattr(kernel_module, "_PROGRAM", program)
    kernel = LinuxKernel(str(GPU), tree.roots)
    kernel.prepare()
    pid = pid_of(kernel)
    error = await refused(kernel.probe(GPU))
    assert (error.errno, error.message) == (errno.EIO, "its worker said something that is no answer")
    assert kernel.pending is None
    await gone(pid)
    await kernel.close()


async def test_a_program_that_cannot_start(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    kernel = LinuxKernel(str(GPU), tree.roots)
    kernel.prepare()
    error = await refused(kernel.probe(GPU))
    assert error.errno == errno.ENOENT
    assert "its worker cannot be started or reached" in str(error)
    await kernel.close()


async def test_a_program_that_ends_at_once(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "_PROGRAM", tmp_path / "no-such-program.py")
    kernel = LinuxKernel(str(GPU), tree.roots)
    error = await refused(kernel.probe(GPU))
    # It may have ended before the request was sent, or after.
    assert error.errno in {errno.EIO, errno.EPIPE}
    assert error.message in {
        "its worker ended with status 2",
        "its worker cannot be started or reached: Broken pipe",
    }
    await kernel.close()
