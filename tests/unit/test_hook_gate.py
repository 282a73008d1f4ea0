"""The script that libvirt runs: what gets past it to hook.py, and that it kills no virtual machine.

It is the installed one, but for the path of hook.py; a program that notes how it is called stands there.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.domains import DOMAIN, domain

SCRIPT = Path(__file__).parents[2] / "contrib/libvirt/qemu.d/50-gpuswitch"
LIMIT = 1 << 20

HARMLESS = ["started begin", "reconnect begin", "release end"]
"""What must never fail."""
OURS = ["prepare begin", *HARMLESS]
OTHERS = [
    "start begin",
    "stopped end",
    "restore begin",
    "migrate begin",
    "attach begin",
    "prepare end",
    "release begin",
]

NOTE = """
import json, os, signal, sys
print("noise")
descriptors = [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
note = {"arguments": sys.argv[1:], "xml": sys.stdin.read(), "pid": os.getpid(), "descriptors": sorted(descriptors)}
with open(__file__ + ".note", "w") as file:
    json.dump(note, file)
"""


@dataclass
class Gate:
    """The script, as it is installed."""

    folder: Path

    def __post_init__(self) -> None:
        self.script.write_text(SCRIPT.read_text().replace("@hook@", str(self.hook)))
        self.script.chmod(0o755)
        self.then("")

    @property
    def script(self) -> Path:
        return self.folder / "50-gpuswitch"

    @property
    def hook(self) -> Path:
        return self.folder / "hook.py"

    @property
    def note(self) -> dict[str, Any] | None:
        """What hook.py noted; None where it was not run."""
        note = Path(f"{self.hook}.note")
        return json.loads(note.read_text()) if note.exists() else None

    def then(self, action: str) -> None:
        """What hook.py does after its note."""
        self.hook.write_text(f"{NOTE}{action}\n")

    def run(self, operation: str, xml: str = DOMAIN, name: str = "win10") -> tuple[int, str, int]:
        """Status, stderr and process id. stdout is always empty."""
        # as libvirt does it: virRunScript, and the environment of virCommandAddEnvPassCommon
        environ = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "USER": "root"}
        command = [str(self.script), name, *operation.split(), "shutdown"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            out, said = process.communicate(xml)
        assert out == ""
        return process.returncode, said, process.pid


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.mark.parametrize("operation", OTHERS)
def test_other_operations_leave_at_once(gate: Gate, operation: str) -> None:
    assert gate.run(operation)[:2] == (0, "")
    assert gate.note is None


@pytest.mark.parametrize("operation", OURS)
def test_a_domain_without_devices_of_the_host_leaves_before_python_starts(gate: Gate, operation: str) -> None:
    assert gate.run(operation, domain(""))[:2] == (0, "")
    assert gate.note is None


def test_no_xml_at_all_is_none_that_a_start_can_be_judged_by(gate: Gate) -> None:
    """It could not be read, then: hook.py has the last word."""
    for operation in HARMLESS:
        assert gate.run(operation, "")[:2] == (0, "")
    assert gate.note is None
    assert gate.run("prepare begin", "")[:2] == (0, "")
    assert gate.note is not None


@pytest.mark.parametrize("operation", OURS)
def test_hook_py_gets_everything_as_it_is(gate: Gate, operation: str) -> None:
    name = "a 'b' \"c\" $(touch d) `e` \\ *"
    xml = domain("<hostdev/>", "$(exit 3) `exit 3` \\ \\\\ ' \" $HOME * é 漢")
    assert gate.run(operation, xml, name)[:2] == (0, "")
    assert gate.note is not None
    assert gate.note["arguments"] == [name, *operation.split(), "shutdown"]
    assert gate.note["xml"].rstrip("\n") == xml.rstrip("\n")
    assert gate.note["descriptors"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "device", ["<interface type='hostdev'/>", "<disk type='nvme'/>", "<qemu:arg value='vfio-pci,host=01:00.0'/>"]
)
def test_whatever_else_may_be_of_the_host_gets_past(gate: Gate, device: str) -> None:
    assert gate.run("prepare begin", domain(device))[0] == 0
    assert gate.note is not None


def test_long_xml_gets_past_whole_and_longer_xml_cut(gate: Gate) -> None:
    xml = domain("<hostdev/>", "x" * 900_000)
    assert gate.run("prepare begin", xml)[:2] == (0, "")
    assert gate.note is not None
    assert gate.note["xml"].rstrip("\n") == xml.rstrip("\n")
    assert gate.run("prepare begin", domain("", "x" * 2 * LIMIT))[:2] == (0, "")
    assert LIMIT < len(gate.note["xml"]) < LIMIT + 10


def test_prepare_ends_as_hook_py_does(gate: Gate) -> None:
    gate.then("sys.exit('why not')")
    assert gate.run("prepare begin")[:2] == (1, "why not\n")
    gate.then("os.kill(os.getpid(), signal.SIGKILL)")
    assert gate.run("prepare begin")[0] == -9


def test_prepare_becomes_hook_py(gate: Gate) -> None:
    """Who kills the hook kills what waits for the service."""
    pid = gate.run("prepare begin")[2]
    assert gate.note is not None
    assert gate.note["pid"] == pid


@pytest.mark.parametrize("operation", HARMLESS)
@pytest.mark.parametrize(
    "action",
    [
        "sys.exit(1)",
        "sys.exit('why not')",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getppid(), signal.SIGTERM); sys.exit(1)",
        "os.kill(os.getppid(), signal.SIGHUP)",
        "this is no python",
    ],
)
def test_the_others_never_fail(gate: Gate, operation: str, action: str) -> None:
    gate.then(action)
    assert gate.run(operation)[0] == 0


def test_a_hook_py_that_is_gone(gate: Gate) -> None:
    gate.hook.unlink()
    status, said, _ = gate.run("prepare begin")
    assert status == 1
    assert said == f"gpuswitch: cannot read {gate.hook}: install gpuswitch again, or remove {gate.script}\n"
    assert gate.run("prepare begin", domain(""))[:2] == (0, "")
    for operation in HARMLESS:
        assert gate.run(operation)[0] == 0


def test_a_python_that_is_gone(gate: Gate) -> None:
    gate.script.write_text(gate.script.read_text().replace("/usr/bin/python3", "/nowhere/python3"))
    status, said, _ = gate.run("prepare begin")
    assert status != 0
    assert "/nowhere/python3" in said
    for operation in HARMLESS:
        assert gate.run(operation)[0] == 0
