"""The virtual machines of libvirt, by virsh: which there are, and what one still lacks of a GPU. Nothing is changed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.translate import _
from gpuswitch.errors import Failed, InvalidArgument

Ask = Callable[..., str | None]
"""`ask("virsh", ...)`: what it answers, None where it does not."""
_VIRSH = ("virsh", "--connect", "qemu:///system")


def names(ask: Ask) -> list[str] | None:
    """All machines that are defined, in order; None: there is no libvirt that answers."""
    said = ask(*_VIRSH, "list", "--all", "--name")
    return None if said is None else sorted(filter(None, said.splitlines()))


def named(name: str, known: Sequence[str] | None) -> str:
    """The machine that is meant, in any case.

    Raises:
        CtlError: there is none.
    """
    if known is None:
        raise CtlError.of(Failed, _("cannot ask libvirt for its virtual machines: no answer from virsh"))
    if name in known:
        return name
    if found := [each for each in known if each.casefold() == name.casefold()]:
        return found[0]
    there = ", ".join(known) or _("none")
    raise CtlError.of(
        InvalidArgument, _("no virtual machine is named {name}; there are: {names}", name=name, names=there)
    )


def lacking(name: str, functions: Iterable[str], ask: Ask) -> list[str]:
    """Those PCI functions that the machine's definition has no <hostdev> for (docs/formatdomain.rst of libvirt).

    Raises:
        CtlError: nobody says what it has.
    """
    said = ask(*_VIRSH, "dumpxml", "--inactive", name)
    if said is None:
        raise CtlError.of(Failed, _("cannot ask libvirt what {name} has: no answer from virsh", name=name))
    try:
        has = set(_passed_through(ET.fromstring(said)))  # noqa: S314 -- libvirt itself has written it
    except ET.ParseError as error:
        raise CtlError.of(Failed, _("cannot read the definition of {name}: {why}", name=name, why=error)) from None
    return [each for each in functions if each not in has]


def _passed_through(domain: ET.Element) -> Iterator[str]:
    for address in domain.findall("./devices/hostdev[@type='pci']/source/address"):
        numbers = [int(address.get(key, "0"), 16) for key in ("domain", "bus", "slot", "function")]
        yield "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)


def to_attach(name: str, function: str) -> str:
    """The line for a shell that adds a function to a machine's definition, from its next start on."""
    domain, bus, slot, number = re.split("[:.]", function)
    source = f"<address domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{number}'/>"
    device = f"<hostdev mode='subsystem' type='pci' managed='yes'><source>{source}</source></hostdev>"
    word = name if re.fullmatch(r"[\w.+-]+", name, re.ASCII) else "'" + name.replace("'", "'\\''") + "'"
    return f'echo "{device}" | virsh attach-device {word} /dev/stdin --config'
