"""The journal: what is owed survives everything that can happen to a small file."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.errors import Failed
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Captured, Driver
from gpuswitch.switch.journal import Journal
from tests.unit.parts import at

GPU = at("0000:01:00.0")
OWED = {
    GPU: Captured(Driver("nvidia", "nvidia"), None, "auto"),
    at("0000:01:00.1"): Captured(Driver("snd_hda_intel", None), "mine", "on"),
    at("10000:e1:00.0"): Captured(None, None, "auto"),
}
LESS = {GPU: OWED[GPU]}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_gives_back_what_it_was_given(tmp_path: Path) -> None:
    Journal(tmp_path / "a" / "b").save(GPU, OWED)
    assert Journal(tmp_path / "a" / "b").load(GPU) == OWED
    assert names(tmp_path / "a" / "b") == ["0000_01_00_0.json"]


def test_owes_nothing_to_whom_it_does_not_know(tmp_path: Path) -> None:
    assert Journal(tmp_path / "missing").load(GPU) is None
    Journal(tmp_path).save(GPU, OWED)
    assert Journal(tmp_path).load(at("0000:02:00.0")) is None


def test_forgets_what_was_given_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save(GPU, OWED)
    journal.drop(GPU)
    journal.drop(GPU)
    assert journal.load(GPU) is None
    assert names(tmp_path) == []


def test_one_gpu_does_not_touch_another(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save(GPU, OWED)
    journal.save(at("0000:02:00.0"), LESS)
    journal.drop(at("0000:02:00.0"))
    assert journal.load(GPU) == OWED


def test_a_later_save_replaces_the_earlier_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save(GPU, OWED)
    journal.save(GPU, LESS)
    assert journal.load(GPU) == LESS


def whole(**changes: object) -> str:
    """A file as this version writes it, with changes."""
    kept = {"driver": "nvidia", "module": "nvidia", "override": None, "power_control": "auto"}
    return json.dumps({"format": 1, "baseline": {str(GPU): kept}} | changes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 512,
        whole().encode()[:-9],
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b"{}",
        b'{"some": "other program"}',
        whole(format=0).encode(),
        whole(format=2).encode(),
        whole(baseline=None).encode(),
        whole(baseline=[]).encode(),
        whole(baseline={"01:00": {}}).encode(),
        whole(baseline={"0000:01:00.0": None}).encode(),
        whole(baseline={"0000:01:00.0": {"driver": "nvidia"}}).encode(),
        whole(baseline={"0000:01:00.0": {"driver": 5, "module": [], "override": {}, "power_control": 1}}).encode(),
        whole(
            baseline={"0000:01:00.0": {"driver": None, "module": None, "override": None, "power_control": "off"}}
        ).encode(),
    ],
)  # fmt: skip  # one kind of damage each
def test_what_cannot_be_read_is_set_aside_with_a_warning(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "0000_01_00_0.json"
    path.write_bytes(content)
    assert Journal(tmp_path).load(GPU) is None
    assert names(tmp_path) == ["0000_01_00_0.bad"]
    assert path.with_suffix(".bad").read_bytes() == content
    assert str(path) in caplog.text


def test_a_directory_in_its_place_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "0000_01_00_0.json").mkdir()
    assert Journal(tmp_path).load(GPU) is None
    assert names(tmp_path) == ["0000_01_00_0.bad"]


def test_what_cannot_even_be_set_aside_does_not_stop_us(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the runtime directory is a file, nothing in it can be read or moved."""
    (tmp_path / "file").write_text("")
    assert Journal(tmp_path / "file").load(GPU) is None
    Journal(tmp_path / "file").drop(GPU)
    assert "cannot set" in caplog.text
    assert "cannot remove the journal of 0000:01:00.0" in caplog.text


def test_refuses_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match=r"cannot write the journal .* nothing was changed"):
        Journal(tmp_path / "file").save(GPU, OWED)
    with pytest.raises(Failed, match=r"cannot write the journal .* nothing was changed"):
        Journal(tmp_path / "file" / "below").save(GPU, OWED)


_FULL_DISK = f"""
import resource, signal, sys
from pathlib import Path
from gpuswitch.errors import Failed
from gpuswitch.switch.journal import Journal
from tests.unit.test_journal import GPU, OWED
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, {resource.RLIM_INFINITY}))
try:
    Journal(Path(sys.argv[1])).save(GPU, OWED)
except Failed as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the write fails in the middle, as on a disk without room."""
    Journal(tmp_path).save(GPU, LESS)
    ended = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.startswith("cannot write the journal")
    assert Journal(tmp_path).load(GPU) == LESS
    Journal(tmp_path).save(GPU, OWED)
    assert Journal(tmp_path).load(GPU) == OWED
    assert names(tmp_path) == ["0000_01_00_0.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_save_that_was_cut_short_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A daemon that died in it leaves a part of the new file beside the old one."""
    Journal(tmp_path).save(GPU, OWED)
    (tmp_path / "0000_01_00_0.new").write_text(whole()[:20])
    assert Journal(tmp_path).load(GPU) == OWED
    Journal(tmp_path).save(GPU, LESS)
    assert Journal(tmp_path).load(GPU) == LESS
    assert names(tmp_path) == ["0000_01_00_0.json"]


def test_who_reads_the_old_file_still_reads_the_old_file(tmp_path: Path) -> None:
    """It is replaced, never written over."""
    Journal(tmp_path).save(GPU, OWED)
    with (tmp_path / "0000_01_00_0.json").open() as old:
        before = (tmp_path / "0000_01_00_0.json").read_text()
        Journal(tmp_path).save(GPU, LESS)
        assert old.read() == before


_drivers = st.none() | st.builds(Driver, st.text(min_size=1), st.none() | st.text(min_size=1))
_addresses = st.builds(
    PciAddress, st.integers(0, 0xFFFFFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7)
)


@given(
    owed=st.dictionaries(
        _addresses, st.builds(Captured, _drivers, st.none() | st.text(), st.sampled_from(["auto", "on"])), max_size=4
    )
)
def test_anything_comes_back_as_it_was(
    owed: dict[PciAddress, Captured], tmp_path_factory: pytest.TempPathFactory
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"))
    journal.save(GPU, owed)
    assert journal.load(GPU) == owed
