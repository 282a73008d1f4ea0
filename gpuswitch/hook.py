"""Asks gpuswitchd for the GPUs of a libvirt domain, and gives them back: run by contrib/libvirt/qemu.d/50-gpuswitch.

    /usr/bin/python3 -ISE hook.py DOMAIN prepare|started|reconnect|release SUB-OPERATION REASON <DOMAIN-XML

Uses the standard library, /usr/bin/dbus-send and nothing else: AppArmor lets a hook run no program that lies elsewhere,
and whichever Python the system has must do. Only `prepare` ends with another status than 0: with 1 where the domain
must not start, and the reason in one line on stderr, which libvirt shows to whoever wanted to start it. When a hook is
called, and what its status does: virHookCall and its callers in libvirt's src/qemu/qemu_process.c.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import time
from xml.parsers import expat

# Of what a virtual machine waits for, Python's start is the most; `re`, and `subprocess` with it, would treble that.
TYPE_CHECKING = False  # as typing has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

DBUS_SEND = "/usr/bin/dbus-send"
CONFIGURATION = "/etc/gpuswitch"
DEVICES = "/sys/bus/pci/devices"
LIMIT = 1 << 20
"""Bytes of XML that are read."""
PATIENCE = 930
"""Seconds for `prepare`: longer than gpuswitchd may take to start (300) and then to make a GPU ready (600)."""
HANDOVER = 10
"""Seconds for what gpuswitchd answers at once. `release` runs in the one thread that serves all of libvirt's events."""

REFUSALS = "org.gpuswitch1.Error."
DOWN = (
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.DBus.Error.TimedOut",
    "org.freedesktop.systemd1.",
)
"""What the bus says where it could not start the service either: dbus-daemon's activation.c and systemd's own reasons;
of dbus-broker it is always the first (driver.c, driver_name_activation_failed)."""

Address = tuple[int, int, int, int]
"""Domain, bus, slot and function of a PCI function."""


class BadDomainError(Exception):
    """What says which devices a virtual machine has cannot be used: `its XML is ...`, `its configuration has ...`."""


class RefusedError(Exception):
    """The domain must not start; the sentence says why."""


class UnansweredError(Exception):
    """gpuswitchd has not said yes or no; the sentence says why."""


def main(arguments: list[str]) -> int:
    """Do what libvirt's four arguments ask for; the exit status."""
    name, operation, _, reason = arguments
    xml = sys.stdin.buffer.read(LIMIT + 1)
    try:
        if operation == "prepare":
            acquire(name, lambda: read_domain(xml))
        elif operation in {"started", "reconnect"}:
            adopt(name, *read_domain(xml))
        elif operation == "release":
            uuid, addresses = read_domain(xml)
            # One that was unplugged while it ran is not in the XML any more: then gpuswitchd sees by itself when its
            # process is gone.
            if addresses:
                release(name, uuid, reason)
    except (BadDomainError, RefusedError, UnansweredError) as error:
        said = str(error)
    except Exception as error:  # noqa: BLE001 - nobody who starts a virtual machine can use a traceback
        said = f"cannot look after the GPUs of {name}: {error!r}"
    else:
        return 0
    print(f"gpuswitch: {said}", file=sys.stderr)  # noqa: T201 - this is how a hook speaks
    return 1 if operation == "prepare" else 0


def acquire(name: str, read: Callable[[], tuple[str, list[Address]]]) -> None:
    """Wait until the managed GPUs of a virtual machine are ready for it. gpuswitchd knows which are managed.

    `read` gives the machine's UUID and its functions. Where gpuswitchd cannot be asked, the configuration says which
    GPUs are managed, without the `GPUSWITCH_...` variables, which only the service has: a machine with a managed GPU
    does not start then, and any other does. The same goes for one of which nobody knows what it has.

    Raises:
        RefusedError: the machine must not start.
    """
    addresses = None
    try:
        uuid, addresses = read()
        if addresses:
            call("AcquireForVm", PATIENCE, _string(name), _string(uuid), _strings(addresses))
    except (BadDomainError, UnansweredError) as error:
        try:
            taken = managed_of(addresses, CONFIGURATION)
        except ValueError as fault:
            raise RefusedError(f"cannot tell whether {name} has a managed GPU: {error}; and {fault}") from None
        if taken:
            raise RefusedError(f"cannot give {', '.join(map(text, taken))} to {name}: {error}") from None


def adopt(name: str, uuid: str, addresses: list[Address]) -> None:
    """Tell gpuswitchd that a virtual machine runs, with these functions.

    Raises:
        RefusedError, UnansweredError: it does not know now.
    """
    if addresses:
        call("AdoptVm", HANDOVER, _string(name), _string(uuid), _strings(addresses))


def release(name: str, uuid: str, reason: str) -> None:
    """Tell gpuswitchd that a virtual machine is gone, and why: `shutdown`, `saved`, ... (libvirt's docs/hooks.rst).

    Raises:
        RefusedError, UnansweredError: it does not know now.
    """
    call("ReleaseFromVm", HANDOVER, _string(name), _string(uuid), _string(reason))


_PASSED_THROUGH = (("hostdev", "subsystem", "pci"), ("interface", "subsystem", "hostdev"))
"""Tag, mode and type of devices."""
_QEMU_ARGUMENT = ["domain", "commandline", "arg"]
"""In a namespace of its own, whatever prefix that has."""


def read_domain(xml: bytes) -> tuple[str, list[Address]]:
    """The uuid of a domain, and which PCI functions of the host it gets.

    These are the source addresses of `<hostdev mode='subsystem' type='pci'>` and `<interface type='hostdev'>`, as in
    libvirt's virDomainHostdevDefParseXML; those of `<disk type='nvme'>` and of what is under such a disk
    (virDomainDiskSourceNVMeParse); and what `<qemu:commandline>` hands to QEMU's vfio-pci. Other addresses are where
    the guest sees something.

    Raises:
        BadDomainError: too long, not well-formed, in an unknown encoding, with a document type or entities, or with
            addresses that are none.
    """
    if len(xml) > LIMIT:
        raise BadDomainError(f"its XML is longer than {LIMIT >> 20} MiB")
    domain = _Domain()

    def refuse(*_: object) -> None:
        raise BadDomainError("its XML has a document type")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse  # entities are declared there, and nowhere else
    parser.StartElementHandler = domain.start
    parser.EndElementHandler = domain.end
    parser.CharacterDataHandler = domain.characters
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        raise BadDomainError(f"its XML is not well-formed: {error}") from None
    except (LookupError, ValueError) as error:  # it says that it is in an encoding that Python does not know
        raise BadDomainError(f"its XML cannot be read: {error}") from None
    return "".join(domain.uuid).strip(), domain.addresses


class _Domain:
    """What a domain's XML says, as expat reads it. An element costs the same however deep it is."""

    def __init__(self) -> None:
        self.uuid: list[str] = []
        self.addresses: list[Address] = []
        self._path: list[str] = []
        self._kinds: list[tuple[str, str, str | None]] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        self._kinds.append((tag, attributes.get("mode", "subsystem"), attributes.get("type")))
        if self._at_an_address():
            self.addresses.append(_address(attributes))
        elif len(self._path) == 3 and [each.rpartition(":")[2] for each in self._path] == _QEMU_ARGUMENT:
            self.addresses.extend(of_qemu(attributes.get("value", "")))

    def end(self, _: str) -> None:
        self._path.pop()
        self._kinds.pop()

    def characters(self, data: str) -> None:
        if self._path == ["domain", "uuid"]:
            self.uuid.append(data)

    def _at_an_address(self) -> bool:
        """Whether this element says where something of the host is."""
        path, kinds = self._path, self._kinds
        if path[:2] != ["domain", "devices"] or path[-2:] != ["source", "address"]:
            return False
        if path[2] == "disk":
            return kinds[-3][2] == "nvme"
        return len(path) == 5 and kinds[2] in _PASSED_THROUGH


def call(method: str, seconds: float, *arguments: str) -> None:
    """Call the service, and start it where it is not running. Returns when it has answered.

    Raises:
        RefusedError: its answer is no.
        UnansweredError: there is none.
    """
    wait = f"--reply-timeout={round(seconds * 1000)}"
    to = ("--dest=org.gpuswitch1", "/org/gpuswitch1", f"org.gpuswitch1.Manager.{method}")
    try:
        status, said = run([DBUS_SEND, "--system", "--print-reply=literal", wait, *to, *arguments], seconds + 5)
    except TimeoutError:
        raise UnansweredError(f"the system bus has not answered within {seconds:g} s") from None
    except OSError as error:
        raise UnansweredError(f"cannot run {DBUS_SEND}: {error.strerror}; it comes with D-Bus (dbus-bin)") from None
    if status == 0:
        return
    import re  # noqa: PLC0415 - slow to import, and needed only for what is wrong

    found = re.search(r"^Error ([\w.]+): (.*)", said, re.MULTILINE | re.DOTALL)
    name, reason = found.groups() if found else ("", said)
    reason = "; ".join(line.strip() for line in reason.splitlines() if line.strip())
    if name.startswith(REFUSALS):
        raise RefusedError(reason)
    if name.startswith(DOWN):
        raise UnansweredError(
            f"gpuswitchd is not running and could not be started ({reason}); run: systemctl start gpuswitchd"
        )
    reason = reason or f"dbus-send ended with status {status}"
    raise UnansweredError(f"gpuswitchd has not answered ({reason}); run: systemctl status gpuswitchd")


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a program that ends with us, however we end; its status, and what it said on stderr.

    Its stdin is a pipe that we keep open. When we are gone the kernel closes it, and sends it SIGIO (fcntl(2)), which
    ends it: so gpuswitchd sees that nobody waits for its answer any more, also when the hook was killed.

    Raises:
        OSError: it cannot be started.
        TimeoutError: it has not ended in time, and does not run any more.
    """
    until = time.monotonic() + seconds
    theirs, ours = os.pipe()
    said, says = os.pipe()
    fails, failure = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _become(command, theirs, says, failure)
        for each in (says, failure):
            os.close(each)
        try:
            text = _until_it_ends(child, said, until)
        except BaseException:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise
        _, status = os.waitpid(child, 0)
        if number := os.read(fails, 16):
            raise OSError(int(number), os.strerror(int(number)))
    finally:
        for each in (theirs, ours, said, fails):
            os.close(each)
    return os.waitstatus_to_exitcode(status), text.decode(errors="replace")


def _become(command: list[str], stdin: int, stderr: int, failure: int) -> NoReturn:
    """In a child: be that program, or write the errno of why that is not possible, and end. The ends of pipes but those
    three descriptors are closed by that (PEP 446).
    """
    try:
        fcntl.fcntl(stdin, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(stdin, fcntl.F_SETFL, os.O_ASYNC)
        for number, each in enumerate((stdin, os.open(os.devnull, os.O_WRONLY), stderr)):
            os.dup2(each, number)
        os.execv(command[0], command)  # noqa: S606 - it has a path, and no shell is wanted
    except OSError as error:
        os.write(failure, str(error.errno).encode())
    finally:
        os._exit(127)


def _until_it_ends(child: int, said: int, until: float) -> bytes:
    """What it says until it has ended.

    Raises:
        TimeoutError: it has not, in time.
    """
    text = b""
    ended = os.pidfd_open(child)
    waiting = select.poll()
    for each in (said, ended):
        waiting.register(each, select.POLLIN)
    try:
        while True:
            ready = [each for each, _ in waiting.poll(max(until - time.monotonic(), 0) * 1000)]
            if not ready:
                raise TimeoutError
            if said in ready:
                text += (more := os.read(said, 1 << 16))
                if not more:
                    waiting.unregister(said)
            elif ended in ready:
                return text
    finally:
        os.close(ended)


def managed_of(addresses: list[Address] | None, directory: str, devices: str = DEVICES) -> list[Address]:
    """Which of these belong to GPUs that the configuration names; all that it names where `addresses` is None.

    A GPU is the functions of its card, as far as can be told without knowing what they are, and its members. Virtual
    functions are their own.

    Raises:
        ValueError: what the configuration says cannot be known.
    """
    gpus = configured(directory)
    if addresses is None:
        return list(gpus)
    named = {*gpus, *(member for each in gpus.values() for member in each)}
    cards = {card_of(gpu, devices) for gpu in gpus}
    return [a for a in addresses if a in named or (card_of(a, devices) in cards and not _virtual(a, devices))]


def card_of(function: Address, devices: str) -> object:
    """What a function shares with the others of its card: the upstream port of the card's own switch, else the slot.

    As `_own_switch` in gpuswitch/model/gpu.py has it. Devices lie below their bridges in sysfs, and `vendor` is a field
    of a structure.
    """
    from pathlib import Path  # noqa: PLC0415 - as in `configured`

    path = Path(devices, text(function)).resolve()
    downstream, upstream, root = (*path.parents, path, path, path)[:3]
    try:
        makers = {(each / "vendor").read_text("ascii") for each in (path, downstream, upstream)}
    except OSError:
        return function[:3]
    ours = len(makers) == 1 and (root / "vendor").exists()
    return upstream if ours else function[:3]


def _virtual(function: Address, devices: str) -> bool:
    return os.path.lexists(f"{devices}/{text(function)}/physfn")


def configured(directory: str) -> dict[Address, list[Address]]:
    """The managed GPUs with their members, from config.toml, then conf.d/*.toml by name; later files win.

    Other keys are not looked at, so it understands files which the service refuses for those.

    Raises:
        ValueError: for a file that cannot be read or is not TOML, or where it is not clear which GPU is meant.
    """
    from pathlib import Path  # noqa: PLC0415 - slow to import, and needed only where the service is down

    gpus: dict[Address, list[Address]] = {}
    files = [Path(directory, "config.toml"), *sorted(Path(directory, "conf.d").glob("[!.]*.toml"))]
    for file in files:
        try:
            if not file.exists():
                continue
            try:
                import tomllib  # noqa: PLC0415 - as above; the service has a Python of its own
            except ImportError:
                raise ValueError(f"{sys.executable} is older than Python 3.11") from None
            if not file.is_file():  # reading a pipe would wait for its writer
                raise ValueError("it is not a regular file")
            for table in tomllib.loads(file.read_text("utf-8")).get("gpu", []):
                members = gpus.setdefault(_parse(table["address"]), [])
                if "members" in table:
                    members[:] = map(_parse, table["members"])
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"cannot use {file}: {error}") from None
        except (TypeError, KeyError):
            raise ValueError(f"cannot use {file}: each GPU is a [[gpu]] table with an address") from None
        except RecursionError:
            raise ValueError(f"cannot use {file}: it is nested too deeply") from None
    return gpus


def text(address: Address) -> str:
    """`0000:01:00.0`."""
    domain, bus, slot, function = address
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"


_DIGITS = {8: "01234567", 10: "0123456789", 16: "0123456789abcdefABCDEF"}


def _number(written: str) -> int | None:
    """As C's strtoul has it with base 0, without blanks and signs; None: it is none."""
    if written[:2] in {"0x", "0X"}:
        base, digits, most = 16, written[2:], 8
    elif written[:1] == "0":
        base, digits, most = 8, written[1:] or "0", 11
    else:
        base, digits, most = 10, written, 10
    if not digits or len(digits) > most or not set(digits) <= set(_DIGITS[base]):
        return None
    return int(digits, base)


def _address(attributes: dict[str, str]) -> Address:
    """An `<address>`: hex, decimal or octal, each part 0 where it is missing (libvirt's virPCIDeviceAddressParseXML).

    Raises:
        BadDomainError: it is none.
    """
    parts = []
    for key, most in (("domain", 0xFFFFFFFF), ("bus", 0xFF), ("slot", 0x1F), ("function", 7)):
        written = attributes.get(key, "0")
        number = _number(written)
        if number is None or number > most:
            raise BadDomainError(f"its XML has a PCI address with {key}={written[:40]!r}")
        parts.append(number)
    domain, bus, slot, function = parts
    return domain, bus, slot, function


def of_qemu(argument: str) -> list[Address]:
    """What an argument of QEMU passes through: `vfio-pci,host=01:00.0`, the same in JSON, or a `sysfsdev`.

    QEMU's set_pci_host_devaddr (hw/core/qdev-properties-system.c) takes hex numbers of any length, domain 0 left out.
    """
    import re  # noqa: PLC0415 - slow to import, and few machines have such arguments

    found = []
    for value in re.findall(r"""\b(?:host|sysfsdev)["']?\s*[=:]\s*["']?([^,"'\s}]+)""", argument):
        form = r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([01]?[0-9a-fA-F])\.([0-7])"
        if match := re.fullmatch(form, value.rpartition("/")[2]):
            domain, bus, slot, function = match.groups()
            found.append((int(domain or "0", 16), int(bus, 16), int(slot, 16), int(function, 16)))
    return found


def _parse(written: str) -> Address:
    """An address of the configuration, in the spellings that the service takes.

    Raises:
        ValueError: it is none.
    """
    import re  # noqa: PLC0415 - as above; needed only where the service is down

    short = r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])"
    long = r"pci_([0-9a-f]{4,8})_([0-9a-f]{2})_([01][0-9a-f])_([0-7])"
    match = re.fullmatch(short, written, re.IGNORECASE) or re.fullmatch(long, written, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{written[:80]!r} is not a PCI address")
    domain, bus, slot, function = match.groups()
    return int(domain or "0", 16), int(bus, 16), int(slot, 16), int(function, 16)


def _string(value: str) -> str:
    return f"string:{value}"


def _strings(addresses: list[Address]) -> str:
    return f"array:string:{','.join(map(text, addresses))}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
