"""What is taken from journalctl's output, of a journalctl that is a script here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuswitch.host.linux.kernellog import LONGEST, MOST_LINES, LinuxKernelLog
from gpuswitch.model.address import PciAddress

GPU = PciAddress.parse("0000:01:00.0")
OWN = "+pci:0000:01:00.0"


def journalctl(folder: Path, *lines: object, status: int = 0) -> LinuxKernelLog:
    """Prints these lines: objects as JSON, text as it is."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "lines").write_text(text + "\n")
    script = folder / "journalctl"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ "$1" = --sync ] && exit 1\ncat {folder}/lines\nexit {status}\n'
    )
    script.chmod(0o755)
    return LinuxKernelLog(f"{folder}:/usr/bin:/bin")


def entry(message: object, device: object = None) -> dict[str, object]:
    return {"MESSAGE": message, "__CURSOR": "s=1"} | ({} if device is None else {"_KERNEL_DEVICE": device})


@pytest.mark.parametrize(
    ("message", "device", "told"),
    [
        ("amdgpu 0000:01:00.0: amdgpu: Fatal error during GPU init", OWN, True),
        ("NVRM: GPU 0000:01:00.0: RmInitAdapter failed!", None, True),
        ("[drm:bochs_pci_probe [bochs]] *ERROR* ID mismatch", None, True),
        ("bochs-drm: probe of 0000:01:00.0 failed with error -22", None, True),
        ("NVRM: The NVIDIA probe routine failed for 1 device(s).", None, True),
        ("amdgpu 0000:0a:00.0: amdgpu: Fatal error during GPU init", "+pci:0000:0a:00.0", False),
        ("NVRM: GPU 0000:0a:00.0: RmInitAdapter failed!", None, False),
        ("bochs_hw is not a word of it", None, False),
        ("usb 1-1: new high-speed USB device", "+usb:1-1", False),
        ("eth0: link up", None, False),
    ],
)
async def test_lines_about_the_function_or_the_driver(
    message: str, device: str | None, told: bool, tmp_path: Path
) -> None:
    log = journalctl(tmp_path, entry(message, device))
    assert await log.said([GPU], {"bochs-drm", "bochs", "nvidia"}, log.mark()) == ((message,) if told else ())


async def test_it_is_asked_for_the_kernels_lines_since_then(tmp_path: Path) -> None:
    log = journalctl(tmp_path)
    assert await log.said([GPU], ["nvidia"], 1234.5) == ()
    sync, query = (tmp_path / "calls").read_text().splitlines()
    assert sync == "--sync"
    for word in ("--since=@1234.500000", "--boot", "--output=json", "_TRANSPORT=kernel"):
        assert word in query.split()


async def test_few_and_short_ones_and_each_once(tmp_path: Path) -> None:
    lines = [f"{number} " + "x" * 500 for number in range(20)]
    log = journalctl(tmp_path, *(entry(line, OWN) for line in lines for _ in range(2)))
    said = await log.said([GPU], [], 0)
    assert said == tuple(line[:LONGEST] for line in lines[-MOST_LINES:])


async def test_what_is_no_line_is_passed_over(tmp_path: Path) -> None:
    rest: list[object] = ["{", "[]", "5", "", {}, entry([104, 105], OWN), entry("text", ["+pci:0000:01:00.0"])]
    rest.append("[" * 100_000)
    log = journalctl(tmp_path, *rest, entry("bad \x1b[31m0000:01:00.0", OWN))
    assert await log.said([GPU], [], 0) == ("bad  [31m0000:01:00.0",)


async def test_a_line_ends_where_journalctl_ends_it(tmp_path: Path) -> None:
    log = journalctl(tmp_path, json.dumps(entry("a\u2028b\x85c", OWN), ensure_ascii=False))
    assert await log.said([GPU], [], 0) == ("a b c",)


async def test_without_a_journal_nothing_is_told(tmp_path: Path) -> None:
    assert await LinuxKernelLog(str(tmp_path)).said([GPU], ["nvidia"], 0) == ()
    assert await journalctl(tmp_path, "No journal files were found.", status=1).said([GPU], ["nvidia"], 0) == ()
