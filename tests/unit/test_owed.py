"""What is owed, added up over switches."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.host.port import AttributeChange, Captured
from gpuswitch.model.attribute import FunctionAttribute
from gpuswitch.model.facts import Driver
from gpuswitch.model.holders import Unit
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState, SharedSetting
from tests.harness.facts import at

GPU, SOUND, OTHER = at("0000:01:00.0"), at("0000:01:00.1"), at("0000:02:00.0")
SDDM, PERSISTENCED = Unit("sddm.service"), Unit("nvidia-persistenced.service")
BRIDGE, CHANGE = FunctionAttribute(at("0000:00:01.0"), "d3cold_allowed"), AttributeChange("1", "0")
ON_NVIDIA = Captured(Driver("nvidia", "nvidia"), None, "auto")
ON_NOUVEAU = Captured(Driver("nouveau", "nouveau"), None, "on")


@pytest.mark.parametrize(
    "something",
    [
        RestoreState({GPU: ON_NVIDIA}),
        RestoreState(units=(SDDM,)),
        RestoreState(modules=("nvidia",)),
        RestoreState(terminals=(1,)),
        RestoreState(vtconsoles=("vtcon1",)),
        RestoreState(shown_by_others=((3, GPU),)),
        RestoreState(boot_framebuffers=(("efi-framebuffer.0", "efi-framebuffer"),)),
        RestoreState(persistent=(GPU,)),
        RestoreState(attributes={BRIDGE: CHANGE}),
    ],
)
def test_anything_owed_is_something(something: RestoreState) -> None:
    assert something
    assert not RestoreState()
    assert not NOTHING_TO_RESTORE


def test_of_one_function_what_it_had_at_first() -> None:
    later, earlier = RestoreState({GPU: ON_NOUVEAU, SOUND: ON_NOUVEAU}), RestoreState({GPU: ON_NVIDIA})
    assert later.and_before(earlier).functions == {GPU: ON_NVIDIA, SOUND: ON_NOUVEAU}


def test_units_of_both_each_once_the_earlier_first() -> None:
    later, earlier = RestoreState(units=(PERSISTENCED, SDDM)), RestoreState(units=(SDDM,))
    assert later.and_before(earlier).units == (SDDM, PERSISTENCED)
    assert later.and_unit(SDDM) == later
    assert earlier.and_unit(PERSISTENCED).units == (SDDM, PERSISTENCED)


def test_modules_keep_the_order_in_which_they_were_loaded() -> None:
    earlier, later = RestoreState(modules=("nvidia", "nvidia_drm")), RestoreState(modules=("nouveau",))
    assert later.and_before(earlier).modules == ("nvidia", "nvidia_drm")
    assert later.and_before(NOTHING_TO_RESTORE).modules == ("nouveau",)


def test_a_terminal_stays_where_it_was_at_first() -> None:
    """What somebody's terminals are shown on while the GPU is away is nobody's but theirs."""
    earlier, later = (
        RestoreState(terminals=(1, 2), shown_by_others=((3, OTHER),)),
        RestoreState(terminals=(3, 4), shown_by_others=((1, OTHER), (5, OTHER))),
    )
    both = later.and_before(earlier)
    assert both.terminals == (1, 2, 4)
    assert sorted(both.shown_by_others) == [(3, OTHER), (5, OTHER)]


def test_of_one_attribute_what_was_recorded_first() -> None:
    later = RestoreState(attributes={BRIDGE: AttributeChange("0", "0")})
    earlier = RestoreState(attributes={BRIDGE: CHANGE})
    assert later.and_before(earlier) == earlier


_names = st.sampled_from(["a", "b", "c"])
_restore_states = st.builds(
    RestoreState,
    functions=st.dictionaries(st.sampled_from([GPU, SOUND]), st.sampled_from([ON_NVIDIA, ON_NOUVEAU])),
    units=st.lists(st.builds(Unit, _names, st.sampled_from([None, 1000])), unique=True).map(tuple),
    modules=st.lists(_names, unique=True).map(tuple),
    terminals=st.lists(st.integers(1, 6), unique=True).map(tuple),
    vtconsoles=st.lists(_names, unique=True).map(tuple),
    shown_by_others=st.dictionaries(st.integers(1, 6), st.sampled_from([GPU, SOUND])).map(lambda d: tuple(d.items())),
    boot_framebuffers=st.lists(st.tuples(_names, _names), unique=True).map(tuple),
    persistent=st.lists(st.sampled_from([GPU, SOUND]), unique=True).map(tuple),
    attributes=st.dictionaries(
        st.builds(FunctionAttribute, st.sampled_from([GPU, OTHER]), _names), st.builds(AttributeChange, _names, _names)
    ),
).filter(lambda restore_state: dict(restore_state.shown_by_others).keys().isdisjoint(restore_state.terminals))


@given(_restore_states, _restore_states)
def test_nothing_that_was_owed_before_is_lost(later: RestoreState, earlier: RestoreState) -> None:
    both = later.and_before(earlier)
    assert earlier.functions.items() <= both.functions.items()
    assert earlier.attributes.items() <= both.attributes.items()
    for field in fields(RestoreState):
        if field.name != "functions":
            assert set(getattr(earlier, field.name)) <= set(getattr(both, field.name))
            assert set(getattr(both, field.name)) <= {*getattr(earlier, field.name), *getattr(later, field.name)}


@given(_restore_states)
def test_a_switch_that_owes_nothing_changes_nothing(restore_state: RestoreState) -> None:
    assert NOTHING_TO_RESTORE.and_before(restore_state) == restore_state
    assert restore_state.and_before(NOTHING_TO_RESTORE) == restore_state
    assert restore_state.and_before(restore_state) == restore_state


@given(_restore_states, _restore_states)
def test_what_is_restored_is_owed_no_more(restore_state: RestoreState, restored: RestoreState) -> None:
    left = restore_state.without(restored)
    for field in fields(RestoreState):
        values, gone = getattr(restore_state, field.name), getattr(restored, field.name)
        assert set(getattr(left, field.name)) == set(values) - set(gone)
    assert left.functions.items() <= restore_state.functions.items()
    assert left.attributes.items() <= restore_state.attributes.items()
    assert restore_state.without(NOTHING_TO_RESTORE) == restore_state
    assert restore_state.without(restore_state) == NOTHING_TO_RESTORE


@given(_restore_states)
def test_what_is_shared_is_not_the_gpus_own(restore_state: RestoreState) -> None:
    shared, own = restore_state.shared, restore_state.without(restore_state.shared)
    assert shared == RestoreState(units=restore_state.units, attributes=restore_state.attributes)
    assert own.and_before(shared) == restore_state
    assert own.settings == frozenset()
    units = {SharedSetting("units", unit) for unit in restore_state.units}
    attributes = {SharedSetting("attributes", attribute) for attribute in restore_state.attributes}
    assert shared.settings == restore_state.settings == units | attributes
