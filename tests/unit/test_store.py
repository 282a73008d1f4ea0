"""The files of the journal, on a disk that is full: a small file system of its own, in a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuswitch.switch.journal.store import SPARE_BYTES, DirectoryStore

_FULL = """
import ctypes, os, sys
from pathlib import Path
from gpuswitch.switch.journal.store import DirectoryStore

directory = Path(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"none", b"/", None, 0x44000, None) or libc.mount(b"full", bytes(directory), b"tmpfs", 0, b"size=128k"):
    raise OSError(ctypes.get_errno(), "mount")
store = DirectoryStore(directory)
if "reserve" in sys.argv:
    store.reserve("gpu")
store.replace("gpu", b"before")
with (directory / "filler").open("wb", buffering=0) as filler:
    try:
        while filler.write(b"x" * 4096):
            pass
    except OSError:
        pass
for number in range(3):
    try:
        store.replace("gpu", b"%d" % number * 9000)
    except OSError as error:
        print(error.strerror)
    print(store.read("gpu")[:6].decode(), len(store.read("gpu")))
print(sorted(path.name for path in directory.iterdir()))
"""


def on_a_full_disk(directory: Path, *arguments: str) -> list[str]:
    user = ["--map-root-user"] if os.geteuid() else []
    ended = subprocess.run(
        ["unshare", *user, "--mount", sys.executable, "-c", _FULL, directory, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.splitlines()


def test_room_that_was_kept_is_used_again_and_again(tmp_path: Path) -> None:
    assert on_a_full_disk(tmp_path, "reserve") == [
        "000000 9000",
        "111111 9000",
        "222222 9000",
        "['filler', 'gpu.json', 'gpu.spare']",
    ]


def test_without_such_room_the_old_text_stays(tmp_path: Path) -> None:
    words = "No space left on device"
    assert on_a_full_disk(tmp_path) == [
        words,
        "before 6",
        words,
        "before 6",
        words,
        "before 6",
        "['filler', 'gpu.json']",
    ]


def test_the_room_goes_with_the_text(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "a" / "b")
    store.reserve("gpu")
    assert (tmp_path / "a/b/gpu.spare").stat().st_size == SPARE_BYTES
    store.replace("gpu", b"text")
    assert (store.names(), store.read("gpu")) == (["gpu"], b"text")
    store.remove("gpu")
    store.remove("gpu")
    assert (store.names(), list((tmp_path / "a/b").iterdir())) == ([], [])
    with pytest.raises(FileNotFoundError):
        store.read("gpu")


def test_to_keep_room_twice_is_to_keep_it_once(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.reserve("gpu")
    store.reserve("gpu")
    assert (tmp_path / "gpu.spare").stat().st_size == SPARE_BYTES
