"""The processes of a simulated host: what a scan sees, who lets go when asked, and who comes back."""

from __future__ import annotations

import asyncio
import errno
from signal import SIGHUP, SIGKILL, SIGTERM, SIGUSR1, Signals

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.simulated.faults import Delay, Errno, Hang, Silent
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.kernel import IN_FLIGHT
from gpuswitch.host.simulated.scenarios import laptop, plain, server, single
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_DRIVER, VFIO_MODULE
from gpuswitch.model.gpu import discover
from gpuswitch.model.holders import Holder, HolderQuery, Process, Unit
from tests.host_contract.harness import refused

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
BOARD_AUDIO = PciAddress.parse("0000:00:1f.3")
WIREPLUMBER = Unit("wireplumber.service", 1000)
A_WHILE = 60.0


async def holders(host: SimulatedHost, *functions: PciAddress, nodes: tuple[str, ...] = ()) -> tuple[Holder, ...]:
    return (await host.processes.scan(HolderQuery(functions or (GPU, AUDIO), nodes))).holders


def process(host: SimulatedHost, name: str) -> Process:
    program = host.machine.processes.named(name)
    assert program is not None
    return program.process


async def to_vfio(host: SimulatedHost) -> None:
    kernel = host.kernel(str(GPU))
    await kernel.load(VFIO_MODULE)
    functions = [PciAddress.parse(f"{GPU.slot_name}.{number}") for number in range(4)]
    await kernel.set_override(dict.fromkeys(functions, VFIO_DRIVER))
    for function in functions:
        await kernel.unbind(function, str(host.look().functions[function].driver_name))
        await kernel.probe(function)


async def test_scan_tells_whose_each_process_is() -> None:
    host = laptop()
    daemon, wireplumber = process(host, "nvidia-persistenced"), process(host, "wireplumber")
    unit = Unit("nvidia-persistenced.service")
    assert await holders(host) == (
        Holder(daemon, "nvidia-persistenced", 0, "root", unit, nodes=("/dev/nvidia0",)),
        Holder(wireplumber, "wireplumber", 1000, "alice", WIREPLUMBER, nodes=("/dev/snd/controlC1",)),
    )
    assert {holder.command for holder in await holders(host, BOARD_AUDIO)} == {"wireplumber"}
    assert await holders(plain()) == ()


async def test_scan_tells_all_that_one_process_has() -> None:
    host = single()
    found = await holders(host, nodes=("nvidiactl", "nvidia-uvm"))
    assert [holder.command for holder in found] == ["wireplumber", "Xorg", "kwin_x11"]
    wireplumber, xorg, kwin = found
    assert xorg.nodes == ("/dev/dri/card0", "/dev/nvidia0", "/dev/nvidiactl")
    assert (kwin.session, kwin.unit, kwin.nodes) == ("2", Unit("session-2.scope"), ("/dev/dri/card0",))
    assert wireplumber.unit == WIREPLUMBER


async def test_scan_for_the_shared_nodes_finds_those_who_have_another_gpu() -> None:
    host = server()
    one, two = (gpu.address for gpu in discover(host.look())[:2])
    await host.kernel(str(one)).set_persistence(one, on=False)
    assert await holders(host, one) == ()
    [holder] = await holders(host, one, nodes=("nvidiactl",))
    assert holder.nodes == ("/dev/nvidiactl",)
    [holder] = await holders(host, two, nodes=("nvidiactl",))
    assert holder.nodes == ("/dev/nvidia1", "/dev/nvidiactl")


async def test_scan_finds_a_vm_by_its_group_only() -> None:
    host = plain()
    await to_vfio(host)
    host.machine.start_vm("win11", [GPU, AUDIO])
    assert await holders(host) == ()
    [holder] = await holders(host, nodes=("vfio/13",))
    assert (holder.command, holder.nodes) == ("qemu-system-x86", ("/dev/vfio/13",))
    host.machine.end("win11")
    assert await holders(host, nodes=("vfio/13",)) == ()


async def test_scan_counts_what_no_process_explains() -> None:
    host = laptop()
    query = HolderQuery((AUDIO,), modules=("snd_hda_intel", "nothing"))
    assert [holder.pid for holder in (await host.processes.scan(query)).holders] == [process(host, "wireplumber").pid]
    host.machine.hide(AUDIO)
    kernel, wireplumber = (await host.processes.scan(query)).holders
    assert kernel == Holder(None, "snd_hda_intel", doubt="module snd_hda_intel has 1 user that no process explains")
    assert wireplumber.process is not None
    host.machine.close(AUDIO, IN_FLIGHT)
    assert len((await host.processes.scan(query)).holders) == 1


async def test_nodes_that_all_gpus_share_are_explained_where_they_are_looked_for() -> None:
    host = laptop()
    [kernel, _] = (await host.processes.scan(HolderQuery((AUDIO,), modules=("nvidia",)))).holders
    assert kernel.doubt == "module nvidia has 1 user that no process explains"
    seen = await host.processes.scan(HolderQuery((AUDIO,), ("nvidiactl",), modules=("nvidia",)))
    assert {holder.command for holder in seen.holders} == {"nvidia-persistenced", "wireplumber"}


async def test_scan_finds_who_keeps_an_unbind_waiting() -> None:
    host = plain()
    host.machine.open(AUDIO, "jackd")
    seen = await host.processes.scan(HolderQuery((AUDIO,)))
    unbinding = asyncio.create_task(host.kernel(str(GPU)).unbind(AUDIO, "snd_hda_intel"))
    await asyncio.sleep(A_WHILE)
    assert await holders(host, AUDIO) == ()
    again = await host.processes.scan(HolderQuery((AUDIO,), numbers=seen.numbers))
    assert again == seen
    assert host.processes.signal(process(host, "jackd"), SIGTERM)
    await unbinding


async def test_scan_fails_waits_and_hangs_as_told() -> None:
    host = laptop()
    loop = asyncio.get_running_loop()
    host.faults.add(Errno(errno.EIO), operation="scan", subject=AUDIO)
    await refused(holders(host), errno.EIO)
    host.faults.add(Delay(5), operation="scan")
    assert len(await holders(host)) == 2
    assert loop.time() == 5
    hang = host.faults.add(Hang(), operation="scan")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(holders(host), 10)
    assert hang.reached.is_set()
    assert len(await holders(host)) == 2
    host.faults.add(Silent(), operation="scan")
    assert await holders(host) == ()


async def test_stirred_by_an_end_and_by_a_close() -> None:
    host = laptop()
    host.machine.open(GPU, "Xorg")
    waiting = asyncio.create_task(host.processes.wait_for_change(await holders(host)))
    host.machine.open(GPU, "glxgears")
    host.machine.close(BOARD_AUDIO, "wireplumber")
    await asyncio.sleep(A_WHILE)
    assert not waiting.done()
    host.machine.end("glxgears")  # it closes a node that Xorg has open, too
    await waiting
    waiting = asyncio.create_task(host.processes.wait_for_change(await holders(host)))
    await asyncio.sleep(A_WHILE)
    host.machine.end("Xorg")
    await waiting


async def test_kernel_stirs_nobody() -> None:
    host = plain()
    host.machine.hide(AUDIO)
    found = (await host.processes.scan(HolderQuery((AUDIO,), modules=("snd_hda_intel",)))).holders
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(host.processes.wait_for_change(found), 3600)


@pytest.mark.parametrize(
    ("number", "stubborn", "ends"),
    [
        (SIGTERM, False, True),
        (SIGHUP, False, True),
        (SIGUSR1, False, False),
        (SIGTERM, True, False),
        (SIGKILL, True, True),
    ],
)
async def test_signals(number: Signals, stubborn: bool, ends: bool) -> None:
    host = plain()
    started = host.machine.run("game", stubborn=stubborn)
    host.machine.open(GPU, "game")
    assert host.processes.signal(started, number)
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(GPU) == (set() if ends else {"game"})
    assert host.processes.signal(started, number) is not ends
    assert not host.processes.signal(Process(started.pid, started.started + 1), SIGKILL)


async def test_signal_is_refused_or_ignored_as_told() -> None:
    host = plain()
    host.machine.open(GPU, "game")
    host.faults.add(Errno(errno.EPERM), operation="signal", subject="game")
    with pytest.raises(KernelError) as caught:
        host.processes.signal(process(host, "game"), SIGTERM)
    assert caught.value.errno == errno.EPERM
    host.faults.add(Silent(), operation="signal", subject="game")
    assert host.processes.signal(process(host, "game"), SIGTERM)
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(GPU) == {"game"}


async def test_names_are_those_of_one_process() -> None:
    host = plain()
    host.machine.open(GPU, "Xorg")
    before = process(host, "Xorg")
    host.machine.open(GPU, "Xorg", "nvidia")
    assert process(host, "Xorg") == before
    with pytest.raises(ValueError, match="'Xorg'"):
        host.machine.run("Xorg")
    host.machine.end("Xorg")
    host.machine.open(GPU, "Xorg")
    assert process(host, "Xorg") != before


async def test_polite_process_lets_go_of_what_is_announced_and_takes_it_up_again() -> None:
    host = laptop()
    kernel = host.kernel(str(GPU))
    told: list[str] = []
    host.watch(lambda: told.append("something"))
    before = host.look().functions[AUDIO]
    await kernel.announce([GPU, AUDIO], "sound", "remove")
    await asyncio.sleep(0)
    assert not host.machine.users(AUDIO)
    assert told == ["something"]
    assert host.machine.users(BOARD_AUDIO) == {"wireplumber"}
    assert host.look().functions[AUDIO] == before
    await kernel.announce([GPU, AUDIO], "sound", "add")
    await asyncio.sleep(0)
    assert host.machine.users(AUDIO) == {"wireplumber"}
    assert host.machine.users(GPU) == {"nvidia-persistenced"}


async def test_polite_process_takes_up_a_card_that_appears() -> None:
    host = laptop()
    kernel = host.kernel(str(GPU))
    await kernel.announce([AUDIO], "sound", "remove")
    await kernel.unbind(AUDIO, "snd_hda_intel")
    host.faults.add(Delay(2), operation="nodes")
    await kernel.probe(AUDIO)
    assert host.machine.users(AUDIO) == set()
    await asyncio.sleep(3)
    assert host.machine.users(AUDIO) == {"wireplumber"}


async def test_polite_process_keeps_no_driver_waiting() -> None:
    host = laptop()
    await host.kernel(str(GPU)).unbind(AUDIO, "snd_hda_intel")
    assert host.look().functions[AUDIO].driver is None


async def test_polite_process_may_take_its_time_or_not_listen() -> None:
    host = laptop()
    kernel = host.kernel(str(GPU))
    host.faults.add(Delay(10), operation="let_go", subject="wireplumber")
    host.faults.add(Silent(), operation="let_go", subject="wireplumber", nth=2)
    await kernel.announce([AUDIO], "sound", "remove")
    await asyncio.sleep(9)
    assert host.machine.users(AUDIO) == {"wireplumber"}
    await asyncio.sleep(2)
    assert host.machine.users(AUDIO) == set()
    await kernel.announce([AUDIO], "sound", "add")
    await asyncio.sleep(A_WHILE)
    await kernel.announce([AUDIO], "sound", "remove")
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(AUDIO) == {"wireplumber"}


async def test_others_let_go_of_nothing() -> None:
    host = plain()
    host.machine.open(AUDIO, "jackd")
    host.machine.run("kwin", polite=True)
    host.machine.open(GPU, "kwin")
    kernel = host.kernel(str(GPU))
    await kernel.announce([GPU, AUDIO], "sound", "remove")
    await kernel.announce([GPU, AUDIO], "drm", "add")
    await asyncio.sleep(A_WHILE)
    assert [host.machine.users(function) for function in (AUDIO, GPU)] == [{"jackd"}, {"kwin"}]
    await kernel.announce([GPU, AUDIO], "drm", "remove")
    await asyncio.sleep(A_WHILE)
    assert host.machine.users(GPU) == set()
    await refused(kernel.announce([PciAddress.parse("0000:ff:1f.7")], "drm", "add"), errno.ENODEV)
