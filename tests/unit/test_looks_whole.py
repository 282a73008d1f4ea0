"""A look that could not see everything is none: whatever it is that cannot be read now, nobody takes it for gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.adopted import AdoptedWorker
from gpuswitch.host.linux.scanning.devices import Devices
from gpuswitch.host.linux.scanning.open_files import Seen, Wanted, look
from gpuswitch.host.linux.sysfs import Sysfs
from gpuswitch.model.holders import Process
from tests.harness.scans import FULL
from tests.harness.sysfs_tree import Tree
from tests.harness.workers import GPU
from tests.unit.test_sysfs import two_functions


def counted(monkeypatch: pytest.MonkeyPatch, failing: int, number: int) -> Callable[[], int]:
    """How many times something is opened or listed from here on; the time that is so counted fails."""
    times = 0

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: str, *rest: Any, **named: Any) -> Any:
            nonlocal times
            times += 1
            if times == failing:
                raise OSError(number, os.strerror(number), path)
            return work(path, *rest, **named)

        return counted

    monkeypatch.setattr(os, "open", counting(os.open))
    monkeypatch.setattr(os, "scandir", counting(os.scandir))
    return lambda: times


def test_a_look_at_the_host(tmp_path: Path) -> None:
    """Whatever it is that cannot be read. Where it has left meanwhile, the look is whole without it."""
    tree = Tree(tmp_path)
    two_functions(tree)
    sysfs = Sysfs(tree.roots)
    with pytest.MonkeyPatch.context() as patch:
        times = counted(patch, 0, 0)
        whole = sysfs.look()
        looks = times()
    assert looks > 20
    for failing in range(1, looks + 1):
        with pytest.MonkeyPatch.context() as patch:
            sysfs = Sysfs(tree.roots)
            counted(patch, failing, errno.EMFILE)
            with pytest.raises(KernelError, match=r"^cannot look at /.*: Too many open files$"):
                sysfs.look()
            assert sysfs.look() == whole
        with pytest.MonkeyPatch.context() as patch:
            sysfs = Sysfs(tree.roots)
            counted(patch, failing, errno.ENODEV)
            sysfs.look()


def test_the_numbers_of_what_is_looked_for(tree: Tree) -> None:
    tree.class_device(str(GPU), "drm/card0", FULL)
    (tree.dev / "null").symlink_to("/dev/null")
    devices = Devices(tree.roots.sysfs, tree.roots.dev, "/proc")

    def numbers() -> tuple[set[str], set[str]]:
        return devices.of_function(str(GPU)), devices.of_nodes(["nul*"])

    with pytest.MonkeyPatch.context() as patch:
        times = counted(patch, 0, 0)
        assert numbers() == ({"c1:7"}, {"c1:3"})
        looks = times()
    for failing in range(1, looks + 1):
        with pytest.MonkeyPatch.context() as patch:
            counted(patch, failing, errno.EMFILE)
            with pytest.raises(OSError, match="Too many open files"):
                numbers()


def test_who_has_it_open() -> None:
    """Nobody knows, or this one counts as a holder."""
    wanted = Wanted("/proc", "/sys", frozenset({"c1:7"}), frozenset())

    def found() -> list[Seen]:
        seen, stuck = look(wanted, [str(os.getpid())], lambda seen: seen)
        assert stuck == []
        return seen

    with Path("/dev/full").open("wb"):
        with pytest.MonkeyPatch.context() as patch:
            times = counted(patch, 0, 0)
            assert [bool(seen.opened) for seen in found()] == [True]
            looks = times()
        for failing in range(1, looks + 1):
            with pytest.MonkeyPatch.context() as patch:
                counted(patch, failing, errno.ENFILE)
                with suppress(OSError):
                    [seen] = found()
                    assert seen.opened or seen.doubt


def test_whether_a_process_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = procfs.process(os.getpid())
    assert mine is not None
    assert procfs.process(2**22 + 1) is None

    def unreadable(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_text", unreadable)
    with pytest.raises(OSError, match="Too many open files"):
        procfs.process(os.getpid())
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- pathlib is what fails here
    with pytest.raises(OSError, match="Too many open files"):
        AdoptedWorker("an unbind", Process(mine.pid, mine.started), lambda: None)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 -- as above
