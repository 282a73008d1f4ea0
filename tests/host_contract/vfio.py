"""Cases about IOMMU groups, their nodes, and who owns them."""

from __future__ import annotations

import asyncio
import errno

from gpuswitch.errors import KernelError
from gpuswitch.host.port import Pending
from gpuswitch.model.access import UserAccess
from gpuswitch.model.facts import VFIO_DRIVER, Kind
from tests.host_contract.harness import ContractHarness, case, refused


@case
async def group_has_a_node_while_a_function_is_on_vfio(harness: ContractHarness) -> None:
    def has_node() -> bool:
        return str(harness.group) in harness.host.look().vfio_nodes

    assert not has_node()
    await harness.to_vfio(harness.audio)
    await harness.until(has_node)
    await harness.to_vfio(harness.display)
    await harness.unbind(harness.audio)
    assert has_node()
    await harness.unbind(harness.display)
    await harness.until(lambda: not has_node())


@case
async def user_who_may_open_a_group(harness: ContractHarness) -> None:
    """By an entry of his own, which goes when it is taken, or with the node."""
    nodes, node = harness.host.device_nodes, f"/dev/vfio/{harness.group}"
    kim, max_ = UserAccess(1234, node), UserAccess(1235, node)
    assert nodes.of(harness.functions) == ((), False)
    try:
        nodes.permissions(kim)
    except KernelError as error:
        assert error.errno == errno.ENOENT  # noqa: PT017 -- no pytest where the real host is
    else:
        raise AssertionError("there is a node before anything is on vfio")
    nodes.take(kim)
    await harness.to_vfio(*harness.functions)
    await harness.until(lambda: not nodes.of(harness.functions).pending)
    assert node in nodes.of(harness.functions).names
    assert nodes.permissions(kim) is None
    for who in (kim, max_):
        nodes.give(who)
        nodes.give(who)
    nodes.take(max_)
    nodes.take(max_)
    assert (nodes.permissions(kim), nodes.permissions(max_)) == ("rw", None)
    await harness.unbind(harness.audio)
    await harness.unbind(harness.display)
    await harness.until(lambda: nodes.of(harness.functions).names == ())
    await harness.to_vfio(*harness.functions)
    await harness.until(lambda: node in nodes.of(harness.functions).names)
    assert nodes.permissions(kim) is None


@case
async def group_without_a_node(harness: ContractHarness) -> None:
    await refused(harness.kernel.hold_group(harness.group), errno.ENOENT)


@case
async def group_that_somebody_has_open(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    await harness.external.open_group(harness.group)
    await refused(harness.kernel.hold_group(harness.group), errno.EBUSY)
    await harness.external.close_group(harness.group)
    await harness.kernel.hold_group(harness.group)


@case
async def group_that_we_hold_is_nobody_elses(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    await harness.kernel.hold_group(harness.group)
    await harness.kernel.hold_group(harness.group)
    await refused(harness.external.open_group(harness.group), errno.EBUSY)
    await harness.kernel.release_group(harness.group)
    await harness.external.open_group(harness.group)
    await harness.kernel.release_group(harness.group)
    await refused(harness.kernel.hold_group(harness.group), errno.EBUSY)


@case
async def host_that_closes_lets_its_groups_go(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    await harness.kernel.hold_group(harness.group)
    await harness.host.close()
    await harness.external.open_group(harness.group)


@case
async def unbind_works_while_we_hold_the_group(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    await harness.kernel.hold_group(harness.group)
    await harness.kernel.set_override(dict.fromkeys(harness.functions, None))
    for function in harness.functions:
        await harness.unbind(function)
    await harness.kernel.release_group(harness.group)
    await harness.kernel.probe(harness.display)
    assert harness.look(harness.display).driver == harness.display_driver


@case
async def bind_succeeds_in_a_group_that_is_not_viable(harness: ContractHarness) -> None:
    """vfio-pci finds nothing wrong; it is the VM that cannot have the group."""
    group = harness.look(harness.crowded).iommu_group
    assert group is not None
    await harness.to_vfio(harness.crowded)
    await harness.until(lambda: str(group) in harness.host.look().vfio_nodes)
    neighbours = [f for f in harness.host.look().group(group) if f.kind not in {Kind.BRIDGE, Kind.DISPLAY}]
    assert [f.driver_name for f in neighbours] != []
    assert None not in [f.driver_name for f in neighbours]
    await refused(harness.external.start_vm([harness.crowded]), errno.EPERM)


@case
async def host_driver_cannot_join_a_vm(harness: ContractHarness) -> None:
    """The group's DMA is the VM's: the probe fails, and says so."""
    await harness.to_vfio(harness.display)
    await harness.unbind(harness.audio)
    await harness.external.start_vm([harness.display])
    await refused(harness.kernel.probe(harness.audio), errno.EINVAL)
    assert harness.driver(harness.audio) is None
    await harness.to_vfio(harness.audio)
    await harness.unbind(harness.audio)
    await harness.kernel.set_override({harness.audio: None})
    await harness.external.stop_vm()
    await harness.kernel.probe(harness.audio)
    assert harness.look(harness.audio).driver == harness.audio_driver


@case
async def unbind_waits_for_a_vm(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    await harness.external.start_vm(harness.functions)
    await refused(harness.kernel.hold_group(harness.group), errno.EBUSY)
    waiting = asyncio.create_task(harness.kernel.unbind(harness.display, VFIO_DRIVER))
    await harness.until(lambda: (harness.kernel.pending or Pending("")).process_state in {"S", "D"})
    await harness.until(lambda: harness.driver(harness.display) is None)
    assert not waiting.done()
    await harness.external.stop_vm()
    await waiting
    assert harness.kernel.pending is None
