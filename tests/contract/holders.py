"""Cases about processes: who has what open, when that ends, and how somebody is told to end."""

from __future__ import annotations

import asyncio
from signal import SIGTERM

from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Holder, HolderQuery
from tests.contract.bench import Bench, case


async def only_holder(bench: Bench, *functions: PciAddress) -> Holder:
    [holder] = (await bench.scan(*functions)).holders
    return holder


async def start_to_wait(bench: Bench) -> tuple[Holder, asyncio.Task[None]]:
    """Somebody opens the sound card, and we wait for him to stir."""
    await bench.outside.open(bench.audio)
    holder = await only_holder(bench, bench.audio)
    waiting = asyncio.create_task(bench.host.processes.wait_for_change([holder]))
    assert await only_holder(bench, bench.audio) == holder
    assert not waiting.done()
    return holder, waiting


@case
async def nobody_has_it_open(bench: Bench) -> None:
    modules = str(bench.audio_driver.module), "no_such_module_here"
    scan = await bench.scan(*bench.functions, nodes=["no-such-node", "vfio/[0-9]*"], modules=modules)
    assert scan.holders == ()
    assert scan.numbers


@case
async def scan_names_who_has_a_node_open(bench: Bench) -> None:
    for function, folder in ((bench.display, "/dev/dri/"), (bench.audio, "/dev/snd/")):
        pid = await bench.outside.open(function)
        holder = await only_holder(bench, *bench.functions)
        assert (holder.pid, holder.command) == (pid, bench.outside.command)
        assert (holder.uid, holder.user, holder.doubt, holder.machine) == (0, "root", "", False)
        [node] = holder.nodes
        assert node.startswith(folder)
        await bench.outside.close(function)
        assert (await bench.scan(*bench.functions)).holders == ()


@case
async def scan_looks_at_the_functions_that_it_is_asked_about(bench: Bench) -> None:
    await bench.outside.open(bench.audio)
    assert (await bench.scan(bench.display)).holders == ()
    assert (await bench.scan(bench.crowded)).holders == ()


@case
async def scan_finds_a_mapping(bench: Bench) -> None:
    pid = await bench.outside.map(bench.display)
    holder = await only_holder(bench, bench.display)
    assert holder.pid == pid
    assert holder.nodes
    await bench.outside.close(bench.display)
    assert (await bench.scan(bench.display)).holders == ()


@case
async def scan_finds_by_number_what_sysfs_shows_no_more(bench: Bench) -> None:
    pid = await bench.outside.open(bench.display)
    seen = await bench.scan(bench.display)
    await bench.unbind(bench.display)
    scan = await bench.host.processes.scan(HolderQuery((bench.display,), numbers=seen.numbers))
    assert [holder.pid for holder in scan.holders] == [pid]


@case
async def scan_finds_who_has_the_group(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    node = f"vfio/{bench.group}"
    assert (await bench.scan(*bench.functions, nodes=[node])).holders == ()
    pid = await bench.outside.open_group(bench.group)
    [holder] = (await bench.scan(*bench.functions, nodes=[node])).holders
    assert (holder.pid, holder.nodes, holder.machine) == (pid, (f"/dev/{node}",), True)
    await bench.outside.close_group(bench.group)
    assert (await bench.scan(*bench.functions, nodes=[node])).holders == ()


@case
async def scan_does_not_name_ourselves(bench: Bench) -> None:
    await bench.to_vfio(*bench.functions)
    await bench.kernel.hold_group(bench.group)
    assert (await bench.scan(*bench.functions, nodes=[f"vfio/{bench.group}"])).holders == ()


@case
async def scan_tells_of_references_that_no_process_explains(bench: Bench) -> None:
    module = str(bench.audio_driver.module)
    await bench.outside.hide(bench.audio)
    [holder] = (await bench.scan(bench.audio, modules=[module])).holders
    assert (holder.process, holder.command, holder.nodes) == (None, module, ())
    assert module in holder.doubt
    await bench.outside.close(bench.audio)
    await bench.outside.open(bench.audio)
    [holder] = (await bench.scan(bench.audio, modules=[module])).holders
    assert holder.process is not None


@case
async def stirred_when_a_holder_closes_the_node(bench: Bench) -> None:
    _, waiting = await start_to_wait(bench)
    await bench.outside.let_go(bench.audio)
    await waiting
    assert (await bench.scan(bench.audio)).holders == ()


@case
async def stirred_when_a_holder_ends(bench: Bench) -> None:
    holder, waiting = await start_to_wait(bench)
    await bench.outside.close(bench.audio)
    await waiting
    await bench.host.processes.wait_for_change([holder])


@case
async def signal_ends_a_process_and_no_later_one(bench: Bench) -> None:
    holder, waiting = await start_to_wait(bench)
    process = holder.process
    assert process is not None
    assert bench.host.processes.signal(process, SIGTERM)
    await waiting
    await bench.until(lambda: not bench.host.processes.signal(process, SIGTERM))
    assert (await bench.scan(bench.audio)).holders == ()
