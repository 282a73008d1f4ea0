"""What the hookscript for Proxmox VE reads: configurations of machines, mappings, reservations.

The spellings are those of qemu-server's own tests (src/test/cfg2cmd) and of reports of its users.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuswitch import hook, proxmox_hook
from tests.harness.domains import table
from tests.harness.proxmox import MAPPING, NODE, WIN11, Node

GPU, SOUND, SECOND = (0, 1, 0, 0), (0, 1, 0, 1), (0, 2, 0, 0)
CARD = "0000:01:00"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Two cards with their sound; the hook in this process reads this node."""
    node = Node(tmp_path, "")
    node.device(f"{CARD}.0", f"{CARD}.1", "0000:02:00.0", "0000:02:00.1", "1234:f0:1d.0")
    monkeypatch.setattr(proxmox_hook, "PVE", f"{tmp_path}/etc/pve")
    monkeypatch.setattr(proxmox_hook, "RUN", f"{tmp_path}/run/qemu-server")
    monkeypatch.setattr(hook, "DEVICES", f"{tmp_path}/sys")
    monkeypatch.setattr(hook, "CONFIGURATION", f"{tmp_path}/etc/gpuswitch")
    return node


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The calls to the service, which takes all of them."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(hook, "call", lambda method, _seconds, *arguments: calls.append((method, *arguments)))
    return calls


def functions(text: str, vmid: str = "101") -> list[hook.Address]:
    return proxmox_hook.functions_of(vmid, proxmox_hook.main_section(text))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("0000:01:00", [GPU, SOUND]),
        ("01:00", [GPU, SOUND]),
        ("0000:01:00.0", [GPU]),
        ("01:00.1,pcie=1", [SOUND]),
        ("host=01:00,x-vga=on", [GPU, SOUND]),
        ("pcie=1,host=0000:01:00,rombar=0,romfile=card.bin", [GPU, SOUND]),
        ("01:00.0;01:00.1,pcie=1,x-vga=1", [GPU, SOUND]),
        ("0000:01:00.1;0000:02:00.0", [SOUND, SECOND]),
        ("1234:f0:1d", [(0x1234, 0xF0, 0x1D, 0)]),
        ("01:00.0,driver=keep", [GPU]),
        ("01:00.0,vendor-id=0x1234,device-id=0x5678,sub-vendor-id=0x2233", [GPU]),
        ("01:00.0,mdev=nvidia-63", []),
        ("01:00,some-later-option=7", [GPU, SOUND]),
    ],
)
def test_spellings_of_a_device(node: Node, value: str, found: list[hook.Address]) -> None:
    assert functions(f"name: x\nhostpci0: {value}\n") == found


def test_only_what_stands_above_all_sections_counts(node: Node) -> None:
    conf = proxmox_hook.main_section(WIN11)
    assert (conf["name"], conf["hostpci0"], "hostpci1" in conf) == ("win11", "0000:01:00,pcie=1,x-vga=1", False)
    assert functions(WIN11) == [GPU, SOUND]
    assert functions("name: x\n[special:cloudinit]\nhostpci0: 01:00\n") == []
    assert functions("name: x\n[]\nhostpci0: 01:00\n") == []


def test_later_lines_count_and_there_are_sixteen_devices(node: Node) -> None:
    assert functions("hostpci0: 01:00.0\nhostpci0: 01:00.1\n") == [SOUND]
    assert functions("hostpci15: 01:00.0\nhostpci16: 02:00.0\n") == [GPU]
    assert functions("hostpci3: 02:00.0\nhostpci0: 01:00.0\n") == [GPU, SECOND]


def test_what_is_handed_to_qemu_past_it_counts(node: Node) -> None:
    args = "args: -device vfio-pci,host=01:00.0,multifunction=on -device 'vfio-pci,host=0000:01:00.1'\n"
    assert functions(args) == [GPU, SOUND]
    assert functions("args: -chardev socket,id=c,host=127.0.0.1,port=1\n") == []


def test_a_template_has_none(node: Node) -> None:
    assert functions("hostpci0: 01:00\ntemplate: 1\n") == []
    assert functions("hostpci0: 01:00\ntemplate: 0\n") == [GPU, SOUND]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "its configuration says nothing"),
        ("\n\n[snap]\nhostpci0: 01:00\n", "its configuration says nothing"),
        ("name: x\nhostpci0:", "has the line 'hostpci0:', which says nothing"),
        ("name: x\nhostpci", "has the line 'hostpci', which says nothing"),
        ("name: x\nhostpci0: 0000:01:", "'0000:01:', which is not a PCI address"),
        ("hostpci0: 01:00;,pcie=1\n", "has hostpci0 with '', which is not a PCI address"),
        ("hostpci0: 01:00.0;gpu\n", "has hostpci0 with 'gpu', which is not a PCI address"),
        ("hostpci0: pcie=1\n", "which names no device"),
        ("hostpci0: 01:00,mapping=gpu\n", "which names no device"),
        ("hostpci0: 01:00,02:00\n", "with two of 'host'"),
        ("hostpci0: " + "x" * 5000 + "\n", "which is not a PCI address"),
    ],
)
def test_a_configuration_that_is_of_no_use(node: Node, text: str, reason: str) -> None:
    node.mapping()
    with pytest.raises(hook.BadDomainError) as error:
        functions(text)
    assert reason in str(error.value)
    assert len(str(error.value)) < 300


# Mappings ------------------------------------------------------------------------------------------------------------


def test_of_a_mapping_the_first_that_is_free_is_taken(node: Node) -> None:
    node.mapping()
    first, second = [GPU, SOUND], [SECOND, (0, 2, 0, 1)]
    text = "hostpci0: mapping=gpu,pcie=1\n"
    assert functions(text) == first
    soon = int(time.time()) + 60
    for held, found in (
        (f"{CARD}.0 102 time:{soon}", second),
        (f"{CARD}.0 101 time:{soon}", first),
        (f"{CARD}.0 102 time:1700000000", first),
        (f"{CARD}.0 102 pid:1", second),
        (f"{CARD}.0 102 pid:2", first),
        (f"{CARD}.1 102 time:{soon}", second),
        ("cut sho", first),
    ):
        (node.folder / "run/qemu-server/102.pid").write_text("1\n")
        node.reserve(f"{held}\n")
        assert functions(text) == found, held
    node.reserve("")
    assert functions(f"{text}hostpci1: mapping=gpu\n") == [*first, *second]
    assert functions(f"hostpci0: 01:00\n{text.replace('0', '1', 1)}") == [*first, *second]


@pytest.mark.parametrize(
    ("text", "pci_cfg", "reason"),
    [
        ("hostpci0: mapping=other\n", MAPPING, "mapping=other: that mapping has no device of the node"),
        ("hostpci0: mapping=gpu\n", "gpu\n\tmap id=10de:2484,node=else,path=0000:01:00\n", "no device of the node"),
        ("hostpci0: mapping=gpu\n", None, "no device of the node"),
        ("hostpci0: mapping=gpu\n", MAPPING.replace("path=", "pa"), "the mapping gpu has no path for the node"),
        ("hostpci0: mapping=gpu\n", MAPPING.replace("0000:01:00,", "0000:0"), "which is not a PCI address"),
        ("hostpci0: mapping=gpu\n", MAPPING.replace("id=10de:2484", "id=10de:1111"), "and 10de:2484 is there"),
        ("hostpci0: mapping=gpu\n", MAPPING.replace("0000:02:00.0;", "0000:07:00.0;"), "there is no such PCI device"),
        ("hostpci0: mapping=gpu\nhostpci1: mapping=gpu\nhostpci2: mapping=gpu\n", MAPPING, "other machines have all"),
    ],
)
def test_a_mapping_that_is_of_no_use(node: Node, text: str, pci_cfg: str | None, reason: str) -> None:
    if pci_cfg is not None:
        node.mapping(pci_cfg)
    with pytest.raises((hook.BadDomainError, hook.RefusedError), match=reason):
        functions(text)


def test_a_section_ends_with_an_empty_line_and_comments_are_none(node: Node) -> None:
    pci_cfg = f"gpu\n# x\n\tmap node={NODE},path=0000:01:00.0\n\n\tmap node={NODE},path=0000:02:00.0\n"
    assert [each["path"] for each in proxmox_hook.mapped("gpu", pci_cfg, NODE, "hostpci0")] == ["0000:01:00.0"]


# Phases --------------------------------------------------------------------------------------------------------------

UUID = "string:00000000-0000-0000-0000-000000000101"
BOTH = "array:string:0000:01:00.0,0000:01:00.1"


def test_each_phase_is_one_call_at_most(
    node: Node, asked: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    node.machine("101", WIN11)
    for phase in ("pre-start", "post-start", "pre-stop", "post-stop"):
        assert proxmox_hook.main(["101", phase]) == 0
    assert capsys.readouterr() == ("", "")
    assert asked == [
        ("AcquireForVm", "string:win11 (101)", UUID, BOTH),
        ("AdoptVm", "string:win11 (101)", UUID, BOTH),
        ("ReleaseFromVm", "string:win11 (101)", UUID, "string:shutdown"),
    ]


def test_a_machine_without_devices_asks_for_nothing(node: Node, asked: list[tuple[str, ...]]) -> None:
    node.machine("101", "name: x\n")
    for phase in ("pre-start", "post-start"):
        assert proxmox_hook.main(["101", phase]) == 0
    assert asked == []


def test_a_machine_that_is_on_disk_was_saved(node: Node, asked: list[tuple[str, ...]]) -> None:
    """Whatever else becomes of its configuration, what it had is told to be over."""
    for text, name, reason in (
        (f"lock: suspended\nvmstate: x\n{WIN11}", "win11 (101)", "saved"),
        (f"vmstate: left-over\n{WIN11}", "win11 (101)", "shutdown"),
        ("name: without its card\n", "without its card (101)", "shutdown"),
        ("", "VM 101", "shutdown"),
    ):
        node.machine("101", text)
        assert proxmox_hook.main(["101", "post-stop"]) == 0
        assert asked.pop() == ("ReleaseFromVm", f"string:{name}", UUID, f"string:{reason}")


def test_what_runs_has_what_was_reserved_for_it(node: Node, asked: list[tuple[str, ...]]) -> None:
    """Another machine was faster, so qemu-server took the next one of the mapping."""
    node.mapping()
    node.machine("101", "name: a\nhostpci0: mapping=gpu\nhostpci1: 1234:f0:1d.0,mdev=nvidia-63\n")
    node.reserve("0000:02:00.0 101 pid:7\n0000:02:00.1 101 pid:7\n0000:01:00.0 102 pid:8\n1234:f0:1d.0 101 pid:7\n")
    assert proxmox_hook.main(["101", "post-start"]) == 0
    assert asked == [("AdoptVm", "string:a (101)", UUID, "array:string:0000:02:00.0,0000:02:00.1")]


def test_a_machine_that_comes_from_another_node_is_read_there(
    node: Node, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = node.folder / "etc/pve/nodes/pve2/qemu-server"
    folder.mkdir(parents=True)
    (folder / "101.conf").write_text(WIN11)
    monkeypatch.setenv("PVE_MIGRATED_FROM", "pve2")
    assert proxmox_hook.main(["101", "pre-start"]) == 0
    assert [call[0] for call in asked] == ["AcquireForVm"]
    monkeypatch.setenv("PVE_MIGRATED_FROM", "../nodes/pve2")
    assert proxmox_hook.main(["101", "pre-start"]) == 1


Change = Callable[[Node], None]


@pytest.mark.parametrize(
    ("arguments", "change", "status", "said"),
    [
        (["101"], None, 2, "cannot tell what to do: it is run by Proxmox VE"),
        (["win11", "pre-start"], None, 1, "cannot look after 'win11': it is not the number of a virtual machine"),
        (["999", "pre-start"], None, 1, "cannot start 999: this node has no virtual machine of that number"),
        (["999", "post-start"], None, 0, "its configuration cannot be read"),
        (["101", "pre-launch"], None, 0, "nothing is done for 101 at 'pre-launch': no phase of that name is known"),
        (["102", "pre-start"], lambda node: node.container("102"), 0, "102 is a container, and gpuswitch moves no"),
        (
            ["101", "pre-start"],
            lambda node: node.machine("101", "name: win11\nhostpci0: 0000:05:00,pcie=1\n"),
            1,
            "cannot start win11 (101): its hostpci0 is 0000:05:00, and there is no such PCI device",
        ),
        (
            ["101", "pre-start"],
            lambda node: node.machine("101", "name: win11\nhostpci0: 0000:01:00\nhostpci1: 0000:0"),
            1,
            "cannot give 0000:01:00.0 to win11 (101): its configuration has hostpci1 with '0000:0'",
        ),
        (["101", "pre-start"], lambda node: node.machine("101", ""), 1, "to VM 101: its configuration says nothing"),
        (
            ["101", "pre-start"],
            lambda node: node.machine("101", "x" * (proxmox_hook.LIMIT + 1)),
            1,
            "its configuration is longer than 1 MiB",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_asks_for_nothing(
    node: Node,
    asked: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    change: Change | None,
    status: int,
    said: str,
) -> None:
    node.manage(table("01:00.0"))
    node.machine("101", WIN11)
    if change:
        change(node)
    assert proxmox_hook.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpuswitch: ")
    assert said in err
    assert err.count("\n") == 1
    assert asked == []


def test_a_configuration_that_is_of_no_use_keeps_no_machine_from_starting_where_nothing_is_managed(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.machine("101", "name: x\nhostpci0: 0000:0")
    assert proxmox_hook.main(["101", "pre-start"]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_nobody_expected_is_a_sentence_too(
    node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.machine("101", WIN11)
    monkeypatch.setattr(hook, "DEVICES", f"{node.folder}/nowhere")
    assert proxmox_hook.main(["101", "pre-start"]) == 1
    assert capsys.readouterr().err.startswith("gpuswitch: cannot look after the GPUs of 101: FileNotFoundError")


# The script ----------------------------------------------------------------------------------------------------------


async def test_the_script_where_gpuswitch_is_gone(node: Node) -> None:
    """On a storage that several nodes share, it is run where there never was one, too."""
    (node.folder / "lib/gpuswitch/proxmox_hook.py").unlink()
    node.machine("101", WIN11)
    status, said = await node.hook("101", "pre-start")
    assert status == 0
    assert said.endswith("install gpuswitch again, or run: qm set 101 --delete hookscript\n")
    node.manage(table("01:00.0"))
    assert (await node.hook("101", "pre-start"))[0] == 1
    assert (await node.hook("101", "post-stop"))[0] == 0


async def test_the_script_finds_its_other_half_with_the_systems_python_alone(node: Node) -> None:
    node.machine("101", "name: x\n")
    assert await node.hook("101", "pre-start") == (0, "")
    assert list(node.folder.rglob("__pycache__")) == []
