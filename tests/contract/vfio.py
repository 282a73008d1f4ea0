"""Cases about IOMMU groups, their nodes, and who owns them."""

from __future__ import annotations

import asyncio
import errno

from gpuswitch.host.port import Pending
from gpuswitch.model.facts import VFIO_DRIVER, Kind
from tests.contract.bench import Bench, case, refused


@case
async def group_has_a_node_while_a_function_is_on_vfio(bench: Bench) -> None:
    def has_node() -> bool:
        return str(bench.group) in bench.host.look().vfio_nodes

    assert not has_node()
    await bench.to_vfio(bench.audio)
    await bench.until(has_node)
    await bench.to_vfio(bench.display)
    await bench.unbind(bench.audio)
    assert has_node()
    await bench.unbind(bench.display)
    await bench.until(lambda: not has_node())


@case
async def group_without_a_node(bench: Bench) -> None:
    await refused(bench.kernel.hold_group(bench.group), errno.ENOENT)


@case
async def group_that_somebody_has_open(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    await bench.outside.open_group(bench.group)
    await refused(bench.kernel.hold_group(bench.group), errno.EBUSY)
    await bench.outside.close_group(bench.group)
    await bench.kernel.hold_group(bench.group)


@case
async def group_that_we_hold_is_nobody_elses(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    await bench.kernel.hold_group(bench.group)
    await bench.kernel.hold_group(bench.group)
    await refused(bench.outside.open_group(bench.group), errno.EBUSY)
    await bench.kernel.release_group(bench.group)
    await bench.outside.open_group(bench.group)
    await bench.kernel.release_group(bench.group)
    await refused(bench.kernel.hold_group(bench.group), errno.EBUSY)


@case
async def host_that_closes_lets_its_groups_go(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    await bench.kernel.hold_group(bench.group)
    await bench.host.close()
    await bench.outside.open_group(bench.group)


@case
async def unbind_works_while_we_hold_the_group(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    await bench.kernel.hold_group(bench.group)
    await bench.kernel.set_override(dict.fromkeys(bench.functions, None))
    for function in bench.functions:
        await bench.unbind(function)
    await bench.kernel.release_group(bench.group)
    await bench.kernel.probe(bench.display)
    assert bench.look(bench.display).driver == bench.display_driver


@case
async def bind_succeeds_in_a_group_that_is_not_viable(bench: Bench) -> None:
    """vfio-pci finds nothing wrong; it is the VM that cannot have the group."""
    group = bench.look(bench.crowded).iommu_group
    assert group is not None
    await bench.to_vfio(bench.crowded)
    await bench.until(lambda: str(group) in bench.host.look().vfio_nodes)
    neighbours = [f for f in bench.host.look().group(group) if f.kind not in {Kind.BRIDGE, Kind.DISPLAY}]
    assert [f.driver_name for f in neighbours] != []
    assert None not in [f.driver_name for f in neighbours]
    await refused(bench.outside.start_vm([bench.crowded]), errno.EPERM)


@case
async def host_driver_cannot_join_a_vm(bench: Bench) -> None:
    """The group's DMA is the VM's: the probe fails, and says so."""
    await bench.to_vfio(bench.display)
    await bench.unbind(bench.audio)
    await bench.outside.start_vm([bench.display])
    await refused(bench.kernel.probe(bench.audio), errno.EINVAL)
    assert bench.driver(bench.audio) is None
    await bench.to_vfio(bench.audio)
    await bench.unbind(bench.audio)
    await bench.kernel.set_override({bench.audio: None})
    await bench.outside.stop_vm()
    await bench.kernel.probe(bench.audio)
    assert bench.look(bench.audio).driver == bench.audio_driver


@case
async def unbind_waits_for_a_vm(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    await bench.outside.start_vm(bench.functions)
    await refused(bench.kernel.hold_group(bench.group), errno.EBUSY)
    waiting = asyncio.create_task(bench.kernel.unbind(bench.display, VFIO_DRIVER))
    await bench.until(lambda: (bench.kernel.pending or Pending("")).process_state in {"S", "D"})
    await bench.until(lambda: bench.driver(bench.display) is None)
    assert not waiting.done()
    await bench.outside.stop_vm()
    await waiting
    assert bench.kernel.pending is None
