"""The user whose process has a GPU may open its nodes of vfio: as long as that runs, and no longer."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from gpuswitch.errors import Failed, GpuswitchError, NotViable
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Errno
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.access import UserAccess
from gpuswitch.model.owner import Owner
from gpuswitch.model.policy import AS_CONFIGURED, Release
from gpuswitch.model.states import State
from gpuswitch.switch.record import Requester
from tests.harness.simulated.harness import Harness, config
from tests.simulated_host.test_owners import GROUP, home
from tests.simulated_host.test_owners_process import settled, somebody_moves, start_harness

ALICE, BOB = 1000, 1001
NODE = f"/dev/vfio/{GROUP}"


@pytest.fixture
async def harness(tmp_path: Path) -> Harness:
    return await start_harness(tmp_path)


@pytest.fixture
def actor(harness: Harness) -> Actor:
    return harness.fleet.find("01:00.0")


async def acquire(harness: Harness, *actors: Actor, uid: int = ALICE, name: str = "qemu") -> Owner:
    process = harness.machine.run(name, uid=uid)
    owner = Owner(f"{name} (pid {process.pid})", f"uuid of {name}", process)
    requester = Requester(uid, process.pid, command="gpuswitchctl")
    await harness.fleet.owners.acquire_for_process(owner, actors, requester, AS_CONFIGURED, uid)
    return owner


def may_open(harness: Harness) -> set[UserAccess]:
    return set(harness.machine.access.entries)


async def test_while_the_process_runs_and_no_longer(harness: Harness, actor: Actor) -> None:
    before = harness.snapshot()
    await acquire(harness, actor)
    assert may_open(harness) == {UserAccess(ALICE, NODE)}
    # What it has left has it open still, and opens nothing anew.
    harness.machine.open_group(GROUP, "a child")
    harness.machine.end("qemu")
    await settled()
    assert (may_open(harness), actor.state) == (set(), State.VFIO)
    harness.machine.end("a child")
    await home(harness, actor)
    assert (harness.snapshot(), harness.pages) == (before, [])


async def test_the_others_of_this_machine_may_not(harness: Harness, actor: Actor) -> None:
    await harness.fleet.owners.acquire_for_process(
        Owner("qemu", "a uuid", harness.machine.run("qemu")), [actor], Requester(ALICE), AS_CONFIGURED
    )
    assert may_open(harness) == set()


async def test_it_stays_on_vfio(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path, on_release=Release.STAY)
    actor = harness.fleet.find("01:00.0")
    await acquire(harness, actor)
    harness.machine.end("qemu")
    await settled()
    assert (actor.state, actor.owner, may_open(harness)) == (State.VFIO, None, set())
    await acquire(harness, actor, uid=BOB, name="another")
    assert may_open(harness) == {UserAccess(BOB, NODE)}


async def test_what_somebody_else_gave_stays(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path, on_release=Release.STAY)
    actor = harness.fleet.find("01:00.0")
    await actor.request(State.VFIO)
    await actor.runner.rest()
    harness.machine.access.entries[UserAccess(ALICE, NODE)] = "rw"
    await acquire(harness, actor)
    assert not actor.record.restore_state.access
    harness.machine.end("qemu")
    await settled()
    assert may_open(harness) == {UserAccess(ALICE, NODE)}


async def test_who_is_kept_out_by_his_own_entry_is_refused(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path, on_release=Release.STAY)
    actor = harness.fleet.find("01:00.0")
    await actor.request(State.VFIO)
    await actor.runner.rest()
    harness.machine.access.entries[UserAccess(ALICE, NODE)] = ""
    remedy = f"says that uid {ALICE} may not read and write it: change that first: setfacl -x u:{ALICE} {NODE}"
    with pytest.raises(Failed, match=remedy):
        await acquire(harness, actor)
    await settled()
    assert (actor.owner, harness.machine.access.entries) == (None, {UserAccess(ALICE, NODE): ""})


async def test_a_kernel_without_such_lists(harness: Harness, actor: Actor) -> None:
    before = harness.snapshot()
    harness.machine.access.supported = False
    with pytest.raises(Failed, match=f"cannot change the access control list of {NODE}"):
        await acquire(harness, actor)
    harness.machine.end("qemu")
    await home(harness, actor)
    assert (actor.owner, harness.snapshot(), harness.pages) == (None, before, [])


async def test_what_cannot_be_taken_back_keeps_it_from_everybody(harness: Harness, actor: Actor) -> None:
    await acquire(harness, actor)
    harness.host.faults.add(Errno(errno.EIO), operation="access", nth=1)
    harness.host.faults.add(Errno(errno.EIO), operation="access", nth=2)
    harness.machine.end("qemu")
    await asyncio.sleep(0)
    await home(harness, actor)
    assert may_open(harness) == set()


async def test_it_is_told_as_long_as_it_cannot_be_taken_back(harness: Harness, actor: Actor) -> None:
    await acquire(harness, actor)
    for nth in range(1, 4):
        harness.host.faults.add(Errno(errno.EIO), operation="access", nth=nth)
    harness.machine.end("qemu")
    await harness.witness.until(lambda: "may open it still" in actor.record.reason)
    await home(harness, actor)
    assert (may_open(harness), actor.record.reason) == (set(), "")


async def test_nobody_else_gets_it_as_long_as_a_user_may_open_it(harness: Harness, actor: Actor) -> None:
    await acquire(harness, actor)
    for nth in range(1, 5):
        harness.host.faults.add(Errno(errno.EIO), operation="access", nth=nth)
    harness.machine.end("qemu")
    await harness.witness.until(lambda: "may open it still" in actor.record.reason)
    with pytest.raises(GpuswitchError):
        await acquire(harness, actor, uid=BOB, name="another")
    assert UserAccess(BOB, NODE) not in may_open(harness)
    await home(harness, actor)
    assert may_open(harness) == set()


async def test_udev_has_the_first_word(harness: Harness, actor: Actor) -> None:
    """What it sets takes an entry away that was there before."""
    harness.machine.access.pending = True
    asking = asyncio.create_task(acquire(harness, actor))
    await harness.witness.until(lambda: actor.state is State.VFIO)
    await asyncio.sleep(1)  # of the virtual clock: by then all is done that does not wait for udev
    assert may_open(harness) == set()
    harness.machine.access.pending = False
    harness.machine.uevent()
    await asking
    assert may_open(harness) == {UserAccess(ALICE, NODE)}


async def test_one_that_says_nothing_is_not_waited_for_for_ever(harness: Harness, actor: Actor) -> None:
    harness.machine.access.pending = True
    await acquire(harness, actor)
    assert may_open(harness) == {UserAccess(ALICE, NODE)}


async def test_who_leaves_before_the_answer_has_nothing(harness: Harness, actor: Actor) -> None:
    harness.machine.access.pending = True
    before = harness.snapshot()
    asking = asyncio.create_task(acquire(harness, actor))
    await harness.witness.until(lambda: actor.state is State.VFIO)
    asking.cancel()
    harness.machine.end("qemu")
    await home(harness, actor)
    assert (harness.snapshot(), harness.pages) == (before, [])


@pytest.mark.parametrize("alive", [True, False])
async def test_the_service_starts_anew(harness: Harness, actor: Actor, *, alive: bool) -> None:
    await acquire(harness, actor)
    harness.fleet.owners.stop()
    if not alive:
        harness.machine.end("qemu")
    assert may_open(harness) == {UserAccess(ALICE, NODE)}
    harness = await harness.again()
    harness.fleet.owners.ready()
    actor = harness.fleet.find("01:00.0")
    if alive:
        await settled()
        assert may_open(harness) == {UserAccess(ALICE, NODE)}
        harness.machine.end("qemu")
    await home(harness, actor)
    assert (may_open(harness), harness.pages) == (set(), [])


async def test_somebody_brings_it_home_meanwhile(tmp_path: Path) -> None:
    harness = await start_harness(tmp_path, "single")
    actor = harness.fleet.find("01:00.0")
    await acquire(harness, actor)
    for function in actor.gpu.functions:
        await somebody_moves(harness, function)
    await settled()
    assert (actor.owner, actor.state, may_open(harness)) == (None, State.HOST, set())
    assert not actor.record.restore_state


class TestSeveral:
    """Two of nvidia's on a kernel with nodes for each function: they have /dev/iommu in common."""

    @pytest.fixture
    async def harness(self, tmp_path: Path) -> Harness:
        host = SCENARIOS["server"]()
        host.machine.vfio_devices = True
        return await Harness.start(host, tmp_path, config("server"))

    async def test_what_they_share_goes_with_the_last(self, harness: Harness) -> None:
        first, second = (harness.fleet.find(address) for address in ("11:00.0", "21:00.0"))
        shared = UserAccess(ALICE, "/dev/iommu")
        await acquire(harness, first)
        own = may_open(harness)
        assert {access.node.rpartition("/")[0] for access in own} == {"/dev", "/dev/vfio", "/dev/vfio/devices"}
        await acquire(harness, second, name="another")
        assert own < may_open(harness)
        harness.machine.end("qemu")
        await home(harness, first)
        assert may_open(harness) & own == {shared}
        harness.machine.end("another")
        await home(harness, second)
        assert (may_open(harness), harness.pages) == (set(), [])

    async def test_of_two_users_each_has_his_own(self, harness: Harness) -> None:
        first, second = (harness.fleet.find(address) for address in ("11:00.0", "21:00.0"))
        await acquire(harness, first)
        await acquire(harness, second, uid=BOB, name="another")
        nodes = {uid: {a.node for a in may_open(harness) if a.uid == uid} for uid in (ALICE, BOB)}
        assert nodes[ALICE] & nodes[BOB] == {"/dev/iommu"}
        harness.machine.end("qemu")
        await home(harness, first)
        assert {access.uid for access in may_open(harness)} == {BOB}


async def test_a_group_with_something_else_on_vfio_is_not_handed_to_a_user(tmp_path: Path) -> None:
    """Who may open it may use all in it."""
    host = SCENARIOS["shared"]()
    nic = next(a for a in host.machine.devices if str(a).startswith("0000:02:00"))
    harness = await Harness.start(host, tmp_path, config("laptop"))
    kernel = harness.host.kernel("somebody")
    driver = harness.machine.devices[nic].link
    assert driver is not None
    await kernel.load("vfio_pci")
    await kernel.set_override({nic: "vfio-pci"})
    await kernel.unbind(nic, driver.name)
    await kernel.probe(nic)
    actor = harness.fleet.find("01:00.0")
    before = harness.snapshot()
    await asyncio.sleep(1)  # of the virtual clock: the service has looked again by then
    refused = rf"IOMMU group \d+ has {nic} on vfio-pci, too, and whoever may open /dev/vfio/\d+ may use that"
    with pytest.raises(NotViable, match=refused):
        await acquire(harness, actor)
    harness.machine.end("qemu")
    await settled()
    assert (actor.owner, actor.state, harness.snapshot()) == (None, State.HOST, before)
