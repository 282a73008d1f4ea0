"""What the libvirt hook reads: a domain's XML, and the configuration where it cannot ask the service."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch import hook
from gpuswitch.config import loading
from tests.harness.domains import BOMB, DOMAIN, HOSTDEV, INTERFACE, UUID, domain, table, write
from tests.harness.sysfs_tree import Tree, link

GPU, SOUND = (0, 1, 0, 0), (0, 1, 0, 1)
ON_BUS_1 = HOSTDEV.format("bus='1'")


def addresses(xml: str) -> list[hook.Address]:
    return hook.read_domain(xml.encode())[1]


def test_the_pci_functions_of_a_domain() -> None:
    assert hook.read_domain(DOMAIN.encode()) == (UUID, [GPU, SOUND])
    assert addresses(domain(INTERFACE.format("domain='0x10000' bus='0xaf' slot='0x1f' function='0x7'"))) == [
        (0x10000, 0xAF, 0x1F, 7)
    ]
    assert addresses(domain("")) == []
    assert hook.read_domain(b"<domain/>") == ("", [])


@pytest.mark.parametrize(
    "devices",
    [
        "<hostdev mode='subsystem' type='usb'><source><address bus='1' device='2'/></source></hostdev>",
        "<hostdev mode='subsystem' type='mdev'><source><address uuid='c2177883'/></source></hostdev>",
        "<hostdev mode='capabilities' type='pci'><source><address bus='1'/></source></hostdev>",
        "<hostdev mode='subsystem' type='pci'><address type='pci' bus='1'/></hostdev>",
        "<hostdev mode='subsystem' type='pci'><source><x><address bus='1'/></x></source></hostdev>",
        "<interface type='network'><source><address bus='1'/></source></interface>",
        "<hostdev mode='subsystem' type='pci'/><disk><source><address bus='1'/></source></disk>",
        f"<other>{ON_BUS_1}</other>",
    ],
)
def test_what_is_no_pci_function_of_the_host(devices: str) -> None:
    assert addresses(domain(devices)) == []


NVME = """
    <disk type='nvme' device='disk'>
      <driver name='qemu' type='raw'/>
      <source type='pci' managed='yes' namespace='1'>
        <address domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
      </source>
      {}
      <target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>"""
BASE = """<backingStore type='nvme'><source type='pci' managed='no' namespace='1'><address bus='0x03'/></source>
    </backingStore>"""


def test_nvme_disks_are_functions_of_the_host(tmp_path: Path) -> None:
    assert addresses(domain(NVME.format(""))) == [(0, 2, 0, 0)]
    assert addresses(domain(NVME.format(BASE))) == [(0, 2, 0, 0), (0, 3, 0, 0)]
    assert addresses(domain(NVME.format(BASE).replace("disk type='nvme'", "disk type='file'"))) == [(0, 3, 0, 0)]
    directory = str(write(tmp_path, config=table("01:00.0", members=["02:00.0"])))
    assert hook.managed_of(addresses(domain(NVME.format(""))), directory, str(tmp_path)) == [(0, 2, 0, 0)]


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("vfio-pci,host=01:00.0,multifunction=on", [(0, 1, 0, 0)]),
        ("vfio-pci,host=0000:01:00.1", [(0, 1, 0, 1)]),
        ("vfio-pci,host=1:0.0", [(0, 1, 0, 0)]),
        ("vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:01:00.0", [(0, 1, 0, 0)]),
        ("vfio-pci,sysfsdev=/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0", [(0, 1, 0, 0)]),
        ("vfio-pci,sysfsdev=/sys/bus/mdev/devices/c2177883-f1bb-47f0-914d-32a22e3a8804", []),
        ('{{"driver": "vfio-pci", "host": "0000:01:00.0", "id": "gpu"}}', [(0, 1, 0, 0)]),
        ("socket,id=c,host=127.0.0.1,port=4444", []),
        ("user,id=n,hostfwd=tcp::2222-:22", []),
        ("-device", []),
    ],
)
@pytest.mark.parametrize("prefix", ["qemu:", "q:", ""])
def test_what_qemu_is_given_past_libvirt(argument: str, found: list[hook.Address], prefix: str) -> None:
    value = argument.replace("{{", "{").replace("}}", "}").replace('"', "&quot;")
    inside = f"<{prefix}commandline><{prefix}arg value='-device'/><{prefix}arg value='{value}'/></{prefix}commandline>"
    assert addresses(domain("").replace("</domain>", f"{inside}</domain>")) == found
    assert addresses(domain("", inside)) == []


def test_what_only_looks_like_a_device() -> None:
    inside = f"<devices>{ON_BUS_1}</devices>"
    assert addresses(f"<domain><metadata>{inside}</metadata></domain>") == []
    assert addresses(f"<domain><metadata><domain>{inside}</domain></metadata></domain>") == []
    assert addresses(f"<domain><metadata><!-- {inside} --><![CDATA[{inside}]]></metadata></domain>") == []
    assert addresses(f"<network>{inside}</network>") == []


@given(st.tuples(*(st.integers(0, most) for most in (0xFFFFFFFF, 0xFF, 0x1F, 7))), st.sampled_from(["#x", "d", "#X"]))
def test_numbers_are_read_as_libvirt_reads_them(address: hook.Address, form: str) -> None:
    keys = ("domain", "bus", "slot", "function")
    written = " ".join(f"{key}='{format(number, form)}'" for key, number in zip(keys, address, strict=True))
    assert addresses(domain(HOSTDEV.format(written))) == [address]


def test_numbers_that_begin_with_a_zero_are_octal() -> None:
    assert addresses(domain(HOSTDEV.format("bus='011' slot='00' function='0'"))) == [(0, 9, 0, 0)]


@pytest.mark.parametrize("bus", ["", "0x", "0x100", "256", "-1", "1_0", "0b1", " 1", "08", "\u0661", "1" * 5000])
def test_an_address_that_is_none(bus: str) -> None:
    with pytest.raises(hook.BadDomainError, match="a PCI address with bus="):
        addresses(domain(HOSTDEV.format(f"bus='{bus}'")))


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (BOMB, "has a document type"),
        ("<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>", "has a document type"),
        ("<!DOCTYPE domain [<!ENTITY % x SYSTEM 'file:///etc/passwd'> %x;]><domain/>", "has a document type"),
        ("<domain>&x;</domain>", "is not well-formed"),
        ("<domain><devices></domain>", "is not well-formed"),
        ("", "is not well-formed"),
        ("win10", "is not well-formed"),
        ("<?xml version='1.0' encoding='x'?><domain/>", "cannot be read: "),
        ("<?xml version='1.0' encoding='utf-7'?><domain/>", "cannot be read: "),
        (domain("x" * hook.LIMIT), "is longer than 1 MiB"),
    ],
)
def test_xml_that_is_of_no_use(xml: str, reason: str) -> None:
    with pytest.raises(hook.BadDomainError, match=f"its XML {reason}"):
        addresses(xml)


def test_long_and_deep_xml_is_read() -> None:
    assert addresses(domain(ON_BUS_1, "<x>long</x>" * 80_000)) == [GPU]
    assert addresses(domain(ON_BUS_1, "<x>" * 120_000 + "</x>" * 120_000)) == [GPU]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config": "[defaults]\nbusy = 'wait'\n"},
        {"config": table("01:00.0")},
        {"config": table("pci_0000_01_00_0", members=["0000:05:00.0", "05:00.1"]) + table("0000:0A:00.0")},
        {"config": table("01:00.0", members=["05:00.0"]), "d_a": table("0000:01:00.0", name="a")},
        {"config": table("01:00.0", members=["05:00.0"]), "d_a": table("0000:01:00.0", members=["06:00.0"])},
        {"config": table("01:00.0", members=["05:00.0"]), "d_a": table("0000:01:00.0", members=[])},
        {"d_b": table("01:00.0", members=["05:00.0"]), "d_a": table("01:00.0", members=["06:00.0"])},
        {"config": table("01:00.0"), "d_a": table("0000:02:00.0"), "d_.hidden": table("0000:03:00.0")},
        {"config": table("01:00.0"), "d_a": "gpu = []\n", "other": table("0000:03:00.0")},
    ],
)
def test_the_configuration_is_read_as_the_service_reads_it(tmp_path: Path, files: dict[str, str]) -> None:
    directory = write(tmp_path, **files)
    service = {gpu.address: list(gpu.members) for gpu in loading.load(directory, {}).gpus}
    assert hook.configured(str(directory)) == service


def test_no_configuration_manages_nothing(tmp_path: Path) -> None:
    assert hook.configured(str(tmp_path / "missing")) == {}


def test_faults_in_other_keys_do_not_matter(tmp_path: Path) -> None:
    directory = write(tmp_path, config="[gqu]\n" + table("01:00.0", busy="perhaps"))
    assert hook.configured(str(directory)) == {GPU: []}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[[gpu]\n", "cannot use .*config.toml: Expected ']]'"),
        (table("1:0.0"), "'1:0.0' is not a PCI address"),
        (table("01:00.0", members=["eth0"]), "'eth0' is not a PCI address"),
        (table("01:00.0", members=5), "each GPU is a .* table with an address"),
        ("[[gpu]]\nname = 'x'\n", "each GPU is a .* table with an address"),
        ("[gpu]\naddress = '01:00.0'\n", "each GPU is a .* table with an address"),
        ("gpu = '01:00.0'\n", "each GPU is a .* table with an address"),
        ("gpu = 1\n", "each GPU is a .* table with an address"),
        ("[[gpu]]\naddress = 1\n", "each GPU is a .* table with an address"),
        (f"a = {'[' * 5000}", "cannot use .*config.toml: it is nested too deeply"),
    ],
)
def test_a_configuration_that_does_not_say_which_gpus_are_managed(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hook.configured(str(write(tmp_path, config=content)))


def test_an_older_python_cannot_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hook.configured(str(tmp_path)) == {}
    directory = write(tmp_path, config=table("01:00.0"))
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(ValueError, match=r"cannot use .*config\.toml: .* is older than Python 3\.11"):
        hook.configured(str(directory))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(write(tmp_path) / "conf.d" / "pipe.toml")
    with pytest.raises(ValueError, match=r"conf\.d/pipe\.toml: it is not a regular file"):
        hook.configured(str(tmp_path))
    (tmp_path / "conf.d" / "pipe.toml").unlink()
    (tmp_path / "config.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"cannot use .*config\.toml"):
        hook.configured(str(tmp_path))


def test_which_functions_are_of_managed_gpus(tmp_path: Path) -> None:
    directory = str(write(tmp_path, config=table("01:00.0", members=["05:00.1"])))
    member = (0, 5, 0, 1)
    devices = str(tmp_path / "none")
    assert hook.managed_of([GPU], directory, devices) == [GPU]
    assert hook.managed_of([SOUND, member], directory, devices) == [SOUND, member]
    assert hook.managed_of([(0, 2, 0, 0), (1, 1, 0, 0), (0, 1, 1, 0), (0, 5, 0, 0)], directory, devices) == []
    assert hook.managed_of([], directory, devices) == []
    assert hook.managed_of(None, directory, devices) == [GPU]


def test_a_virtual_function_in_the_slot_is_its_own(tmp_path: Path) -> None:
    tree, virtual = Tree(tmp_path), (0, 1, 0, 1)
    tree.function("0000:01:00.0")
    link(tree.function("0000:01:00.1") / "physfn", tree.path("0000:01:00.0"))
    devices = str(tree.sys / "bus/pci/devices")
    assert hook.managed_of([GPU, virtual], str(write(tmp_path / "etc", config=table("01:00.0"))), devices) == [GPU]
    # Nothing else would keep it from going unguarded.
    named = str(write(tmp_path / "named", config=table("01:00.0", members=["01:00.1"])))
    assert hook.managed_of([virtual], named, devices) == [virtual]


def test_a_card_with_a_switch_is_one(tmp_path: Path) -> None:
    """Intel's Arc; another card behind a switch of the board's."""
    tree = Tree(tmp_path)
    above = ("0000:00:01.0", "0000:01:00.0")
    makers = {"8086:4fa0": "0000:02:01.0", "8086:4fa4": "0000:02:04.0"}
    tree.function(above[0], class_code="060400", ids="8086:460d")
    tree.function(above[1], class_code="060400", ids="8086:4fa0", under=above[:1])
    for ids, port in makers.items():
        tree.function(port, class_code="060400", ids=ids, under=above)
    tree.function("0000:03:00.0", ids="8086:56a1", under=(*above, "0000:02:01.0"))
    tree.function("0000:04:00.0", class_code="040300", ids="8086:4f90", under=(*above, "0000:02:04.0"))
    tree.function("0000:00:1f.3", class_code="040300", ids="8086:7ad0")
    directory, devices = str(write(tmp_path / "etc", config=table("03:00.0"))), str(tree.sys / "bus/pci/devices")
    sound = (0, 4, 0, 0)
    assert hook.managed_of([sound, (0, 0, 0x1F, 3)], directory, devices) == [sound]
    tree.plain("0000:01:00.0", "vendor", "0x10b5\n")
    assert hook.managed_of([sound], directory, devices) == []
