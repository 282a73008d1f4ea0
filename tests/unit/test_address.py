"""PCI addresses: every spelling that people use, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.errors import InvalidArgument
from gpuswitch.model.address import PciAddress

addresses = st.builds(
    PciAddress, st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7)
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:01:00.0", (0, 1, 0, 0)),
        ("01:00.0", (0, 1, 0, 0)),
        ("pci_0000_01_00_0", (0, 1, 0, 0)),
        ("0000:0A:1F.7", (0, 10, 31, 7)),
        ("0000:0a:1f.7", (0, 10, 31, 7)),
        ("PCI_0000_0A_1F_7", (0, 10, 31, 7)),
        ("ffff:ff:1f.7", (0xFFFF, 255, 31, 7)),
        ("10000:e1:00.0", (0x10000, 0xE1, 0, 0)),
        ("pci_10000_e1_00_0", (0x10000, 0xE1, 0, 0)),
        ("ffffffff:00:00.0", (0xFFFFFFFF, 0, 0, 0)),
    ],
)
def test_reads_every_spelling(text: str, address: tuple[int, int, int, int]) -> None:
    assert PciAddress.parse(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "01:00",
        "1:00.0",
        "01:0.0",
        "01:00.8",
        "01:20.0",
        "01:00.00",
        "000:01:00.0",
        "100000000:01:00.0",
        "0000:01:00:0",
        "0000.01.00.0",
        "0000_01_00_0",
        "pci_01_00_0",
        "pci_0000:01:00.0",
        "gg:00.0",
        " 01:00.0",
        "01:00.0 ",
        "01:00.0\n",
        "01:00.0\0",
        "-1:00.0",
        "0x01:00.0",
        "0000:01:00.0/../..",
        # digits, but not of ASCII
        "\u0660\u0661:00.0",
        "\uff10\uff11:00.0",
    ],
)
def test_refuses_the_rest_and_says_how_to_write_it(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a PCI address; write it like") as refusal:
        PciAddress.parse(text)
    assert repr(text) in str(refusal.value)


def test_a_refusal_stays_readable() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        PciAddress.parse("9" * 10_000)
    assert len(str(refusal.value)) < 200


@given(addresses)
def test_every_spelling_comes_back(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address
    assert PciAddress.parse(str(address).upper()) == address
    assert PciAddress.parse(f"pci_{address.identifier}") == address
    assert PciAddress.parse(str(address).removeprefix("0000:")) == address
    assert str(address) == f"{address.slot_name}.{address.function}"


@given(
    st.one_of(
        st.text(),
        st.from_regex(r"(pci_)?([0-9a-gA-G]{3,9}[:_])?[0-9a-f]{1,3}[:_][0-2][0-9a-f][._][0-9]", fullmatch=True),
    )
)
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = PciAddress.parse(text)
    except InvalidArgument:
        return
    assert PciAddress.parse(str(address)) == address
    assert address <= PciAddress(0xFFFFFFFF, 0xFF, 0x1F, 7)


@given(addresses, addresses)
def test_sorts_as_the_kernel_numbers(one: PciAddress, other: PciAddress) -> None:
    def number(a: PciAddress) -> int:
        return a.domain << 16 | a.bus << 8 | a.slot << 3 | a.function

    assert (one < other) == (number(one) < number(other))


def test_names_what_it_has() -> None:
    address = PciAddress(0x10000, 0xE1, 0x1F, 7)
    assert str(address) == "10000:e1:1f.7"
    assert address.slot_name == "10000:e1:1f"
    assert address.identifier == "10000_e1_1f_7"
