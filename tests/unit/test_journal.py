"""The journal: what is owed survives everything that can happen to a small file."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.errors import Failed
from gpuswitch.host.port import ATTRIBUTES, AttributeChange, Captured, Pending
from gpuswitch.model.access import NO_USER, UserAccess
from gpuswitch.model.address import PciAddress
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.facts import Driver
from gpuswitch.model.hints import OneOf
from gpuswitch.model.holders import Process, Unit
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from gpuswitch.model.trial import Trial
from gpuswitch.switch.engine import Status, StepEvent
from gpuswitch.switch.journal.journal import Entry, Journal, Page, Unfinished, boot_id
from gpuswitch.switch.journal.store import DirectoryStore
from gpuswitch.switch.record import Requester, StepRecord, Switch
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from gpuswitch.switch.steps.pci import Unbind
from tests.harness.facts import at

GPU = at("0000:01:00.0")
RESTORE_STATE = RestoreState(
    functions={
        GPU: Captured(Driver("nvidia", "nvidia"), None, "auto"),
        at("0000:01:00.1"): Captured(Driver("snd_hda_intel", None), "mine", "on"),
        at("10000:e1:00.0"): Captured(None, None, "auto"),
    },
    units=(Unit("sddm.service"), Unit("plasma-kwin_x11.service", 1000)),
    modules=("nvidia", "nvidia_drm"),
    terminals=(1, 2),
    vtconsoles=("vtcon1",),
    shown_by_others=((3, GPU),),
    boot_framebuffers=(("efi-framebuffer.0", "efi-framebuffer"),),
    persistent=(GPU,),
    attributes={FunctionAttribute(at("0000:00:01.0"), "d3cold_allowed"): AttributeChange("1", "0")},
    access=(UserAccess(1000, "/dev/vfio/12"),),
)
LESS = RestoreState({GPU: RESTORE_STATE.functions[GPU]})
STUCK = Pending("unbind 0000:01:00.0 from nvidia", worker=Process(4711, 88))


UNFINISHED = Unfinished(
    "0a1b2c3d", State.VFIO, Requester(1000, 4711, "a.service", "gpuswitchctl", "win11"), 1.5, 3, 9, "bind"
)
WIN11 = Owner("win11", "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d")


def kept_in(directory: Path) -> Journal:
    return Journal(DirectoryStore(directory))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_gives_back_what_it_was_given(tmp_path: Path) -> None:
    kept_in(tmp_path / "a" / "b").save(GPU, Entry(RESTORE_STATE))
    assert kept_in(tmp_path / "a" / "b").load(GPU) == Entry(RESTORE_STATE)
    assert names(tmp_path / "a" / "b") == ["0000_01_00_0.json"]


def test_owes_nothing_to_whom_it_does_not_know(tmp_path: Path) -> None:
    assert kept_in(tmp_path / "missing").load(GPU) == Entry()
    kept_in(tmp_path).save(GPU, Entry(RESTORE_STATE))
    assert kept_in(tmp_path).load(at("0000:02:00.0")) == Entry()


def test_forgets_what_was_given_back(tmp_path: Path) -> None:
    journal = kept_in(tmp_path)
    journal.save(GPU, Entry(RESTORE_STATE))
    journal.save(GPU, Entry())
    journal.save(GPU, Entry())
    assert journal.load(GPU) == Entry()
    assert names(tmp_path) == []


def test_one_gpu_does_not_touch_another(tmp_path: Path) -> None:
    journal = kept_in(tmp_path)
    journal.save(GPU, Entry(RESTORE_STATE))
    journal.save(at("0000:02:00.0"), Entry(LESS))
    journal.save(at("0000:02:00.0"), Entry())
    assert journal.load(GPU) == Entry(RESTORE_STATE)


def test_a_later_save_replaces_the_earlier_one(tmp_path: Path) -> None:
    journal = kept_in(tmp_path)
    journal.save(GPU, Entry(RESTORE_STATE))
    journal.save(GPU, Entry(LESS))
    assert journal.load(GPU) == Entry(LESS)


KEPT = {"driver": "nvidia", "module": "nvidia", "override": None, "power_control": "auto"}


BEGUN = {
    "id": "0a1b2c3d",
    "target": "vfio",
    "asker": {"uid": None, "pid": 7, "unit": "", "command": "", "vm": "", "service": False},
    "started": 1.5,
    "index": 3,
    "count": 9,
    "title": "bind",
    "back": False,
    "worker": [4711, 88],
}


def whole(**changes: object) -> str:
    """A file as it was written before there was a codec, with changes."""
    content: dict[str, object] = {"format": 3, "boot": boot_id(), "owed": owed()}
    rest: dict[str, object] = {"stuck": None, "unfinished": None, "owner": None, "failed": ""}
    return json.dumps(content | rest | changes)


def owed(**changes: object) -> dict[str, object]:
    lists = ("units", "modules", "terminals", "vtconsoles", "beside", "boot_framebuffers", "persistent", "announced")
    return {"functions": {str(GPU): KEPT}} | {name: [] for name in lists} | changes


@pytest.mark.parametrize("earlier", [[], ["beside"]])
def test_a_file_of_a_version_without_a_field_is_read(tmp_path: Path, earlier: list[str]) -> None:
    pages = {key: value for key, value in owed().items() if key not in earlier}
    (tmp_path / "0000_01_00_0.json").write_text(whole(restore_state=pages))
    assert kept_in(tmp_path).load(GPU) == Entry(LESS)


OLD = """{"format":3,"boot":"%s","owed":{"functions":{\
"0000:01:00.0":{"driver":"nvidia","module":"nvidia","override":null,"power_control":"auto"},\
"0000:01:00.1":{"driver":"snd_hda_intel","module":null,"override":"mine","power_control":"on"},\
"10000:e1:00.0":{"driver":null,"module":null,"override":null,"power_control":"auto"}},\
"units":[["sddm.service",null],["plasma-kwin_x11.service",1000]],"modules":["nvidia","nvidia_drm"],\
"terminals":[1,2],"vtconsoles":["vtcon1"],"beside":[[3,"0000:01:00.0"]],\
"boot_framebuffers":[["efi-framebuffer.0","efi-framebuffer"]],"persistent":["0000:01:00.0"],\
"announced":[["sound",["0000:01:00.1"]]]},"stuck":["unbind 0000:01:00.0 from nvidia",4711,88],\
"unfinished":{"id":"0a1b2c3d","target":"vfio","asker":{"uid":1000,"pid":4711,"unit":"a.service",\
"command":"gpuswitchctl","vm":"win11","service":false},"started":1.5,"index":3,"count":9,"title":"bind",\
"back":false,"worker":[4711,88]},"owner":["win11","5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"],\
"failed":"nothing worked","stays_out":"the driver did not take it"}"""
"""A page as the last version before the codec wrote it, byte by byte."""


def test_a_page_of_the_version_before_is_read(tmp_path: Path) -> None:
    """A service that is upgraded over a running virtual machine keeps the GPU's owner, and what it is to give back."""
    (tmp_path / "0000_01_00_0.json").write_text(OLD % boot_id())
    announced = (("sound", (at("0000:01:00.1"),)),)
    entry = Entry(
        replace(RESTORE_STATE, announced=announced, attributes={}, access=()),
        STUCK,
        replace(UNFINISHED, worker=Process(4711, 88)),
        WIN11,
        "nothing worked",
        "the driver did not take it",
    )
    assert kept_in(tmp_path).load(GPU) == entry
    assert entry.owner is not None
    assert kept_in(tmp_path).load(GPU).owner == entry.owner
    assert entry.owner.name == WIN11.name


def written(tmp_path: Path, entry: Entry) -> dict[str, Any]:
    kept_in(tmp_path).save(GPU, entry)
    content: dict[str, Any] = json.loads((tmp_path / "0000_01_00_0.json").read_text())
    return content


AWAY = """{"format":4,"boot":"%s","restore_state":{"units":[{"name":"sddm.service","user":null}],"functions":{\
"0000:01:00.0":{"driver":{"name":"nvidia","module":"nvidia"},"override":null,"power_control":"auto"}},\
"modules":["nvidia"],"terminals":[],"vtconsoles":[],"shown_by_others":[],"boot_framebuffers":[],"persistent":[],\
"announced":[]},"stuck":null,"unfinished":null,"owner":null,"failed":"","stays_out":"","trial":null}"""
"""The page of a GPU that is away, as it was written before there were attributes that several GPUs share."""


def test_a_page_from_before_attributes_were_shared_is_read(tmp_path: Path) -> None:
    (tmp_path / "0000_01_00_0.json").write_text(AWAY % boot_id())
    home = Captured(Driver("nvidia", "nvidia"), None, "auto")
    kept = RestoreState({GPU: home}, units=(Unit("sddm.service"),), modules=("nvidia",))
    assert kept_in(tmp_path).load(GPU) == Entry(kept)


@pytest.mark.parametrize(
    "attributes",
    [
        {"0000:00:01.0": {"before": "1", "needed": "0"}},
        {"0000:00:01.0/../remove": {"before": "1", "needed": "0"}},
        {"0000:00:01.0//power": {"before": "1", "needed": "0"}},
        {"00:01.0/d3cold_allowed": {"before": "1", "needed": "0"}},
        {"0000:00:01.0/d3cold_allowed": {"before": "1"}},
        {"0000:00:01.0/d3cold_allowed": {"before": 1, "needed": 0}},
        {"0000:00:01.0/d3cold_allowed": "1"},
        [],
    ],
    ids=str,
)
def test_what_is_no_attribute_is_not_believed(attributes: object, tmp_path: Path) -> None:
    content = written(tmp_path, Entry(RESTORE_STATE))
    content["restore_state"]["attributes"] = attributes
    (tmp_path / "0000_01_00_0.json").write_text(json.dumps(content))
    assert kept_in(tmp_path).load(GPU) == Entry()
    assert names(tmp_path) == ["0000_01_00_0.bad"]


@pytest.mark.parametrize("field", [each.name for each in fields(RestoreState)])
def test_a_page_without_a_field_is_one_of_an_earlier_version(tmp_path: Path, field: str) -> None:
    """So a new field of what is owed is no new format."""
    content = written(tmp_path, Entry(RESTORE_STATE))
    del content["restore_state"][field]
    (tmp_path / "0000_01_00_0.json").write_text(json.dumps(content))
    assert kept_in(tmp_path).load(GPU) == Entry(replace(RESTORE_STATE, **{field: getattr(NOTHING_TO_RESTORE, field)}))


def test_a_page_with_a_field_that_nobody_knows_is_set_aside(tmp_path: Path) -> None:
    """It is owed, and a version that does not know it cannot give it back: better to say so."""
    content = written(tmp_path, Entry(RESTORE_STATE))
    content["restore_state"]["firmware"] = []
    (tmp_path / "0000_01_00_0.json").write_text(json.dumps(content))
    assert kept_in(tmp_path).load(GPU) == Entry()
    assert names(tmp_path) == ["0000_01_00_0.bad"]


def test_a_step_further_everything_else_is_kept() -> None:
    worker = Process(4711, 88)
    event = StepEvent(4, 10, Unbind(GPU, "nvidia"), Status.REVERTING)
    further = replace(UNFINISHED, waiting_for="somebody").at(event, worker, None)
    title = event.step.title
    assert further == replace(UNFINISHED, index=4, count=10, title=title, kind="unbind", back=True, worker=worker)
    entry = Entry(RESTORE_STATE, STUCK, UNFINISHED, WIN11, "nothing worked", "the driver did not take it")
    assert entry.at(further) == replace(entry, unfinished=further)


async def test_what_was_done_before_two_restarts_is_known_after_both(tmp_path: Path) -> None:
    done = StepRecord(2, "unbind", "unbind", Status.DONE, 2.0, 0.5)
    left = replace(UNFINISHED, options=Options(Busy.KILL, 7.0, ("a.service",)), steps=(done,), failure="no luck")
    one = StepRecord(3, "bind", "", Status.INTERRUPTED, 1.5, 0.0)
    assert left.interrupted() == (done, one)
    resumed = Switch.begun_before(
        left.id, left.target, left.count, left.options, left.requester, left.started, left.interrupted()
    )
    assert resumed.count == left.count, "one of no steps was there already, people are told"
    resumed.failure = left.failure
    Page(kept_in(tmp_path), GPU, lambda _: None).begin(resumed, RESTORE_STATE, None)
    again = kept_in(tmp_path).load(GPU).unfinished
    assert again is not None
    assert (again.interrupted(), again.options, again.failure) == ((done, one), left.options, "no luck")


def test_keeps_how_far_a_switch_is_and_whose_it_is(tmp_path: Path) -> None:
    entry = Entry(LESS, unfinished=UNFINISHED, owner=WIN11, failed="nothing worked")
    kept_in(tmp_path).save(GPU, entry)
    assert kept_in(tmp_path).load(GPU) == entry


@pytest.mark.parametrize("ends", [None, 4711.25])
def test_keeps_what_was_promised(ends: float | None, tmp_path: Path) -> None:
    """Also where nothing has to be restored: somebody else may have brought it to vfio."""
    entry = Entry(trial=Trial(60.0, ends))
    kept_in(tmp_path).save(GPU, entry)
    assert kept_in(tmp_path).load(GPU) == entry


def test_keeps_what_the_kernel_has_not_returned_from(tmp_path: Path) -> None:
    """Of that, what it takes to find it again."""
    stuck = replace(STUCK, pid=4712, process_state="D", kernel_wait="snd_card_free", stack=("snd_card_free",))
    kept_in(tmp_path).save(GPU, Entry(LESS, stuck))
    assert kept_in(tmp_path).load(GPU) == Entry(LESS, STUCK)
    kept_in(tmp_path).save(GPU, Entry(LESS))
    assert kept_in(tmp_path).load(GPU) == Entry(LESS)
    kept_in(tmp_path).save(GPU, Entry(NOTHING_TO_RESTORE, STUCK))
    assert kept_in(tmp_path).load(GPU) == Entry(NOTHING_TO_RESTORE, STUCK)


def test_what_no_process_sits_in_cannot_be_found_again(tmp_path: Path) -> None:
    kept_in(tmp_path).save(GPU, Entry(LESS, Pending("unbind 0000:01:00.0 from nvidia")))
    assert kept_in(tmp_path).load(GPU) == Entry(LESS)


def test_knows_for_which_gpus_something_is_kept(tmp_path: Path) -> None:
    journal = kept_in(tmp_path)
    assert journal.kept() == []
    far = at("10000:e1:00.0")
    for gpu in (far, GPU):
        journal.save(gpu, Entry(LESS))
    for name in ("metrics.json", "0000_01_00_0.bad", "0000_02_00_0.new"):
        (tmp_path / name).write_text("not one of them")
    assert journal.kept() == [GPU, far]
    assert kept_in(tmp_path / "missing").kept() == []


_CHANGES: list[dict[str, object]] = [
    {"format": 0},
    {"format": 1},
    {"format": 2},
    {"format": 4},
    {"format": 5},
    {"owed": None},
    {"owed": {}},
    {"boot": "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"},
    {"boot": None},
    {"owed": owed(functions=None)},
    {"owed": owed(functions=[])},
    {"owed": owed(functions={"01:00": {}})},
    {"owed": owed(functions={str(GPU): None})},
    {"owed": owed(functions={str(GPU): {"driver": "nvidia"}})},
    {"owed": owed(functions={str(GPU): KEPT | {"driver": 5}})},
    {"owed": owed(functions={str(GPU): KEPT | {"driver": True}})},
    {"owed": owed(functions={str(GPU): KEPT | {"module": []}})},
    {"owed": owed(functions={str(GPU): KEPT | {"override": {}}})},
    {"owed": owed(functions={str(GPU): KEPT | {"power_control": "off"}})},
    {"owed": owed(functions={str(GPU): KEPT | {"power_control": 1}})},
    {"owed": owed(units=None)},
    {"owed": owed(units=["sddm.service"])},
    {"owed": owed(units=[["sddm.service"]])},
    {"owed": owed(units=[["sddm.service", "1000"]])},
    {"owed": owed(units=[["sddm.service", True]])},
    {"owed": owed(units=[["sddm.service", 1000.0]])},
    {"owed": owed(units=[[7, None]])},
    {"owed": owed(modules=[7])},
    {"owed": owed(modules=7)},
    {"owed": owed(modules="nvidia")},
    {"owed": owed(terminals=["1"])},
    {"owed": owed(terminals=[True])},
    {"owed": owed(terminals=[1.5])},
    {"owed": owed(vtconsoles=[None])},
    {"owed": owed(vtconsoles="vtcon1")},
    {"owed": owed(beside=[["3", "01:00.0"]])},
    {"owed": owed(boot_framebuffers=[["efi-framebuffer.0"]])},
    {"owed": owed(boot_framebuffers=[["efi-framebuffer.0", None]])},
    {"owed": owed(boot_framebuffers=["ab"])},
    {"owed": owed(persistent=["nvidia0"])},
    {"owed": owed(persistent=[7])},
    {"stuck": ["unbind"]},
    {"stuck": ["unbind", "7", 9]},
    {"stuck": ["unbind", 7, True]},
    {"stuck": [None, 7, 9]},
    {"stuck": True},
    {"owed": owed(announced=[["sound"]])},
    {"owed": owed(announced=[["sound", ["card0"]]])},
    {"owed": owed(announced=[[7, []]])},
    {"unfinished": True},
    {"unfinished": {}},
    {"unfinished": BEGUN | {"target": "detaching"}},
    {"unfinished": BEGUN | {"target": None}},
    {"unfinished": BEGUN | {"index": "3"}},
    {"unfinished": BEGUN | {"started": "yesterday"}},
    {"unfinished": BEGUN | {"asker": "alice"}},
    {"unfinished": BEGUN | {"asker": BEGUN}},
    {"unfinished": BEGUN | {"worker": 4711}},
    {"unfinished": BEGUN | {"worker": [4711]}},
    {"unfinished": BEGUN | {"worker": [4711, "88"]}},
    {"owner": "win11"},
    {"owner": ["win11"]},
    {"owner": ["win11", 7]},
    {"failed": None},
]
_DAMAGED = [
    b"",
    b"\0" * 512,
    b"\xff\xfe",
    b"null",
    b"[]",
    b"7",
    b"{}",
    b'{"some": "other program"}',
    whole().encode()[:-9],
    *(whole(**changes).encode() for changes in _CHANGES),
]


@pytest.mark.parametrize("content", _DAMAGED, ids=range(len(_DAMAGED)))
def test_what_cannot_be_read_is_set_aside_with_a_warning(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "0000_01_00_0.json"
    path.write_bytes(content)
    assert kept_in(tmp_path).load(GPU) == Entry()
    assert names(tmp_path) == ["0000_01_00_0.bad"]
    assert path.with_suffix(".bad").read_bytes() == content
    assert str(path) in caplog.text


def test_a_directory_in_its_place_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "0000_01_00_0.json").mkdir()
    assert kept_in(tmp_path).load(GPU) == Entry()
    assert names(tmp_path) == ["0000_01_00_0.bad"]


def test_what_cannot_even_be_set_aside_does_not_stop_us(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the runtime directory is a file, nothing in it can be read or moved."""
    (tmp_path / "file").write_text("")
    assert kept_in(tmp_path / "file").load(GPU) == Entry()
    assert "cannot set" in caplog.text
    with pytest.raises(Failed, match=r"cannot remove the journal .*0000_01_00_0.json \(Not a directory\)"):
        kept_in(tmp_path / "file").save(GPU, Entry())


async def test_what_could_not_be_written_in_time_is_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a service that starts would believe something that is long over."""
    told: list[Entry] = []
    page = Page(kept_in(tmp_path), GPU, told.append)
    page.write(Entry(RESTORE_STATE))
    with monkeypatch.context() as broken:
        broken.setattr(DirectoryStore, "remove", no_room)
        page.write_if_possible(Entry())
    assert (page.entry, kept_in(tmp_path).load(GPU)) == (Entry(), Entry(RESTORE_STATE))
    page.close()
    assert kept_in(tmp_path).load(GPU) == Entry()
    assert told == [Entry(RESTORE_STATE), Entry(), Entry()]


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_refuses_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Failed, match=r"cannot write the journal .*0000_01_00_0.json"):
            kept_in(directory).save(GPU, Entry(RESTORE_STATE))
        with pytest.raises(Failed, match=r"cannot write the journal .* nothing was changed"):
            kept_in(directory).reserve(GPU)


_FULL_DISK = f"""
import resource, signal, sys
from pathlib import Path
from gpuswitch.errors import Failed
from gpuswitch.switch.journal.journal import Entry
from tests.unit.test_journal import GPU, RESTORE_STATE, kept_in
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, {resource.RLIM_INFINITY}))
try:
    kept_in(Path(sys.argv[1])).save(GPU, Entry(RESTORE_STATE))
except Failed as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the write fails in the middle, as on a disk without room."""
    kept_in(tmp_path).save(GPU, Entry(LESS))
    ended = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.startswith("cannot write the journal")
    assert kept_in(tmp_path).load(GPU) == Entry(LESS)
    kept_in(tmp_path).save(GPU, Entry(RESTORE_STATE))
    assert kept_in(tmp_path).load(GPU) == Entry(RESTORE_STATE)
    assert names(tmp_path) == ["0000_01_00_0.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_save_that_was_cut_short_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A daemon that died in it leaves a part of the new file beside the old one."""
    kept_in(tmp_path).save(GPU, Entry(RESTORE_STATE))
    (tmp_path / "0000_01_00_0.new").write_text(whole()[:20])
    assert kept_in(tmp_path).load(GPU) == Entry(RESTORE_STATE)
    kept_in(tmp_path).save(GPU, Entry(LESS))
    assert kept_in(tmp_path).load(GPU) == Entry(LESS)
    assert names(tmp_path) == ["0000_01_00_0.json"]


def test_who_reads_the_old_file_still_reads_the_old_file(tmp_path: Path) -> None:
    """It is replaced, never written over."""
    kept_in(tmp_path).save(GPU, Entry(RESTORE_STATE))
    with (tmp_path / "0000_01_00_0.json").open() as old:
        before = (tmp_path / "0000_01_00_0.json").read_text()
        kept_in(tmp_path).save(GPU, Entry(LESS))
        assert old.read() == before


_drivers = st.none() | st.builds(Driver, st.text(min_size=1), st.none() | st.text(min_size=1))
_addresses = st.builds(
    PciAddress, st.integers(0, 0xFFFFFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7)
)


_texts = st.text(max_size=8)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    """What an attribute of a function may be, by its hint."""
    kind, *beyond = get_args(hint)
    few = [value for each in beyond if isinstance(each, OneOf) for value in each.values]
    there: st.SearchStrategy[Any] = st.sampled_from(few) if few else _texts
    return st.none() | there if NoneType in get_args(kind) else there


_hints = get_type_hints(Captured, include_extras=True)
_captured: dict[str, st.SearchStrategy[Any]] = {"driver": _drivers} | {
    name: _values(_hints[name]) for name in ATTRIBUTES
}
_units = st.lists(st.builds(Unit, _texts, st.none() | st.integers(0, 2**32))).map(tuple)
_kept: dict[str, st.SearchStrategy[Any]] = {
    "functions": st.dictionaries(_addresses, st.builds(Captured, **_captured), max_size=4),
    "units": _units,
    "restarted": _units,
    "attributes": st.dictionaries(
        st.builds(FunctionAttribute, _addresses, st.sampled_from(["d3cold_allowed", "power/control"])),
        st.builds(AttributeChange, _texts, _texts),
        max_size=3,
    ),
    "access": st.lists(
        st.builds(UserAccess, st.integers(0, NO_USER - 1), st.sampled_from(["/dev/iommu", "/dev/vfio/devices/vfio0"]))
    ).map(tuple),
    "modules": st.lists(_texts).map(tuple),
    "terminals": st.lists(st.integers(1, 63)).map(tuple),
    "vtconsoles": st.lists(_texts).map(tuple),
    "shown_by_others": st.lists(st.tuples(st.integers(1, 63), _addresses)).map(tuple),
    "boot_framebuffers": st.lists(st.tuples(_texts, _texts)).map(tuple),
    "persistent": st.lists(_addresses).map(tuple),
    "announced": st.lists(st.tuples(_texts, st.lists(_addresses).map(tuple))).map(tuple),
}
_restore_states = st.builds(RestoreState, **_kept)


def test_every_field_that_is_kept_is_among_the_examples() -> None:
    assert _captured.keys() == {each.name for each in fields(Captured)}
    assert _kept.keys() == {each.name for each in fields(RestoreState)}


_requester = st.builds(
    Requester, st.none() | st.integers(0), st.none() | st.integers(0), _texts, _texts, _texts, service=st.booleans()
)
_unfinished = st.none() | st.builds(
    Unfinished,
    _texts,
    st.sampled_from([State.HOST, State.VFIO]),
    _requester,
    st.floats(0, 2**40),
    st.integers(0),
    st.integers(0),
    _texts,
    st.booleans(),
    st.none() | st.builds(Process, st.integers(1), st.integers(0)),
    _texts,
    st.floats(0, 2**40),
    _texts,
    _texts,
    st.builds(
        Options,
        st.none() | st.sampled_from(Busy),
        st.none() | st.floats(0, 2**20),
        st.lists(_texts).map(tuple),
        st.none() | st.floats(0, 2**20),
    ),
    st.lists(
        st.builds(
            StepRecord,
            st.integers(1),
            _texts,
            _texts,
            st.sampled_from(Status),
            st.floats(0, 2**40),
            st.floats(0, 2**20),
        )
    ).map(tuple),
)
_owner = st.none() | st.builds(Owner, _texts, _texts)
_stuck = st.none() | st.builds(Pending, _texts, worker=st.builds(Process, st.integers(1), st.integers(0)))


@given(entry=st.builds(Entry, _restore_states, _stuck, _unfinished, _owner, _texts, _texts))
def test_anything_comes_back_as_it_was(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> None:
    journal = kept_in(tmp_path_factory.mktemp("journal"))
    journal.save(GPU, entry)
    assert journal.load(GPU) == entry
