"""Cases about processes: who has what open, when that ends, and how somebody is told to end."""

from __future__ import annotations

import asyncio
from signal import SIGTERM

from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Holder, HolderQuery
from tests.host_contract.harness import ContractHarness, case


async def only_holder(harness: ContractHarness, *functions: PciAddress) -> Holder:
    [holder] = (await harness.scan(*functions)).holders
    return holder


async def start_to_wait(harness: ContractHarness) -> tuple[Holder, asyncio.Task[None]]:
    """Somebody opens the sound card, and we wait for him to stir."""
    await harness.external.open(harness.audio)
    holder = await only_holder(harness, harness.audio)
    waiting = asyncio.create_task(harness.host.processes.wait_for_change([holder]))
    assert await only_holder(harness, harness.audio) == holder
    assert not waiting.done()
    return holder, waiting


@case
async def nobody_has_it_open(harness: ContractHarness) -> None:
    modules = str(harness.audio_driver.module), "no_such_module_here"
    scan = await harness.scan(*harness.functions, nodes=["no-such-node", "vfio/[0-9]*"], modules=modules)
    assert scan.holders == ()
    assert scan.numbers


@case
async def scan_names_who_has_a_node_open(harness: ContractHarness) -> None:
    for function, folder in ((harness.display, "/dev/dri/"), (harness.audio, "/dev/snd/")):
        pid = await harness.external.open(function)
        holder = await only_holder(harness, *harness.functions)
        assert (holder.pid, holder.command) == (pid, harness.external.command)
        assert (holder.uid, holder.user, holder.doubt, holder.machine) == (0, "root", "", False)
        [node] = holder.nodes
        assert node.startswith(folder)
        await harness.external.close(function)
        assert (await harness.scan(*harness.functions)).holders == ()


@case
async def scan_looks_at_the_functions_that_it_is_asked_about(harness: ContractHarness) -> None:
    await harness.external.open(harness.audio)
    assert (await harness.scan(harness.display)).holders == ()
    assert (await harness.scan(harness.crowded)).holders == ()


@case
async def scan_finds_a_mapping(harness: ContractHarness) -> None:
    pid = await harness.external.map(harness.display)
    holder = await only_holder(harness, harness.display)
    assert holder.pid == pid
    assert holder.nodes
    await harness.external.close(harness.display)
    assert (await harness.scan(harness.display)).holders == ()


@case
async def scan_finds_by_number_what_sysfs_shows_no_more(harness: ContractHarness) -> None:
    pid = await harness.external.open(harness.display)
    seen = await harness.scan(harness.display)
    await harness.unbind(harness.display)
    scan = await harness.host.processes.scan(HolderQuery((harness.display,), numbers=seen.numbers))
    assert [holder.pid for holder in scan.holders] == [pid]


@case
async def scan_finds_who_has_the_group(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    node = f"vfio/{harness.group}"
    assert (await harness.scan(*harness.functions, nodes=[node])).holders == ()
    pid = await harness.external.open_group(harness.group)
    [holder] = (await harness.scan(*harness.functions, nodes=[node])).holders
    assert (holder.pid, holder.nodes, holder.machine) == (pid, (f"/dev/{node}",), True)
    await harness.external.close_group(harness.group)
    assert (await harness.scan(*harness.functions, nodes=[node])).holders == ()


@case
async def scan_does_not_name_ourselves(harness: ContractHarness) -> None:
    await harness.to_vfio(*harness.functions)
    await harness.kernel.hold_group(harness.group)
    assert (await harness.scan(*harness.functions, nodes=[f"vfio/{harness.group}"])).holders == ()


@case
async def scan_tells_of_references_that_no_process_explains(harness: ContractHarness) -> None:
    module = str(harness.audio_driver.module)
    await harness.external.hide(harness.audio)
    [holder] = (await harness.scan(harness.audio, modules=[module])).holders
    assert (holder.process, holder.command, holder.nodes) == (None, module, ())
    assert module in holder.doubt
    await harness.external.close(harness.audio)
    await harness.external.open(harness.audio)
    [holder] = (await harness.scan(harness.audio, modules=[module])).holders
    assert holder.process is not None


@case
async def stirred_when_a_holder_closes_the_node(harness: ContractHarness) -> None:
    _, waiting = await start_to_wait(harness)
    await harness.external.let_go(harness.audio)
    await waiting
    assert (await harness.scan(harness.audio)).holders == ()


@case
async def stirred_when_a_holder_ends(harness: ContractHarness) -> None:
    holder, waiting = await start_to_wait(harness)
    await harness.external.close(harness.audio)
    await waiting
    await harness.host.processes.wait_for_change([holder])


@case
async def signal_ends_a_process_and_no_later_one(harness: ContractHarness) -> None:
    holder, waiting = await start_to_wait(harness)
    process = holder.process
    assert process is not None
    assert harness.host.processes.signal(process, SIGTERM)
    await waiting
    await harness.until(lambda: not harness.host.processes.signal(process, SIGTERM))
    assert (await harness.scan(harness.audio)).holders == ()
