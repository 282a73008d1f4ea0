"""Who has a device open, by its number: real processes, and real nodes that nobody minds."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.linux.processes import LinuxProcesses
from gpuswitch.model.holders import HolderQuery, unit_and_session
from tests.harness.scans import (
    FULL,
    MAP,
    OPEN,
    THREAD,
    UNSEEN,
    ZERO,
    of,
    own_node,
    processes,
    program,
    wait_for_the_first_thread,
)
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import AUDIO, GPU

CGROUP = Path("/proc/self/cgroup").read_text()


@pytest.fixture
async def scanner(tree: Tree) -> AsyncIterator[LinuxProcesses]:
    tree.class_device(str(GPU), "drm/card0", FULL)
    scanner = processes(tree)
    yield scanner
    await scanner.close()


async def test_a_descriptor(scanner: LinuxProcesses) -> None:
    with program(OPEN, "/dev/full") as person:
        scan = await scanner.scan(HolderQuery((GPU,)))
        [holder] = of(scan, person.pid)
    assert scan.numbers == ("c1:7",)
    assert holder.process is not None
    assert holder.process.started > 0
    assert holder.command.startswith("python")
    assert (holder.uid, holder.nodes, holder.doubt) == (os.getuid(), ("/dev/full",), UNSEEN)
    assert holder.user
    assert (holder.unit, holder.session) == unit_and_session(CGROUP)
    assert of(await scanner.scan(HolderQuery((GPU,))), person.pid) == []


async def test_the_process_is_the_one_that_procfs_knows(scanner: LinuxProcesses) -> None:
    with program(OPEN, "/dev/full") as person:
        [holder] = of(await scanner.scan(HolderQuery((GPU,))), person.pid)
        assert holder.process == procfs.process(person.pid)


async def test_holders_are_in_order(scanner: LinuxProcesses) -> None:
    with program(OPEN, "/dev/full"), program(OPEN, "/dev/full"), program(OPEN, "/dev/full"):
        pids = [holder.pid for holder in (await scanner.scan(HolderQuery((GPU,)))).holders]
    assert pids == sorted(pids)


async def test_somebody_elses_function(scanner: LinuxProcesses) -> None:
    with program(OPEN, "/dev/full") as person:
        scan = await scanner.scan(HolderQuery((AUDIO,)))
    assert scan.numbers == ()
    assert not any(holder.nodes for holder in of(scan, person.pid))


async def test_a_node_with_an_inode_of_its_own(scanner: LinuxProcesses, tmp_path: Path) -> None:
    with program(OPEN, own_node(tmp_path)) as person:
        [holder] = of(await scanner.scan(HolderQuery((GPU,))), person.pid)
    assert holder.nodes == ("/dev/full",)


@pytest.mark.parametrize("address", [0, 0x10000], ids=["high", "low"])
async def test_a_mapping_without_a_descriptor(scanner: LinuxProcesses, tree: Tree, address: int) -> None:
    tree.class_device(str(GPU), "graphics/fb0", ZERO)
    with program(MAP, str(address)) as person:
        [holder] = of(await scanner.scan(HolderQuery((GPU,))), person.pid)
    assert (holder.nodes, holder.doubt) == (() if UNSEEN else ("/dev/zero",), UNSEEN)


async def test_the_card_of_the_boots_frame_buffer(scanner: LinuxProcesses, tree: Tree) -> None:
    """simpledrm's, efidrm's: what is drawn there is drawn on the function below which it lies."""
    tree.class_device(str(AUDIO), "simple-framebuffer.0/drm/card1", FULL)
    with program(OPEN, "/dev/full") as person:
        [holder] = of(await scanner.scan(HolderQuery((AUDIO,))), person.pid)
    assert holder.nodes == ("/dev/full",)


async def test_a_thread_with_descriptors_of_its_own(scanner: LinuxProcesses) -> None:
    with program(THREAD) as person:
        [holder] = of(await scanner.scan(HolderQuery((GPU,))), person.pid)
    assert holder.nodes == ("/dev/full",)


async def test_a_thread_that_outlived_its_process(scanner: LinuxProcesses) -> None:
    with program(THREAD + "ctypes.CDLL(None).pthread_exit(None)\n") as person:
        wait_for_the_first_thread(person.pid)
        [holder] = of(await scanner.scan(HolderQuery((GPU,))), person.pid)
    assert holder.nodes == ("/dev/full",)


async def test_nodes_and_numbers(scanner: LinuxProcesses, tree: Tree) -> None:
    """Those that sysfs does not show, and those that it does not show any more."""
    with program(OPEN, "/dev/full", "/dev/zero") as person:
        scan = await scanner.scan(HolderQuery((), nodes=("ful?", "no-such-node"), numbers=("c1:5", "c999:1")))
        [holder] = of(scan, person.pid)
    assert scan.numbers == ("c1:5", "c1:7", "c999:1")
    assert holder.nodes == ("/dev/full", "/dev/zero")


async def test_our_workers_are_no_holders(scanner: LinuxProcesses, kernel: LinuxKernel) -> None:
    worker = kernel._command[2]
    with program(OPEN.replace("sys.argv[1:]", "['/dev/full']"), worker) as ours, program(OPEN, "/dev/full") as other:
        scan = await scanner.scan(HolderQuery((GPU,)))
    assert of(scan, ours.pid) == []
    assert of(scan, other.pid) != []
