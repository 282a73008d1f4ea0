"""What a scan makes of a /proc that is made up, where it must be other than this machine's."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import pytest

from gpuswitch.host.linux import scan_main
from gpuswitch.host.linux.scan_main import Scan
from gpuswitch.host.linux.scanning import open_files as tables
from gpuswitch.host.linux.scanning import watch
from gpuswitch.host.linux.scanning.devices import Devices
from gpuswitch.host.linux.scanning.kernel import Client, mounted
from gpuswitch.host.linux.scanning.modules import Modules
from gpuswitch.host.linux.scanning.open_files import Opened
from gpuswitch.host.linux.scanning.split import in_two
from tests.harness.scans import FULL, NOBODYS, OPEN, Proc, program
from tests.harness.sysfs_tree import Tree, link
from tests.harness.workers import AUDIO, GPU


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def devices(tree: Tree, proc: Proc) -> Devices:
    return Devices(str(tree.sys), str(tree.dev), str(proc.root))


def scan(tree: Tree, proc: Proc, *numbers: str, **modules: list[str]) -> list[dict[str, object]]:
    """The holders of these device numbers."""
    request = {"functions": [str(GPU)], "nodes": [], "numbers": numbers, "modules": modules}
    found = scan_main.scanned(str(tree.sys), "/dev", str(proc.root), request)["holders"]
    assert isinstance(found, list)
    return found


def device(folder: Path, numbers: str, subsystem: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "dev").write_text(f"{numbers}\n")
    if subsystem:
        (folder / "subsystem").symlink_to(f"/sys/class/{subsystem}")
    return folder


def test_everything_below_a_function(tree: Tree, proc: Proc) -> None:
    path = tree.path(str(GPU))
    device(path / "drm/card1", "226:1", "drm")
    device(path / "i2c-3/i2c-dev/i2c-3", "89:3", "i2c-dev")
    device(path / "usb1/1-2", "189:1", "usb")
    device(path / "usb1/1-2/1-2:1.0/host6/target6:0:0/6:0:0:0/block/sdb", "8:16", "block")
    device(path / "vfio-dev/vfio0", "511:0")
    device(path / "drm/card1/power", "1:1")
    (path / "drm/card1/device").symlink_to("../..")
    assert devices(tree, proc).of_function(str(GPU)) == {"c226:1", "c89:3", "c189:1", "b8:16", "c511:0"}


def test_what_lies_below_another_function(tree: Tree, proc: Proc) -> None:
    tree.function("0000:00:01.0", class_code="060400")
    below = tree.function("0000:02:00.0", under=("0000:00:01.0",))
    device(below / "drm/card1", "226:1")
    assert devices(tree, proc).of_function("0000:00:01.0") == set()
    assert devices(tree, proc).of_function("0000:02:00.0") == {"c226:1"}


def test_what_a_disk_was_made_into(tree: Tree, proc: Proc) -> None:
    disk = device(tree.path(str(GPU)) / "usb1/block/sdb", "8:16", "block")
    part = device(disk / "sdb1", "8:17", "block")
    plain = device(tree.sys / "devices/virtual/block/dm-0", "254:0", "block")
    (part / "holders").mkdir()
    link(part / "holders/dm-0", plain)
    assert devices(tree, proc).of_function(str(GPU)) == {"b8:16", "b8:17", "b254:0"}


@pytest.mark.parametrize("address", ["0000:09:00.0", "../../class/mem", ""])
def test_a_function_that_is_not_there(tree: Tree, proc: Proc, address: str) -> None:
    assert devices(tree, proc).of_function(address) == set()


def test_an_nvidia_gpu_by_its_minor(tree: Tree, proc: Proc) -> None:
    """With its node, and without: udev may not have made it, or somebody took it away."""
    proc.write(f"driver/nvidia/gpus/{GPU}/information", "Model: \t\t NVIDIA\nDevice Minor: \t 7\n")
    assert devices(tree, proc).of_function(str(GPU)) == {"c195:7"}
    (tree.dev / "nvidia7").symlink_to("/dev/full")
    assert devices(tree, proc).of_function(str(GPU)) == {"c195:7", "c1:7"}
    assert devices(tree, proc).of_function(str(AUDIO)) == set()


@pytest.mark.parametrize(
    ("opened", "machine"),
    [
        ([], False),
        (["/dev/zero"], True),  # which is kvm below
        (["/dev/null"], False),
        (["anon_inode:kvm-vm"], True),
        (["anon_inode:[vfio-device]"], True),
        (["anon_inode:[eventfd]", "/srv/anon_inode:kvm-vm"], False),
    ],
)
def test_who_runs_a_virtual_machine(tree: Tree, proc: Proc, opened: list[str], machine: bool) -> None:
    (tree.dev / "kvm").symlink_to("/dev/zero")
    folder = proc.process(NOBODYS, "game")
    for number, path in enumerate(["/dev/full", *opened]):
        (folder / "fd" / str(number)).symlink_to(path)
    request = {"functions": [str(GPU)], "nodes": [], "numbers": [f"c{FULL}"], "modules": {}}
    [holder] = cast(
        "list[dict[str, object]]", Scan(str(tree.sys), str(tree.dev), str(proc.root), request).run()["holders"]
    )
    assert (holder["command"], holder["machine"]) == ("game", machine)


def test_a_process_that_cannot_be_looked_at(tree: Tree, proc: Proc) -> None:
    folder = proc.process(NOBODYS, "a) secretive (b")
    (folder / "fd").rmdir()
    (folder / "fd").touch()
    [holder] = scan(tree, proc, "c1:7")
    assert (holder["pid"], holder["started"], holder["command"]) == (NOBODYS, 4321, "a) secretive (b-and-more")
    assert (holder["nodes"], holder["doubt"]) == ([], "its descriptors cannot be read")
    assert (holder["uid"], holder["user"]) == (54321, "54321")
    (folder / "fd").unlink()
    (folder / "fd").mkdir()
    assert scan(tree, proc, "c1:7") == []
    (folder / "maps").unlink()
    (folder / "maps").mkdir()
    assert [holder["doubt"] for holder in scan(tree, proc, "c1:7")] == ["its mappings cannot be read"]


@pytest.mark.parametrize(("flags", "state", "threads"), [(0x00200040, "S", 1), (0, "Z", 1)], ids=["kernel's", "dead"])
def test_who_has_no_descriptors_has_no_secrets(tree: Tree, proc: Proc, flags: int, state: str, threads: int) -> None:
    folder = proc.process(NOBODYS, "empty", flags=flags, state=state, threads=threads)
    (folder / "fd").rmdir()
    (folder / "fd").touch()
    assert scan(tree, proc, "c1:7") == []


def test_a_process_that_goes_while_it_is_looked_at(tree: Tree, proc: Proc) -> None:
    folder = proc.process(NOBODYS, "brief")
    (folder / "fd/3").symlink_to("/dev/full")
    (folder / "fd/4").symlink_to("/nowhere")
    assert [holder["nodes"] for holder in scan(tree, proc, "c1:7")] == [["/dev/full"]]
    (folder / "stat").unlink()
    assert scan(tree, proc, "c1:7") == []
    (proc.root / "124").symlink_to("/nowhere")
    assert scan(tree, proc, "c1:7") == []


def test_a_process_that_comes_while_others_are_looked_at(
    tree: Tree, proc: Proc, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = proc.process(NOBODYS, "child")
    (folder / "fd/3").symlink_to("/dev/full")
    there = iter([set[str](), {str(NOBODYS)}])
    monkeypatch.setattr(Scan, "_pids", lambda _scan: next(there))
    assert [holder["pid"] for holder in scan(tree, proc, "c1:7")] == [NOBODYS]


def test_work_in_two_halves() -> None:
    names = [str(number) for number in range(5)]
    own, other = in_two(lambda half: [os.getpid(), *half], names)
    assert own[1:] == ["0", "2", "4"]
    assert other[1:] == ["1", "3"]
    assert own[0] == os.getpid() != other[0]


@pytest.mark.parametrize("where", ["here", "there"])
def test_half_of_the_work_is_not_enough(where: str) -> None:
    here = os.getpid()

    def work(_names: Sequence[str]) -> None:
        if (os.getpid() == here) is (where == "here"):
            raise OSError(errno.EIO, "this half", "/proc/1")

    with pytest.raises(OSError, match="this half: '/proc/1'") as caught:
        in_two(work, ["1", "2"])
    assert caught.value.errno == errno.EIO


def test_a_half_that_says_nothing() -> None:
    here = os.getpid()

    def work(_names: Sequence[str]) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="half of the look failed"):
        in_two(work, ["1", "2"])


def test_what_keeps_a_look_from_everything_is_told(tree: Tree, proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(scan_main, "look", blind)
    request = json.dumps({"functions": [str(GPU)], "nodes": [], "numbers": [], "modules": {}}).encode()
    said = json.loads(scan_main.answer(str(tree.sys), "/dev", str(proc.root), request))
    assert said == {"error": [errno.EMFILE, "Too many open files"]}


@pytest.mark.parametrize("file", ["maps", "cmdline"])
def test_a_process_that_does_not_let_itself_be_looked_at(
    file: str, tree: Tree, proc: Proc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody writes to this FIFO: who opens it waits. It counts as a holder, and all others are looked at."""
    monkeypatch.setattr(watch, "STUCK_SECONDS", 0.05)
    for pid in (NOBODYS - 1, NOBODYS, NOBODYS + 1):
        (proc.process(pid, f"program{pid}") / "fd/3").symlink_to("/dev/full")
    (proc.root / f"{NOBODYS}/{file}").unlink(missing_ok=True)
    os.mkfifo(proc.root / f"{NOBODYS}/{file}")
    found = {holder["pid"]: (holder["command"], holder["doubt"]) for holder in scan(tree, proc, "c1:7")}
    assert found == {
        NOBODYS - 1: (f"program{NOBODYS - 1}", ""),
        NOBODYS: (f"program{NOBODYS}", "it is stuck in the kernel, or was looked at for too long"),
        NOBODYS + 1: (f"program{NOBODYS + 1}", ""),
    }


def test_a_drm_device_that_is_no_more(tree: Tree, proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory devices stand for DRM's here, since those cannot be had everywhere."""
    monkeypatch.setattr(tables, "_DRM", "c1:")
    folder = proc.process(NOBODYS, "stale")
    (folder / "fd/3").symlink_to("/dev/full")
    proc.write(f"{NOBODYS}/fdinfo/3", f"pos:\t0\ndrm-driver:\tamdgpu\ndrm-pdev:\t{AUDIO}\n")
    assert scan(tree, proc) == []
    proc.write(f"{NOBODYS}/fdinfo/3", f"pos:\t0\ndrm-driver:\tamdgpu\ndrm-pdev:\t{GPU}\n")
    assert [holder["nodes"] for holder in scan(tree, proc)] == [["/dev/full"]]
    (tree.sys / "dev/char" / FULL).mkdir(parents=True)
    assert scan(tree, proc) == []


def test_a_device_that_was_got_from_a_vfio_group(tree: Tree, proc: Proc) -> None:
    """Somebody may have it who has not the group: it can be passed on. Linux 7.2 and later tell which it is."""
    folder = proc.process(NOBODYS, "vm")
    (folder / "fd/anon_inode:[vfio-device]").touch()
    (folder / "fd/3").symlink_to("anon_inode:[vfio-device]")

    def found(*nodes: str) -> list[object]:
        request = {"functions": [str(GPU)], "nodes": nodes, "numbers": [], "modules": {}}
        holders = Scan(str(tree.sys), "/dev", str(proc.root), request).run()["holders"]
        assert isinstance(holders, list)
        return [holder["nodes"] for holder in holders]

    assert found("vfio/5") == []
    proc.write(f"{NOBODYS}/fdinfo/3", f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:01.0/{AUDIO}\n")
    assert found("vfio/5") == []
    proc.write(f"{NOBODYS}/fdinfo/3", f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:01.0/{GPU}\n")
    assert found("vfio/5") == [["anon_inode:[vfio-device]"]]
    assert found() == []


def test_a_device_without_a_node_has_its_number_for_a_name(tree: Tree, proc: Proc) -> None:
    folder = proc.process(NOBODYS, "lonely")
    (folder / "fd/3").symlink_to("/dev/full")
    assert devices(tree, proc).names({"c1:7"}) == {}
    assert Devices("/sys", "/dev", "/proc").names({"c1:7", "c999:1"}) == {"c1:7": "/dev/full"}


def test_mounts_and_swap(proc: Proc) -> None:
    for pid, namespace in ((1, "mnt:[1]"), (7, "mnt:[2]"), (8, "mnt:[2]")):
        (proc.root / f"{pid}/ns").mkdir(parents=True)
        (proc.root / f"{pid}/ns/mnt").symlink_to(namespace)
    proc.write(
        "1/mountinfo", "36 35 8:17 / /mnt/a\\040disk rw shared:1 - ext4 /dev/sdb1 rw\n37 35 8:1 / / rw - ext4 x rw\n"
    )
    proc.write("7/mountinfo", "90 89 8:18 / /data rw - ext4 /dev/sdb2 rw\n91 89 0:30 / /run rw - tmpfs tmpfs rw\n")
    proc.write("swaps", "Filename\t\tType\n/dev/full  partition 1 0 -2\n/swap\\040file  file 1 0 -3\n")
    assert mounted(str(proc.root), {"b8:17", "b8:18", "c1:7"}) == {
        Client("mount", "mounted on /mnt/a disk", "b8:17"),
        Client("mount", "mounted on /data", "b8:18"),
        Client("swap", "used as swap space", "c1:7"),
    }
    assert mounted(str(proc.root), {"c8:17"}) == set()


@pytest.mark.parametrize("place", ["a\vb", "a\x85b", "a\u2028b", "a\rb"])
def test_whoever_mounts_something_may_call_it_anything(proc: Proc, place: str) -> None:
    """In a user namespace, anybody may mount something. Of what ends lines elsewhere, the kernel escapes few."""
    (proc.root / "1/ns").mkdir(parents=True)
    (proc.root / "1/ns/mnt").symlink_to("mnt:[1]")
    disk = f"36 35 8:17 / /{place} rw - ext4 /dev/sdb1 rw"
    loop = proc.root / "loop"
    loop.symlink_to(loop)
    others = [f"37 35 0:30 / /run rw - tmpfs /dev/{source} rw" for source in (place, "x" * 300, f"..{loop}/x")]
    (proc.root / "1/mountinfo").write_bytes("\n".join([disk, *others, ""]).encode())
    assert mounted(str(proc.root), {"b8:17"}) == {Client("mount", f"mounted on /{place}", "b8:17")}


@pytest.mark.parametrize("name", [b"\xd0\x9f\xd1\x80\xd0\xbe\xd0\xb3\xd1\x80\xd0\xb0\xd0", b"a-very-long-nam"])
def test_a_name_that_the_kernel_has_cut_is_told_in_full(tree: Tree, proc: Proc, name: bytes) -> None:
    """It cuts after 15 bytes, whichever letter that is in."""
    full = "Программа" if name[0] > 0x7F else "a-very-long-name"
    folder = proc.process(NOBODYS, "cut")
    (folder / "stat").write_bytes((folder / "stat").read_bytes().replace(b"(cut)", b"(%b)" % name))
    (folder / "cmdline").write_text(f"/usr/bin/{full}\0")
    (folder / "fd/3").symlink_to("/dev/full")
    assert [holder["command"] for holder in scan(tree, proc, "c1:7")] == [full]


class Driver:
    """A module with a driver, made up, whose device is really /dev/full."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        tree.class_device(str(GPU), "drm/card0", FULL)
        link(tree.sys / "bus/pci/drivers/nvidia" / str(GPU), tree.path(str(GPU)))

    def references(self, module: str, count: int, *users: str) -> None:
        folder = self._tree.sys / "module" / module
        folder.mkdir(exist_ok=True)
        (folder / "refcnt").write_text(f"{count}\n")
        for user in users:
            (folder / "holders" / user).mkdir(parents=True, exist_ok=True)


def doubts(tree: Tree, proc: Proc, *modules: str) -> list[tuple[object, object]]:
    found = scan(tree, proc, **{module: [] for module in modules})
    return [(holder["command"], holder["doubt"]) for holder in found if not holder["pid"]]


@pytest.mark.parametrize(
    ("opens", "references", "left"),
    [
        ("os.open('/dev/full', 0)", 1, ""),
        ("os.open('/dev/full', 0)", 2, "1 user"),
        ("os.open('/dev/full', 0); os.open('/dev/full', 0)", 2, ""),
        ("os.dup(os.open('/dev/full', 0))", 2, "1 user"),
        ("os.dup(os.open('/dev/full', 0)); os.dup(os.open('/dev/full', 1))", 5, "3 users"),
        ("", 1, "1 user"),
        ("", 0, ""),
    ],
)
def test_references_that_no_process_explains(tree: Tree, proc: Proc, opens: str, references: int, left: str) -> None:
    """One for each open file; several descriptors may be the same one."""
    Driver(tree).references("nvidia", references)
    with program(f"{opens}\nready()") as person:
        proc.real(person.pid)
        expected = [("nvidia", f"module nvidia has {left} that no process explains")] if left else []
        assert doubts(tree, proc, "nvidia", "nvidia_uvm") == expected


def test_references_that_went_while_the_processes_were_looked_at(
    tree: Tree, proc: Proc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PipeWire's do, which opens a card for a moment: nobody of the kernel has it."""
    driver = Driver(tree)
    driver.references("nvidia", 1)
    look = Scan._look

    def closes(self: Scan, pids: Sequence[str]) -> object:
        driver.references("nvidia", 0)
        return look(self, pids)

    monkeypatch.setattr(Scan, "_look", closes)
    assert doubts(tree, proc, "nvidia") == []


@pytest.mark.parametrize(("moves", "doubted"), [(3, False), (9, True)])
def test_references_that_come_and_go_for_a_while(
    tree: Tree, proc: Proc, monkeypatch: pytest.MonkeyPatch, moves: int, doubted: bool
) -> None:
    """As those of a WirePlumber that has just started; whoever never stops is nobody to go by."""
    driver = Driver(tree)
    driver.references("nvidia", 0)
    unexplained, counts = Modules.unexplained, islice(cycle([1, 0]), moves)

    def after_another(self: Modules, opened: Sequence[Opened], mapped: Collection[str]) -> Iterator[Client]:
        driver.references("nvidia", next(counts, 0))
        return unexplained(self, opened, mapped)

    monkeypatch.setattr(Modules, "unexplained", after_another)
    assert bool(doubts(tree, proc, "nvidia")) is doubted


def test_references_of_a_file_that_was_inherited(tree: Tree, proc: Proc) -> None:
    Driver(tree).references("nvidia", 2)
    with program("os.open('/dev/full', 0)\nready() if os.fork() else os.read(0, 1)") as person:
        for pid in (person.pid, int(Path(f"/proc/{person.pid}/task/{person.pid}/children").read_text())):
            proc.real(pid)
        assert doubts(tree, proc, "nvidia") == [("nvidia", "module nvidia has 1 user that no process explains")]


def test_references_of_one_file_in_nvidias_old_front_end(tree: Tree, proc: Proc) -> None:
    Driver(tree).references("nvidia", 3)
    proc.write("devices", "Character devices:\n  1 nvidia-frontend\n")
    with program(OPEN, "/dev/full") as person:
        proc.real(person.pid)
        assert doubts(tree, proc, "nvidia") == []


def test_references_of_a_chain_of_modules(tree: Tree, proc: Proc) -> None:
    """What holds one of them shows at another; they are one sum, and the one with the most is named."""
    driver = Driver(tree)
    driver.references("nvidia", 2, "nvidia_modeset")
    driver.references("nvidia_modeset", 1, "nvidia_drm")
    driver.references("nvidia_drm", 1)
    chain = ("nvidia_drm", "nvidia_modeset", "nvidia")
    assert doubts(tree, proc, *chain) == [("nvidia", "module nvidia has 2 users that no process explains")]
    driver.references("nvidia_drm", 3)
    assert doubts(tree, proc, *chain) == [("nvidia_drm", "module nvidia_drm has 4 users that no process explains")]
    with program("held = [os.open('/dev/full', 0) for _ in range(4)]; ready()") as person:
        proc.real(person.pid)
        assert doubts(tree, proc, *chain) == []


def test_references_of_a_console(tree: Tree, proc: Proc) -> None:
    Driver(tree).references("nvidia", 1)
    device(tree.path(str(GPU)) / "graphics/fb0", "29:0")
    console = tree.sys / "class/vtconsole/vtcon1"
    console.mkdir(parents=True)
    (console / "name").write_text("(M) frame buffer device\n")
    (console / "bind").write_text("1\n")
    assert doubts(tree, proc, "nvidia") == []
    (console / "bind").write_text("0\n")
    assert len(doubts(tree, proc, "nvidia")) == 1


def test_who_explains_a_reference_need_not_be_a_holder(tree: Tree, proc: Proc) -> None:
    """Somebody who has another device of the same driver open, or a node that all of them share."""
    driver = Driver(tree)
    tree.unbind(str(AUDIO))
    tree.bind(str(AUDIO), "nvidia")
    link(tree.sys / "bus/pci/drivers/nvidia" / str(AUDIO), tree.path(str(AUDIO)))
    (tree.path(str(GPU)) / "drm/card0/dev").write_text("226:0\n")
    tree.class_device(str(AUDIO), "drm/card1", FULL)
    driver.references("nvidia", 2)
    with program(OPEN, "/dev/full", "/dev/zero") as person:
        proc.real(person.pid)
        assert not any(holder["nodes"] or not holder["pid"] for holder in scan(tree, proc, nvidia=["zero"]))
        assert 0 in [holder["pid"] for holder in scan(tree, proc, nvidia=[])]
        assert [holder["nodes"] for holder in scan(tree, proc, "c1:5", nvidia=["zero"])] == [["/dev/zero"]]


def test_a_module_that_is_not_there(tree: Tree, proc: Proc) -> None:
    assert doubts(tree, proc, "nvidia", "no_such_module") == []


def test_no_proc(tree: Tree, proc: Proc) -> None:
    proc.root.rename(proc.root.with_name("gone"))
    with pytest.raises(FileNotFoundError):
        scan(tree, proc)
