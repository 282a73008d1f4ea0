"""Faults as text: what they do to the host, and what is no fault."""

from __future__ import annotations

import asyncio
import errno

import pytest

from gpuswitch.errors import InvalidArgument, KernelError
from gpuswitch.host.simulated.faultspec import inject
from gpuswitch.host.simulated.host import SimulatedHost
from gpuswitch.host.simulated.scenarios import plain, single
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import VFIO_MODULE, BootFramebuffer

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")


def host_with(*faults: str) -> SimulatedHost:
    host = plain()
    for fault in faults:
        inject(host, fault)
    return host


async def errno_of_unbind(host: SimulatedHost, function: PciAddress) -> int:
    """0 where it works."""
    driver = host.look().functions[function].driver_name
    try:
        await host.kernel(str(GPU)).unbind(function, str(driver))
    except KernelError as error:
        return error.errno
    return 0


async def test_a_fault_without_subject_and_number_hits_every_operation_of_its_kind() -> None:
    host = host_with("unbind=EIO")
    assert [await errno_of_unbind(host, function) for function in (AUDIO, GPU, GPU)] == [errno.EIO] * 3


async def test_a_fault_may_name_its_subject_in_any_spelling_and_its_number() -> None:
    host = host_with("unbind@pci_0000_01_00_0#2=EIO", "unbind@01:00.0#1=ENODEV")
    assert [await errno_of_unbind(host, function) for function in (AUDIO, GPU, GPU, GPU)] == [
        0, errno.ENODEV, errno.EIO, 0
    ]  # fmt: skip  # in the order of the operations


async def test_a_module_and_a_group_can_be_subjects() -> None:
    host = host_with(f"load@{VFIO_MODULE}=ENOENT", "hold_group@13=EBUSY")
    kernel = host.kernel(str(GPU))
    await kernel.load("nouveau")
    for operation, number in ((kernel.load(VFIO_MODULE), errno.ENOENT), (kernel.hold_group(13), errno.EBUSY)):
        with pytest.raises(KernelError) as refused:
            await operation
        assert refused.value.errno == number


@pytest.mark.parametrize(
    "fault",
    [
        "unload@nvidia_drm=EAGAIN",
        "announce@01:00.1=EIO",
        "scan@01:00.0#2=EIO",
        "map_consoles@1=EIO",
        "bind_console@vtcon1=hang",
        "unbind_platform@efi-framebuffer.0=EIO",
        "set_persistence@01:00.0=2s",
        "stop_unit@display-manager.service=EIO",
        "stop_unit@wireplumber.service of user 1000=hang",
        "end_session@2=EIO",
        "inhibit@01:00.0=EIO",
        "signal@Xorg=EPERM",
        "let_go@wireplumber=silent",
    ],
)
async def test_everything_on_the_host_can_be_a_subject(fault: str) -> None:
    host = single(boot_framebuffers=[BootFramebuffer("efi-framebuffer.0", "efi-framebuffer", AUDIO)])
    inject(host, fault)
    operation = fault.partition("@")[0]
    with pytest.raises(InvalidArgument, match=r"this host has no (0000:09:00\.0|nothing)"):
        inject(host, f"{operation}@{'09:00.0' if '01:00' in fault else 'nothing'}=silent")


async def test_an_operation_can_be_silent() -> None:
    host = host_with("unbind=silent")
    assert await errno_of_unbind(host, AUDIO) == 0
    assert host.look().functions[AUDIO].driver_name == "snd_hda_intel"


async def test_an_operation_can_take_its_time() -> None:
    host = host_with("unbind=1.5s")
    assert await errno_of_unbind(host, AUDIO) == 0
    assert asyncio.get_running_loop().time() == 1.5


async def test_an_operation_can_hang() -> None:
    host = host_with("unbind=hang")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await errno_of_unbind(host, AUDIO)
    assert host.kernel(str(GPU)).pending is not None


WRITE = "write it like probe@0000:01:00.1#1=EINVAL or unbind=0.3s"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", WRITE),
        ("unbind", WRITE),
        ("unbind=", WRITE),
        ("unbind=EIO=EIO", WRITE),
        ("unbind#0=EIO", WRITE),
        ("unbind#-1=EIO", WRITE),
        ("unbind#9999999999=EIO", WRITE),
        ("unbind@=EIO", WRITE),
        ("unbind=EIO\n", "'EIO\\n' is no fault; use the name of an errno, silent, hang, or seconds like 0.3s"),
        ("unbind=eio", "'eio' is no fault; use the name of an errno, silent, hang, or seconds like 0.3s"),
        ("unbind=errorcode", "'errorcode' is no fault; use the name of an errno, silent, hang, or seconds like 0.3s"),
        ("unbind=-1s", "'-1s' is no fault; use the name of an errno, silent, hang, or seconds like 0.3s"),
        ("unbind=1e9s", "'1e9s' is no fault; use the name of an errno, silent, hang, or seconds like 0.3s"),
        ("unbind@gpu=EIO", "'gpu' is not a PCI address; write it like 0000:01:00.0"),
        ("unbind@0000:09:00.0=EIO", "this host has no 0000:09:00.0"),
        ("load@fglrx=EIO", "this host has no fglrx"),
        ("hold_group@99=EIO", "this host has no 99"),
        ("let_go=EIO", "a process tells nobody that it failed; what never happens is Silent()"),
        ("signal=hang", "a signal is sent at once; a process that takes no notice is Silent()"),
        ("nodes=EIO", "udev tells nobody that it failed; what never happens is Silent()"),
    ],
)
def test_what_is_no_fault_is_refused_in_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        inject(plain(), text)
    assert str(refused.value) == f"cannot use the fault {text!r}: {reason}"


def test_an_unknown_operation_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidArgument, match=r"'restart=EIO': no operation is named 'restart'; known are look, "):
        inject(plain(), "restart=EIO")
