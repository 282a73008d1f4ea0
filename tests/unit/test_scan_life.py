"""The life of a scanner: waiting, abandoned, dying, let go. What is said to processes, and what is heard of them."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.host.linux.worker import Worker
from gpuswitch.model.holders import Holder, HolderQuery, Process
from tests.harness.scans import FULL, NOBODYS, OPEN, Proc, processes, program, threads
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import GPU, refused
from tests.unit.test_worker import gone, is_process, kill_unseen

QUERY = HolderQuery((GPU,))
NOBODY = Holder(None, "nvidia", doubt="module nvidia has 1 user that no process explains")


@pytest.fixture
async def scanner(tree: Tree) -> AsyncIterator[LinuxProcesses]:
    scanner = processes(tree)
    yield scanner
    await scanner.close()


class Stuck:
    """A `dev` that a scan waits for, as it would for a server that is dead: nothing comes from this FIFO."""

    def __init__(self, tree: Tree) -> None:
        tree.class_device(str(GPU), "drm/card0", FULL)
        self._path = tree.path(str(GPU)) / "drm/card0/dev"
        self._path.unlink()
        os.mkfifo(self._path)
        self._end = os.open(self._path, os.O_RDWR)

    def release(self) -> None:
        """Who waits reads nothing at last; who comes later finds a file."""
        plain = self._path.with_name("plain")
        plain.write_text(f"{FULL}\n")
        plain.rename(self._path)
        os.close(self._end)


async def begin(scanner: LinuxProcesses) -> asyncio.Task[object]:
    """A scan that was asked for."""
    before = set(scanner._looks)
    task = asyncio.create_task(scanner.scan(QUERY))
    await asyncio.sleep(0)
    assert set(scanner._looks) - before
    return task


async def abandon(scanner: LinuxProcesses) -> Worker:
    task = await begin(scanner)
    [worker] = scanner._looks
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    return worker


async def test_one_scanner_is_kept(scanner: LinuxProcesses) -> None:
    await scanner.scan(QUERY)
    first = scanner._idle
    await scanner.scan(QUERY)
    assert scanner._idle is first
    tasks = [await begin(scanner), await begin(scanner)]
    workers = set(scanner._looks)
    assert first in workers
    await asyncio.gather(*tasks)
    [other] = workers - {scanner._idle}
    await other.gone.wait()
    assert scanner._idle is not None
    pid = scanner._idle.pid
    await scanner.close()
    assert not is_process(pid)


async def test_a_scan_that_does_not_return(scanner: LinuxProcesses, tree: Tree) -> None:
    """It is abandoned and left alone, and ends when it returns."""
    stuck = Stuck(tree)
    workers = [await abandon(scanner) for _ in range(4)]
    assert all(is_process(worker.pid) for worker in workers)
    error = await refused(scanner.scan(QUERY))
    assert error.errno == errno.EBUSY
    assert str(error) == "cannot look for holders: 4 earlier looks have not returned"
    stuck.release()
    for worker in workers:
        await worker.gone.wait()
    assert (await scanner.scan(QUERY)).numbers == (f"c{FULL}",)


async def test_nobody_waits_at_the_end_for_a_scan_that_does_not_return(scanner: LinuxProcesses, tree: Tree) -> None:
    stuck = Stuck(tree)
    worker = await abandon(scanner)
    task = await begin(scanner)
    await scanner.close()
    stuck.release()
    await worker.gone.wait()
    assert (await refused(task)).errno == errno.EIO


async def test_a_scanner_that_dies_at_work(scanner: LinuxProcesses, tree: Tree) -> None:
    stuck = Stuck(tree)
    task = await begin(scanner)
    [worker] = scanner._looks
    os.kill(worker.pid, 9)
    error = await refused(task)
    assert error.errno == errno.EIO
    assert str(error) == "cannot look for holders: the scanner died of signal 9"
    stuck.release()
    assert (await scanner.scan(QUERY)).numbers == (f"c{FULL}",)


@pytest.mark.parametrize("seen", [True, False])
async def test_a_scanner_that_died_idle(scanner: LinuxProcesses, seen: bool) -> None:
    await scanner.scan(QUERY)
    assert scanner._idle is not None
    pid = scanner._idle.pid
    if seen:
        os.kill(pid, 9)
        await gone(pid)
    else:
        kill_unseen(pid)
    await scanner.scan(QUERY)
    assert scanner._idle.pid != pid


async def test_a_scan_that_cannot_be_done(tree: Tree, tmp_path: Path) -> None:
    scanner = LinuxProcesses(tree.roots.__class__(str(tree.sys), "/dev", proc=str(tmp_path / "nothing")))
    error = await refused(scanner.scan(QUERY))
    assert error.errno == errno.ENOENT
    assert str(error) == f"cannot look for holders: {tmp_path}/nothing: No such file or directory"
    await scanner.close()


async def test_a_request_that_is_too_long(scanner: LinuxProcesses) -> None:
    error = await refused(scanner.scan(HolderQuery((), numbers=("c1:7",) * 100_000)))
    assert error.errno == errno.EMSGSIZE
    await scanner.scan(QUERY)


async def test_an_answer_of_many_messages(tree: Tree, tmp_path: Path) -> None:
    proc = Proc(tmp_path)
    pids = range(NOBODYS, NOBODYS + 400)
    for pid in pids:
        folder = proc.process(pid, "x" * 500)
        (folder / "fd/3").symlink_to("/dev/full")
    scanner = LinuxProcesses(tree.roots.__class__(str(tree.sys), "/dev", proc=str(proc.root)))
    holders = (await scanner.scan(HolderQuery((), nodes=("full",)))).holders
    assert [holder.pid for holder in holders] == list(pids)
    assert {holder.nodes for holder in holders} == {("/dev/full",)}
    await scanner.close()


async def test_a_signal(scanner: LinuxProcesses) -> None:
    with program(OPEN) as person:
        process = procfs.process(person.pid)
        assert process is not None
        assert not scanner.signal(Process(process.pid, process.started - 1), SIGTERM)
        assert person.poll() is None
        assert scanner.signal(process, SIGTERM)
        assert person.wait() == -SIGTERM
    assert not scanner.signal(process, SIGTERM)


async def test_a_signal_to_one_whose_name_is_cut_in_the_middle_of_a_letter(scanner: LinuxProcesses) -> None:
    """The kernel keeps 15 bytes of a name, and a process may choose any."""
    name = "open('/proc/self/comm', 'wb').write('Программа'.encode()[:15]); "
    with program(name + OPEN) as person:
        process = procfs.process(person.pid)
        assert process is not None
        assert scanner.signal(process, SIGTERM)
        assert person.wait() == -SIGTERM


async def test_a_signal_to_a_thread(scanner: LinuxProcesses) -> None:
    """Nobody's number, as processes go."""
    code = "import threading; threading.Thread(target=ready).start()"
    with program(code) as person:
        [thread] = threads(person.pid)
        assert not scanner.signal(Process(thread, 0), SIGUSR1)


async def test_a_signal_that_is_not_allowed(scanner: LinuxProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pidfd: int, _number: int) -> None:
        raise PermissionError(errno.EPERM, "not allowed")

    monkeypatch.setattr("signal.pidfd_send_signal", refuse)
    own = procfs.process(os.getpid())
    assert own is not None
    with pytest.raises(KernelError) as caught:
        scanner.signal(own, SIGTERM)
    assert caught.value.errno == errno.EPERM
    assert str(caught.value) == f"cannot send SIGTERM to process {own.pid}: Operation not permitted"


def holder(pid: int, *nodes: str) -> Holder:
    return Holder(procfs.process(pid), "somebody", nodes=nodes)


async def begun(scanner: LinuxProcesses, *holders: Holder) -> asyncio.Task[None]:
    task = asyncio.create_task(scanner.wait_for_change(holders))
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_a_node_that_is_in_another_dev_tells_nothing_but_its_process_does(scanner: LinuxProcesses) -> None:
    with program(OPEN) as one:
        task = await begun(scanner, holder(one.pid, "/dev/no-such-node"))
        one.kill()
        await task


async def test_stirred_by_an_end(scanner: LinuxProcesses) -> None:
    with program(OPEN) as one, program(OPEN) as other:
        task = await begun(scanner, NOBODY, holder(one.pid), holder(other.pid, "c195:0"))
        other.kill()
        await task
        await scanner.wait_for_change([holder(one.pid), holder(other.pid)])


async def test_stirred_by_a_node_that_is_closed(scanner: LinuxProcesses, tree: Tree) -> None:
    node = tree.dev / "dri/card0"
    tree.node("dri/card0")
    elsewhere = LinuxProcesses(tree.roots)
    with program(OPEN, str(node)) as person:
        assert person.stdin is not None
        task = await begun(elsewhere, holder(person.pid, "/dev/dri/card0"))
        person.stdin.write(b".")
        person.stdin.flush()
        await task
        assert person.poll() is None


async def test_watching_a_node_does_not_open_it(tree: Tree) -> None:
    """Nobody writes to this FIFO: who opens it waits."""
    os.mkfifo(tree.dev / "fifo")
    task = await begun(LinuxProcesses(tree.roots), holder(os.getppid(), "/dev/fifo"))
    task.cancel()


@pytest.mark.parametrize("started", [0, -1])
async def test_stirred_at_once_where_one_is_gone(scanner: LinuxProcesses, started: int) -> None:
    await scanner.wait_for_change([holder(os.getppid()), Holder(Process(os.getpid(), started), "somebody earlier")])


def own_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


async def test_nothing_is_left_open(scanner: LinuxProcesses) -> None:
    before = own_descriptors()
    task = await begun(scanner, holder(os.getppid(), "/dev/full"))
    task.cancel()
    await asyncio.wait([task])
    assert own_descriptors() == before


async def test_any_number_of_holders_takes_a_few_descriptors(scanner: LinuxProcesses) -> None:
    before = own_descriptors()
    task = await begun(scanner, *[holder(os.getppid())] * 500)
    assert len(own_descriptors() - before) < 20
    task.cancel()
    await asyncio.wait([task])
    assert own_descriptors() == before


async def test_who_cannot_watch_says_so(scanner: LinuxProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    one = holder(os.getppid())
    monkeypatch.setattr(os, "pidfd_open", none_left)
    with pytest.raises(KernelError, match=r"^cannot watch the holders: cannot wait for their end: Too many open files"):
        await scanner.wait_for_change([one])
