"""The libvirt hook and the real service, with a simulated host: a virtual machine's whole life, as libvirt tells it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from pathlib import Path

import pytest

from tests.harness.buses.private import BusProgram, PrivateBus
from tests.harness.domains import DOMAIN, HOSTDEV, UUID, domain, table, write
from tests.harness.service.hook import Hook, ended, system_bus
from tests.harness.service.peers import Peer
from tests.harness.service.services import ANY_PORT, BIN, NAME, Service
from tests.harness.service.services import GPU as GPU_INTERFACE
from tests.real_bus.conftest import Start

GPU = "/org/gpuswitch1/gpu/0000_01_00_0"
OTHER = DOMAIN.replace(UUID, "0b6a11f6-2c5e-4d1b-9b0c-0f8a3c5d7e90")
MANAGED = ANY_PORT + table("0000:01:00.0")


@pytest.fixture
def hook(tmp_path: Path, private_bus: PrivateBus) -> Hook:
    """It reads the configuration that the service has."""
    hook = Hook(tmp_path / "hook", private_bus.address)
    (hook.folder / "etc").symlink_to(tmp_path / "service/etc")
    return hook


async def where(service: Service) -> tuple[str, str]:
    """State, and the name of the owner."""
    properties = await service.properties(GPU)
    return properties["State"], properties["Owner"][0]


async def test_a_machine_gets_the_gpu_and_gives_it_back(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=MANAGED)
    assert await hook.run("prepare begin") == (0, "")
    assert await where(service) == ("vfio", "win10")
    assert {driver for _, _, driver in (await service.properties(GPU))["Functions"]} == {"vfio-pci"}
    assert await hook.run("start begin") == (0, "")
    assert await hook.run("started begin") == (0, "")
    assert await hook.run("reconnect begin") == (0, "")
    assert await hook.run("stopped end") == (0, "")
    assert await where(service) == ("vfio", "win10")
    assert await hook.run("release end", reason="shutdown") == (0, "")
    await service.until_state(GPU, "host")
    assert await where(service) == ("host", "")


async def test_a_machine_does_not_get_a_gpu_on_vfio_whose_group_the_host_uses(start: Start, hook: Hook) -> None:
    """QEMU would be told so by the kernel, and nobody else: vfio-pci has had the GPU since the boot."""
    service = await start("reserved", config=MANAGED)
    status, said = await hook.run("prepare begin")
    assert status != 0
    assert "network card 0000:02:00.0" in said
    assert "IOMMU group 1 too and stays on r8169" in said
    assert await where(service) == ("vfio", "")


async def test_any_function_of_it_will_do(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=MANAGED)
    assert await hook.run("prepare begin", domain(HOSTDEV.format("bus='1' function='1'"))) == (0, "")
    assert await where(service) == ("vfio", "win10")


async def test_a_table_may_name_any_function_of_it(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=ANY_PORT + table("0000:01:00.1"))
    assert await hook.run("prepare begin") == (0, "")
    assert await where(service) == ("vfio", "win10")


async def test_a_card_with_a_switch_of_its_own_goes_whole(start: Start, hook: Hook) -> None:
    """Intel's Arc: its sound is on another bus."""
    service = await start("arc", config=ANY_PORT + table("0000:03:00.0"))
    arc = "/org/gpuswitch1/gpu/0000_03_00_0"
    assert await hook.run("prepare begin", domain(HOSTDEV.format("bus='4'"))) == (0, "")
    assert (await service.properties(arc))["Functions"] == [
        ("0000:03:00.0", "display", "vfio-pci"),
        ("0000:04:00.0", "audio", "vfio-pci"),
    ]
    assert await hook.run("release end", reason="shutdown") == (0, "")
    await service.until_state(arc, "host")


async def test_a_machine_gets_two_gpus_of_one_group(start: Start, hook: Hook) -> None:
    service = await start("plx", config=ANY_PORT + table("0000:27:00.0") + table("0000:28:00.0"))
    gpus = [f"/org/gpuswitch1/gpu/0000_{bus}_00_0" for bus in (27, 28)]
    both = domain(HOSTDEV.format("bus='0x27'") + HOSTDEV.format("bus='0x28'"))
    status, said = await hook.run("prepare begin", domain(HOSTDEV.format("bus='0x27'")))
    assert (status, "the GPU 0000:28:00.0" in said) == (1, True)
    assert await hook.run("prepare begin", both) == (0, "")
    assert [(await service.properties(gpu))["State"] for gpu in gpus] == ["vfio", "vfio"]
    assert await hook.run("release end", both, reason="shutdown") == (0, "")
    for gpu in gpus:
        while (await service.properties(gpu))["State"] != "host":
            await service.signal()


@pytest.mark.parametrize("member", [True, False])
async def test_an_nvme_disk_that_is_a_member_is_seen(member: bool, start: Start, hook: Hook) -> None:
    keys = {"members": ["0000:02:00.0"]} if member else {}
    service = await start("plain", config=ANY_PORT + table("0000:01:00.0", **keys))
    source = (
        "<source type='pci' managed='yes' namespace='1'><address domain='0' bus='2' slot='0' function='0'/></source>"
    )
    assert await hook.run("prepare begin", domain(f"<disk type='nvme' device='disk'>{source}</disk>")) == (0, "")
    assert await where(service) == (("vfio", "win10") if member else ("host", ""))


async def test_a_gpu_that_qemu_is_given_past_libvirt_is_seen(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=MANAGED)
    inside = "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='vfio-pci,host=01:00.0'/></qemu:commandline>"
    xml = domain("").replace("</domain>", f"{inside}</domain>")
    assert await hook.run("prepare begin", xml) == (0, "")
    assert await where(service) == ("vfio", "win10")
    assert await hook.run("release end", xml, reason="shutdown") == (0, "")
    await service.until_state(GPU, "host")


async def test_what_a_table_means_to_manage_and_does_not_is_refused(start: Start, hook: Hook) -> None:
    """The card's address has shifted, and is that of a disk now."""
    service = await start("laptop", config=ANY_PORT + table("0000:02:00.0"))
    status, said = await hook.run("prepare begin", domain(HOSTDEV.format("bus='2'")))
    assert status == 1
    assert said.startswith("gpuswitch: the [[gpu]] table of 0000:02:00.0 is about no GPU: that is the storage controll")
    assert said.count("\n") == 1
    assert await hook.run("prepare begin") == (0, "")
    assert await where(service) == ("host", "")


async def test_a_gpu_that_is_not_managed_is_left_alone(start: Start, hook: Hook) -> None:
    service = await start("laptop")
    for operation in ("prepare begin", "started begin", "reconnect begin", "release end"):
        assert await hook.run(operation) == (0, "")
    assert await where(service) == ("host", "")


async def test_another_machine_is_refused_and_its_end_changes_nothing(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=MANAGED)
    assert await hook.run("prepare begin") == (0, "")
    status, said = await hook.run("prepare begin", OTHER, name="arch")
    assert status == 1
    assert said.startswith("gpuswitch: ")
    assert "win10" in said
    assert said.count("\n") == 1
    # libvirt goes on like this after a refusal
    assert await hook.run("stopped end", OTHER, name="arch", reason="failed") == (0, "")
    assert await hook.run("release end", OTHER, name="arch", reason="failed") == (0, "")
    assert await where(service) == ("vfio", "win10")


async def test_a_refusal_names_everything_in_one_line(start: Start, hook: Hook) -> None:
    service = await start("single", config=f"{MANAGED}allow_boot_display = true\n")
    status, said = await hook.run("prepare begin")
    assert status == 1
    assert said.startswith("gpuswitch: Xorg (pid ")
    assert "; kwin_x11 (pid " in said
    assert said.count("\n") == 1
    assert await hook.run("release end", reason="failed") == (0, "")
    assert await where(service) == ("host", "")


async def test_of_two_machines_that_start_at_once_one_gets_it(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=MANAGED)
    both = await asyncio.gather(hook.run("prepare begin"), hook.run("prepare begin", OTHER, name="arch"))
    assert sorted(status for status, _ in both) == [0, 1]
    assert await where(service) == ("vfio", "win10" if both[0] == (0, "") else "arch")


async def test_release_and_prepare_back_to_back(start: Start, hook: Hook) -> None:
    """As libvirt does it when a machine is restarted."""
    service = await start("laptop", config=MANAGED)
    for _ in range(3):
        assert await hook.run("prepare begin") == (0, "")
        assert await where(service) == ("vfio", "win10")
        assert await hook.run("release end", reason="destroyed") == (0, "")
        assert await hook.run("release end", reason="destroyed") == (0, "")


async def test_a_hook_that_is_killed_has_asked_for_nothing(start: Start, hook: Hook) -> None:
    service = await start("laptop", "unbind=0.5s", config=MANAGED)
    process = await hook.start("prepare begin")
    await service.until_state(GPU, "detaching")
    process.kill()
    assert (await ended(process))[0] == -signal.SIGKILL
    await service.until_state(GPU, "host")
    assert await where(service) == ("host", "")


async def test_the_service_ends_and_its_gpus_are_not_given_away(start: Start, hook: Hook) -> None:
    service = await start("laptop", config=MANAGED)
    await service.end(signal.SIGTERM)
    status, said = await hook.run("prepare begin")
    assert status == 1
    assert "gpuswitchd is not running" in said
    other = domain(HOSTDEV.format("bus='2'"))
    assert await hook.run("prepare begin", other) == (0, "")
    write(hook.folder / "etc", config="[[gpu]\n")
    status, said = await hook.run("prepare begin", other)
    assert status == 1
    assert "cannot tell whether win10 has a managed GPU" in said
    assert await hook.run("prepare begin", domain("")) == (0, "")


async def test_a_service_that_does_not_run_yet_is_started(bus_program: BusProgram, tmp_path: Path) -> None:
    """As systemd does it, the bus does here."""
    folder = tmp_path / "service"
    write(folder / "etc", config=MANAGED)
    directories = [f"--config={folder}/etc", f"--runtime={folder}/run", f"--state={folder}/state"]
    bus_address = f"unix:path={tmp_path}/system/bus"
    command = shlex.join([str(BIN / "gpuswitchd"), "--simulate=laptop", f"--bus={bus_address}", *directories])
    async with system_bus(bus_program, tmp_path / "system", activates=command) as bus:
        assert await Hook(tmp_path / "hook", bus.address).run("prepare begin") == (0, "")
        async with Peer.on(bus.address) as peer:
            state = await peer.call(NAME, GPU, "org.freedesktop.DBus.Properties.Get", "ss", GPU_INTERFACE, "State")
            pid = await peer.call("org.freedesktop.DBus", "/", "GetConnectionUnixProcessID", "s", NAME)
        os.kill(pid, signal.SIGKILL)
        assert state == ("s", "vfio")
