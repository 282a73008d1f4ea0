"""What a look says about a GPU: its state, derived from driver links, never from what we last wished."""

from __future__ import annotations

from gpuswitch.model.facts import Driver, HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.sentence import Sentence
from gpuswitch.switch.restore_state import RestoreState


def observe(gpu: Gpu, facts: HostFacts, restore_state: RestoreState) -> State:
    """State.HOST, VFIO, ABSENT, or UNKNOWN for what is none of these.

    Where nothing is to be restored, the drivers that the functions have, other than vfio's, are the host's choice: its
    baseline.
    """
    if gpu.address not in facts.functions:
        return State.ABSENT
    present = gpu.present(facts)
    if len(present) < len(gpu.functions):
        return State.UNKNOWN
    on_vfio = {function.on_vfio for function in present}
    if on_vfio == {True}:
        return State.VFIO
    if True in on_vfio:
        return State.UNKNOWN
    kept = restore_state.functions
    home = all(f.driver_name == _name(kept[f.address].driver) for f in present if f.address in kept)
    return State.HOST if home else State.UNKNOWN


def _name(driver: Driver | None) -> str | None:
    # By name alone: the module of a driver that was not loaded yet is a guess, and wrong where it is built in.
    return driver.name if driver else None


def explain(gpu: Gpu, facts: HostFacts) -> str:
    """Why a GPU is neither host nor vfio."""
    return f"neither host nor vfio: {whereabouts(gpu, facts)}"


def place(gpu: Gpu, facts: HostFacts) -> Sentence:
    """Where a GPU in a known-good state is, in words: on the host, or on which vfio driver."""
    display = facts.functions.get(gpu.address)
    if display is not None and display.on_vfio:
        return Sentence("on {driver}", driver=display.driver_name)
    return Sentence("on the host")


def whereabouts(gpu: Gpu, facts: HostFacts) -> str:
    """Each function and where it is."""
    where = [f"{f.address} is on {f.driver_name or 'no driver'}" for f in gpu.present(facts)]
    where += [f"{address} is not on the PCI bus" for address in gpu.missing(facts)]
    return ", ".join(where)
