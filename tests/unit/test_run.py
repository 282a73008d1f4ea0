"""What `gpuswitchctl run` makes of its command: the functions in it, and what is no command."""

from __future__ import annotations

import pytest

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.parser import UsageError, parse
from gpuswitch.cli.run import filled, why_not_home
from tests.harness.service.fixed import fixed, gpu

DISPLAY, SOUND = "0000:01:00.0", "0000:01:00.1"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("true", "true"),
        ("qemu -device vfio-pci,host={}", f"qemu -device vfio-pci,host={DISPLAY} -device vfio-pci,host={SOUND}"),
        ("qemu -device vfio-pci,host={0},x-vga=on", f"qemu -device vfio-pci,host={DISPLAY},x-vga=on"),
        ("ch --device path=/x/{0} path=/x/{1}", f"ch --device path=/x/{DISPLAY} path=/x/{SOUND}"),
        ("echo {}", f"echo {DISPLAY} {SOUND}"),
        ("qemu --gpu={} -S", f"qemu --gpu={DISPLAY} --gpu={SOUND} -S"),
        ("echo {0}{} {x} {{}", f"echo {DISPLAY}{DISPLAY} {DISPLAY}{SOUND} {{x}} {{{DISPLAY} {{{SOUND}"),
    ],
)
def test_each_function_has_its_place(command: str, expected: str) -> None:
    assert filled(command.split(), [DISPLAY, SOUND]) == expected.split()


def test_a_function_that_there_is_not() -> None:
    with pytest.raises(CtlError, match=r"'x=\{2\}' names function 2, and there are 2") as raised:
        filled(["qemu", "x={2}"], [DISPLAY, SOUND])
    assert raised.value.exit_code == 2


def test_the_command_is_all_after_the_first_dashes() -> None:
    args = parse(["--bus", "x", "run", "--gpu", "rtx", "--wait", "5", "--", "sh", "-c", "echo --json", "--", "--help"])
    assert (args.gpus, args.wait, args.command) == (["rtx"], 5, ["sh", "-c", "echo --json", "--", "--help"])
    assert args.json is False


@pytest.mark.parametrize("arguments", [["run"], ["run", "--"], ["run", "--gpu", "rtx", "--"]])
def test_no_command(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="run needs -- and a command after it") as raised:
        parse(arguments)
    assert "-- COMMAND" in raised.value.usage


def test_dashes_mean_what_they_did_elsewhere() -> None:
    assert parse(["status", "--", "run"]).gpus == ["run"]
    assert parse(["status", "run", "--", "--wait"]).gpus == ["run", "--wait"]


def test_who_has_a_gpu_open_on_its_way_home_does_not_keep_it_from_there() -> None:
    holder = {"command": "wireplumber", "pid": 1000}
    [kept] = fixed(gpu(Name="rtx", State="vfio"), holders=[holder]).gpus()
    assert why_not_home(kept) == "wireplumber (1000) has it open"
    [on_its_way] = fixed(gpu(Name="rtx", State="reattaching"), holders=[holder]).gpus()
    assert why_not_home(on_its_way) == "rtx (0000:01:00.0) is reattaching"
