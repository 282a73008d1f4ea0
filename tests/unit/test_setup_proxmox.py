"""`gpuswitchctl setup proxmox` on a node of files: what it does, what it refuses, and how it is taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.cli import proxmox, setup
from gpuswitch.cli.client import Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.kept_files import KeptFiles
from gpuswitch.cli.parser import parse
from tests.harness.json_schemas import check
from tests.harness.made_machine import HOOKSCRIPT, SNIPPET, TEMPLATE, MadeMachine
from tests.harness.proxmox import VOLUME
from tests.harness.service.fixed import fixed, gpu

WIN11 = "name: win11\nhostpci0: 0000:01:00,pcie=1,x-vga=1\n\n[snap]\nhookscript: local:snippets/old\n"
ARCH = "name: arch\nhostpci0: mapping=gpu\n"
OTHER = "name: other\nhostpci0: 0000:09:00\n"


class Host:
    """A node with some machines, and the service with a managed GPU."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.made = MadeMachine(folder / "root")
        self.state = folder / "setup"
        self.capsys = capsys
        self.made.proxmox(WIN11, script="", vmid="101")
        self.made.proxmox(ARCH, script="", vmid="102")
        self.made.proxmox(OTHER, script="", vmid="103")

    @property
    def script(self) -> Path:
        return self.made.root / SNIPPET

    def run(self, *words: str) -> str:
        """What it says."""
        self.capsys.readouterr()
        args = parse(["setup", *words])
        if words[0] == "undo":
            setup.undo(args, self.made.machine, setup.Places(self.state.with_name("etc"), self.state))
        else:
            proxmox.setup(args, self.made.machine, self.state)
        return self.capsys.readouterr().out

    def json(self, *words: str) -> dict[str, Any]:
        said = json.loads(self.run(*words, "--json"))
        check("setup", said)
        return dict(said)

    def conf(self, vmid: str) -> str:
        return (self.made.root / f"etc/pve/qemu-server/{vmid}.conf").read_text()

    def tree(self) -> dict[str, bytes]:
        """All files but what `qm` was asked."""
        return {
            str(each): each.read_bytes()
            for each in sorted(self.made.root.rglob("*"))
            if each.is_file() and each.name != "qm.log"
        }


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Host:
    service = fixed(gpu(Name="geforce", Managed=True))
    monkeypatch.setattr(Service, "connect", lambda _address: service)
    return Host(tmp_path, capsys)


def test_machines_with_a_managed_gpu_get_it_once_and_undo_takes_it_back(host: Host) -> None:
    before = host.tree()
    dry = host.json("proxmox", "--dry-run")
    assert (dry["changed"], host.tree(), host.state.exists()) == (False, before, False)

    first = host.json("--yes", "proxmox")
    assert [(each["vmid"], each["gpus"], each["sets"]) for each in first["machines"]] == [
        (101, ["0000:01:00.0"], True),
        (102, ["0000:01:00.0"], True),
    ]
    assert (first["changed"], first["volume"], first["commands"]) == (True, VOLUME, dry["commands"])
    assert first["commands"][0] == f"qm set 101 --hookscript {VOLUME}"
    assert host.conf("101").startswith(f"hookscript: {VOLUME}\n")
    assert "hookscript" not in host.conf("103")
    assert (host.script.read_text(), host.script.stat().st_mode & 0o777) == (HOOKSCRIPT, 0o755)

    again = host.json("proxmox", "--yes")
    assert (again["changed"], again["commands"]) == (False, [])
    assert "nothing is to be done" in host.run("proxmox", "--yes")

    undone = host.json("undo")
    assert undone["commands"] == ["qm set 101 --delete hookscript", "qm set 102 --delete hookscript"]
    assert [each["result"] for each in undone["files"]] == ["removed"]
    assert "hookscript: local:snippets/g" not in host.conf("101")
    assert (host.script.parent.exists(), host.state.exists()) == (False, False)
    assert host.run("undo") == "there is nothing to undo: setup has written nothing\n"


def test_people_see_what_is_to_be_done(host: Host) -> None:
    said = host.run("proxmox", "101", "103", "--dry-run")
    assert said == (
        "win11 (101): geforce (0000:01:00.0)\n"
        "other (103): no managed GPU\n"
        f"{host.script} is to be written, executable: the script that asks for the GPUs\n"
        "these commands are to be run:\n"
        f"  qm set 101 --hookscript {VOLUME}\n"
        f"  qm set 103 --hookscript {VOLUME}\n"
        "nothing is changed: this was a dry run\n"
    )
    said = host.run("proxmox", "101", "--yes")
    assert said.endswith("done; to take it back: gpuswitchctl setup undo\n")
    assert "win11 (101): geforce (0000:01:00.0); it has the hookscript already\n" in host.run("proxmox", "--dry-run")


def test_a_script_of_another_version_is_replaced_and_put_back(host: Host) -> None:
    host.made.proxmox(f"hookscript: {VOLUME}\n{WIN11}", script="#!/bin/sh\n# of old\n", vmid="101")
    host.script.chmod(0o644)
    said = host.json("proxmox", "101", "--yes")
    assert (said["changed"], said["commands"]) == (True, [])
    assert (host.script.read_text(), host.script.stat().st_mode & 0o777) == (HOOKSCRIPT, 0o755)
    undone = host.json("undo")
    assert (undone["commands"], undone["files"][0]["result"]) == ([], "restored")
    assert host.script.read_text() == "#!/bin/sh\n# of old\n"
    assert host.conf("101").startswith("hookscript: ")


def test_a_storage_is_taken_that_has_snippets(host: Host) -> None:
    (host.made.root / "snippets").write_text(
        "cephfs cephfs active 1 1 1 1%\nnfs nfs active 1 1 1 1%\noff dir inactive\n"
    )
    assert host.json("proxmox", "--dry-run", "--storage", "nfs")["volume"] == "nfs:snippets/gpuswitch-hookscript"
    with pytest.raises(CtlError, match="the storage off takes no snippets; those that do: cephfs, nfs"):
        host.run("proxmox", "--dry-run", "--storage", "off")
    with pytest.raises(CtlError, match="cannot tell where cephfs:snippets/gpuswitch-hookscript lies"):
        host.run("proxmox", "--dry-run")


@pytest.mark.parametrize(
    ("storage", "content"),
    [
        ("", "iso,vztmpl,backup"),
        ("dir: local\n\tpath /var/lib/vz\n\tcontent iso,import\n\ndir: b\n\tcontent x\n", "iso,import"),
    ],
)
def test_a_storage_is_not_told_to_take_snippets_but_how_it_would_be_is_said(
    host: Host, storage: str, content: str
) -> None:
    (host.made.root / "snippets").write_text("")
    host.made.write("etc/pve/storage.cfg", storage)
    with pytest.raises(CtlError, match=f"pvesm set local --content {content},snippets"):
        host.run("proxmox", "--yes")
    assert not host.state.exists()


@pytest.mark.parametrize(
    ("conf", "words", "why"),
    [
        (WIN11, ["999"], "this node has no virtual machine 999; there are: 101, 102, 103"),
        (
            "name: x\nhostpci0: 0000:0",
            ["101"],
            r"cannot set up x \(101\): its configuration has hostpci0 with '0000:0'",
        ),
        (
            f"hookscript: local:snippets/mine\n{WIN11}",
            [],
            r'has another one, local:snippets/mine; have that one run ours first.*: sh /.*/gpuswitch-hookscript "\$1"',
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(host: Host, conf: str, words: list[str], why: str) -> None:
    host.made.write("etc/pve/qemu-server/101.conf", conf)
    before = host.tree()
    with pytest.raises(CtlError, match=why):
        host.run("proxmox", "--yes", *words)
    assert (host.tree(), host.state.exists()) == (before, False)


def test_a_script_that_runs_ours_is_ours(host: Host) -> None:
    host.made.write("etc/pve/qemu-server/101.conf", f"hookscript: local:snippets/mine\n{WIN11}")
    host.made.write("var/lib/vz/snippets/mine", f'#!/bin/sh\nsh /usr/{TEMPLATE} "$1" "$2" || exit\n')
    assert host.json("proxmox", "101", "--dry-run")["commands"] == []


def test_where_it_makes_no_sense(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CtlError, match="cannot ask: this is no terminal; say --yes, or --dry-run"):
        host.run("proxmox")
    monkeypatch.setattr(
        Service, "connect", lambda _address: fixed(gpu(Managed=True, Functions=[("0000:07:00.0", "", "")]))
    )
    with pytest.raises(
        CtlError, match="no virtual machine of this node has a managed GPU; give one to it: qm set VMID"
    ):
        host.run("proxmox", "--yes")
    monkeypatch.setattr(Service, "connect", lambda _address: fixed(gpu()))
    with pytest.raises(
        CtlError, match="no GPU is managed, so no machine needs a hookscript; first: gpuswitchctl setup"
    ):
        host.run("proxmox", "--yes")
    host.made.as_root = False
    with pytest.raises(CtlError, match="cannot read /etc/pve: it takes root"):
        host.run("proxmox", "--dry-run")
    host.made.remove("usr/bin/pveversion")
    with pytest.raises(CtlError, match="this is no node of it, there is no pveversion"):
        host.run("proxmox", "--dry-run")


def test_a_machine_that_is_locked_is_named_and_the_rest_can_be_done_again(host: Host) -> None:
    host.made.write("etc/pve/qemu-server/102.conf", f"lock: backup\n{ARCH}")
    with pytest.raises(
        CtlError, match=r"hookscript of arch \(102\): VM is locked \(backup\); what came before is done"
    ):
        host.run("proxmox", "--yes")
    assert "hookscript: local:snippets/g" in host.conf("101")
    host.made.write("etc/pve/qemu-server/102.conf", ARCH)
    assert host.json("proxmox", "--yes")["commands"] == [f"qm set 102 --hookscript {VOLUME}"]


def test_undo_leaves_the_script_where_a_machine_still_has_it(host: Host) -> None:
    """A machine that names a script which is not there does not start."""
    host.run("proxmox", "--yes")
    host.made.write("etc/pve/qemu-server/102.conf", f"lock: backup\n{host.conf('102')}")
    with pytest.raises(CtlError, match=r"from arch \(102\): VM is locked .*qm set 102 --delete hookscript$"):
        host.run("undo")
    assert host.script.exists()
    host.made.write("etc/pve/qemu-server/102.conf", ARCH)
    host.made.write("etc/pve/nodes/pve2/qemu-server/205.conf", f"name: x\nhookscript: {VOLUME}\n")
    with pytest.raises(CtlError, match="VM 205 of the node pve2 may have it, too; run there: qm set 205 --delete"):
        host.run("undo")
    assert host.script.exists()


def test_undo_asks_first_where_somebody_has_changed_the_script(host: Host) -> None:
    host.run("proxmox", "--yes")
    host.script.write_text("#!/bin/sh\n# mine\n")
    with pytest.raises(CtlError, match="setup undo --force"):
        host.run("undo")
    assert "hookscript: local:snippets/g" in host.conf("101")
    assert host.json("undo", "--force")["commands"] != []
    assert KeptFiles(host.state).kept_text(host.script).read_text() == "#!/bin/sh\n# mine\n"
