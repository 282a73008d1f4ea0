"""One function for each reader of what others write, given the bytes that they choose.

It swallows the errors that the reader documents, and raises for whatever must not be: any other error, or a result that
nobody could use. What stands around those bytes (the kernel's own words in /proc, the header of a message) is added
here by the rules of whoever writes it, so that what is found can happen. Of events of the kernel and of udev nothing is
read but that they came (`gpuswitch/host/linux/uevents.py`), so they have none.
"""

# The library says that it is typed; its private parts are not.
# mypy: allow-untyped-calls

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from struct import pack_into

import jeepney
from prometheus_client import CollectorRegistry, Gauge
from typing_extensions import override

from gpuswitch import hook, proxmox_hook
from gpuswitch.api.connection import Connection, Message, MessageFlag, MessageType, message_size, without_body
from gpuswitch.api.inbox import Inbox
from gpuswitch.api.interface import Interface
from gpuswitch.api.library import library
from gpuswitch.api.metrics_endpoint import MetricsEndpoint
from gpuswitch.api.options import options_of
from gpuswitch.api.serving import Authority, Caller, Server
from gpuswitch.api.signatures import plain
from gpuswitch.api.standard import Introspectable, Peer, Properties
from gpuswitch.api.users import Users
from gpuswitch.config.loading import load
from gpuswitch.config.schema import LONGEST_WAIT
from gpuswitch.config.settings import Config
from gpuswitch.errors import ConfigError, InvalidArgument
from gpuswitch.host.linux import procfs
from gpuswitch.host.linux.kernellog import LONGEST, _about
from gpuswitch.host.linux.libvirt import LinuxLibvirt
from gpuswitch.host.linux.scanning.identity import who
from gpuswitch.host.linux.scanning.kernel import Client, mounted
from gpuswitch.host.linux.scanning.open_files import Opened, Seen, Wanted, _Look
from gpuswitch.model.address import PciAddress
from gpuswitch.model.holders import Process, Unit, unit_and_session
from gpuswitch.runtime.seldom import Seldom
from gpuswitch.switch.journal.journal import Entry, Journal, boot_id
from tests.fuzz.served import Example

GPU = PciAddress.parse("0000:01:00.0")
BOOT = b"01234567-89ab-4cde-8f01-23456789abcd"
"""Stands for this boot in a page of the journal."""
SEPARATOR = b"\n\n"
"""Between what somebody chooses in several places."""


# What libvirt says


def domain(data: bytes) -> None:
    """The XML that libvirt hands to its hook: all root's, but for names and metadata."""
    try:
        uuid, addresses = hook.read_domain(data)
    except hook.BadDomainError:
        return
    assert b"\0" not in uuid.encode()
    assert len(addresses) <= len(data)
    for address in addresses:
        assert PciAddress.parse(hook.text(address)) == address


def status_file(data: bytes) -> None:
    """What libvirt keeps of a machine that runs: a file that makes no sense hides no other."""
    folder = _folder("libvirt")
    (folder / "a.xml").write_bytes(data)
    (folder / "b.xml").write_bytes(_KNOWN_MACHINE)
    machines = LinuxLibvirt(str(folder)).machines()
    assert GPU in next(functions for owner, functions in machines.items() if owner.uuid == "known")
    for owner, functions in machines.items():
        assert (type(owner.name), type(owner.uuid)) == (str, str)
        assert all(PciAddress.parse(str(function)) == function for function in functions)


_KNOWN_MACHINE = (
    b"<domstatus><domain><name>b</name><uuid>known</uuid><devices><hostdev type='pci'><source><address bus='1'/>"
    b"</source></hostdev></devices></domain></domstatus>"
)


# What Proxmox VE says

_DEVICES = ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0", "1234:f0:1d.7", "pci0000:00"]


def proxmox_machine(data: bytes) -> None:
    """The configuration of a machine: its owner's, by way of the web page, or edited by hand."""
    _proxmox(data, _MAPPING)


def proxmox_mapping(data: bytes) -> None:
    """The devices of the cluster's nodes, of whoever may change mappings; and what qemu-server has given to whom."""
    pci_cfg, _, given = data.partition(SEPARATOR)
    _proxmox(_MACHINE, pci_cfg)
    for function, (vmid, kind, number) in proxmox_hook.reserved(given.decode(errors="replace")).items():
        assert PciAddress.parse(hook.text(function)) == function
        assert vmid.isdecimal()
        assert kind in {"time", "pid"}
        assert number >= 0


_MACHINE = b"name: win11\nhostpci0: mapping=gpu,pcie=1\nhostpci1: 01:00\n"
_MAPPING = b"gpu\n\tmap id=10de:2484,node=pve,path=0000:01:00.0;0000:01:00.1\n\tmap node=pve,path=0000:02:00\n"


def _proxmox(machine: bytes, pci_cfg: bytes) -> None:
    try:
        conf = proxmox_hook.main_section(machine.decode(errors="replace"))
        devices = proxmox_hook.devices(conf, pci_cfg.decode(errors="replace"), "pve")
    except (hook.BadDomainError, hook.RefusedError) as error:
        _assert_short(str(error))
        return
    assert proxmox_hook.name_of("101", conf).isprintable()
    assert len(devices) <= proxmox_hook.MOST_DEVICES
    for _, _, alternatives, _ in devices:
        for _, places in alternatives:
            for place in places:
                for function in proxmox_hook.functions_at(place, _DEVICES):
                    assert PciAddress.parse(hook.text(function)) == function
                    assert hook.text(function).startswith(place)


# What the administrator writes


def configuration(data: bytes) -> None:
    """A file of settings. The hook sees the GPUs in it that the service sees; what is in force can be written again."""
    folder = _folder("etc")
    _write_settings(folder, data)
    seen: dict[hook.Address, list[hook.Address]] | None = None
    with suppress(ValueError):
        seen = hook.configured(str(folder))
    try:
        config = load(folder, {})
    except ConfigError as error:
        _assert_sentences(str(error))
        return
    assert seen == {gpu.address: [*gpu.members] for gpu in config.gpus}
    lines = [f"{each.key} = {each.value}" for each in config.settings if not each.key.startswith("gpu[")]
    _write_settings(folder, "\n".join(lines).encode())
    again = load(folder, {})
    assert _tables(again) == _tables(config)


def _assert_sentences(text: str) -> None:
    """One line for each fault."""
    assert all(line.startswith("cannot ") for line in text.split("\n"))


def _write_settings(folder: Path, content: bytes) -> None:
    file = folder / "config.toml"
    file.write_bytes(content)
    file.chmod(0o600)  # root takes no orders from files that others may write


def _tables(config: Config) -> tuple[object, ...]:
    return config.defaults, config.deadlines, config.metrics, config.history


# What peers on the bus say


class _Wire(Connection):
    """A connection that has nothing but what it has received; what it hands on and what it sends is kept."""

    def __init__(self, received: bytes) -> None:
        self.owner_of = str
        self._inbox = Inbox()
        self._working = True
        self._pause = None
        self._skipping = 0
        self._told = deque(maxlen=64)
        self._tells = Seldom()
        self._unsent = bytearray()
        self._received = bytearray(received)
        self._disconnected = False
        self.messages: list[Message] = []
        self.sent: list[Message] = []

    def read(self) -> list[Message]:
        """The messages in what was received."""
        self._sort()
        while (frame := self._inbox.take()) is not None:
            self._handle(frame)
        return self.messages

    def _on_message(self, message: Message) -> None:
        self.messages.append(message)

    def _finalize(self, err: Exception | None = None) -> None:
        assert isinstance(err, ValueError)
        self._disconnected = True

    def send(self, message: Message) -> None:
        self.sent.append(message)


def dbus_message(data: bytes) -> None:
    """Bytes from the bus. A message has a body that fits its signature, and a header that can be read without it."""
    for message in _Wire(data).read():
        assert isinstance(message, Message)
        types = message.signature_tree.types
        assert len(message.body) in {0, len(types)}
        for value in message.body:
            _assert_plain(plain(value))
    try:
        size = message_size(data)
    except ValueError:
        return
    if size is None or size > len(data):
        return
    frame = data[:size]
    # The library lets a header reach into the body, which no bus does: then there may be none without it.
    for whole, bare in zip(_Wire(frame).read(), _Wire(without_body(frame)).read(), strict=False):
        assert bare.body == []
        assert (bare.path, bare.member, bare.sender) == (whole.path, whole.member, whole.sender)


def dbus_call(data: bytes) -> None:
    """A call gets one answer, which another D-Bus library can read, and which is no excuse for a fault of ours."""
    call = next((each for each in _Wire(data).read() if each.message_type is MessageType.METHOD_CALL), None)
    # The bus lets no message pass that has no serial, or not the body that it says, or a text with a zero byte; and it
    # writes who sent it.
    if call is None or not call.serial or len(call.body) != len(call.signature_tree.types):
        return
    if "\\x00" in repr((call.path, call.interface, call.member, call.body)):
        return
    call.sender = ":1.7"
    answers = asyncio.run(_answers(call))
    assert len(answers) == (0 if call.flags & MessageFlag.NO_REPLY_EXPECTED else 1)
    for each in answers:
        [answer] = _parsed(library.marshal(each))
        assert answer.header.fields[jeepney.HeaderFields.reply_serial] == call.serial
        assert answer.header.fields[jeepney.HeaderFields.destination] == ":1.7"
        assert "an error inside gpuswitchd" not in str(answer.body)


async def _answers(message: Message) -> list[Message]:
    wire = _Wire(b"")
    tree: dict[str, dict[str, Interface]] = {}

    def everywhere(path: str) -> list[Interface]:
        return [Introspectable(tree, path), Peer(_machine_id)]

    table = {each.dbus_name: each for each in (Example(), *everywhere("/org/gpuswitch1"))}
    tree["/org/gpuswitch1"] = {**table, Properties.dbus_name: Properties(table)}
    server = Server(wire, tree, everywhere, Users(_user, _process), lambda _: None)
    server.authority = _Everybody()
    server.serve(message)
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)
    return wire.sent


async def _machine_id() -> str:
    return "0" * 32


async def _user(name: str) -> int:
    return USER


async def _process(name: str) -> int:
    return len(name)


class _Everybody(Authority):
    """Everybody may do everything."""

    @override
    async def permit(self, caller: Caller, action: str, about: Mapping[str, str]) -> None:
        """Yes."""


def _parsed(frame: bytes) -> list[jeepney.Message]:
    parser = jeepney.low_level.Parser()
    parser.add_data(frame)
    return list(iter(parser.get_next_message, None))


def options(data: bytes) -> None:
    """What a peer sends as the options of a switch: the body of a message."""
    frame = bytearray(without_body(_CALL_WITH_OPTIONS) + data)
    pack_into("<I", frame, 4, len(data))
    for message in _Wire(bytes(frame)).read():
        for body in message.body:
            values = plain(body)
            assert isinstance(values, dict)
            try:
                given = options_of(values)
            except InvalidArgument as error:
                _assert_short(str(error))
                continue
            assert given.wait_seconds is None or 0 < given.wait_seconds <= LONGEST_WAIT
            assert all(name.isprintable() and len(name) <= 255 for name in given.stop_units)


def _assert_short(sentence: str) -> None:
    assert len(sentence) < 500


_CALL_WITH_OPTIONS = jeepney.new_method_call(
    jeepney.DBusAddress("/org/gpuswitch1", "org.gpuswitch1", "org.example.Gpu"), "ToVfio", "a{sv}", ({},)
).serialise(1)


def _assert_plain(value: object) -> None:
    """Nothing of the D-Bus library is left in it."""
    match value:
        case list():
            for each in value:
                _assert_plain(each)
        case dict():
            for key, each in value.items():
                assert isinstance(key, str | int | float)
                _assert_plain(each)
        case _:
            assert isinstance(value, str | int | float | bytes)


def metrics_request(data: bytes) -> None:
    """What a client of the metrics asks for over HTTP."""
    answer = _endpoint()._answer(data + b"\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 ")
    assert len(lines) == 4, "a client has written a header of the answer"
    assert not body or b"Content-Length: %d" % len(body) in lines


@cache
def _endpoint() -> MetricsEndpoint:
    registry = CollectorRegistry()
    Gauge("gpuswitch_gpu_state", "Made up.", ["gpu"], registry=registry).labels("0000:01:00.0").set(1)
    return MetricsEndpoint(registry)


# What lies on the disk


def journal_page(data: bytes) -> None:
    """A page is read as it was written, or set aside: one that would be written otherwise was not written by us."""
    pages = _Pages(data.replace(BOOT, boot_id().encode()))
    entry = Journal(pages).load(GPU)
    if pages.aside:
        assert entry == Entry()
        return
    if entry.stuck is not None:  # without what nobody can find again
        Journal(pages).save(GPU, entry)
        entry = Journal(pages).load(GPU)
    if entry:
        Journal(pages).save(GPU, entry)
        assert Journal(pages).load(GPU) == entry
        assert not pages.aside


class _Pages:
    """A store in memory (`gpuswitch.switch.journal.store`)."""

    def __init__(self, page: bytes) -> None:
        self._pages = {GPU.identifier: page}
        self.aside: list[str] = []

    def names(self) -> list[str]:
        return [*self._pages]

    def where(self, name: str) -> str:
        return f"page {name}"

    def read(self, name: str) -> bytes:
        return self._pages[name]

    def reserve(self, name: str) -> None:
        """There is room."""

    def replace(self, name: str, content: bytes) -> None:
        self._pages[name] = content

    def remove(self, name: str) -> None:
        del self._pages[name]

    def set_aside(self, name: str) -> None:
        self.aside.append(name)


# What processes put into /proc

PARENT, STARTED, USER = 999, 4321, 1000
"""What the kernel says of a process, whatever that calls itself."""
_CGROUP = b"/user.slice/user-1000.slice/user@1000.service/"
"""Below it, a user makes folders as he likes."""
_INODES = 0x1000
_BLOCK, _FULL = "b8:17", "c1:7"


def process(data: bytes) -> None:
    """A process's name, its arguments, and where below its user's manager it is: it is who it is all the same."""
    name, arguments, cgroup, *_ = [*data.split(SEPARATOR, 2), b"", b""]
    name = name.replace(b"\0", b"")[:15]
    shown = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n")  # proc_task_name in fs/proc/array.c
    below = b"".join(cgroup.replace(b"\0", b"").split(b"\n"))  # cgroup_mkdir refuses those
    folder = _folder("process")
    (folder / "stat").write_bytes(b"7 (%b) S %d 7 7 0 -1 4194560%b 1 0 %d 0\n" % (name, PARENT, b" 0" * 10, STARTED))
    (folder / "status").write_bytes(b"Name:\t%b\nUmask:\t0022\nUid:\t%d\t0\t0\t0\n" % (shown, USER))
    (folder / "cmdline").write_bytes(arguments)
    (folder / "cgroup").write_bytes(b"0::%b%b\n" % (_CGROUP, below))
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        it = who(descriptor)
    finally:
        os.close(descriptor)
    assert it is not None
    assert (it.parent, it.started, it.uid, it.empty) == (PARENT, STARTED, USER, False)
    unit, session = unit_and_session(it.cgroup)
    assert session == ""
    assert unit is not None
    assert unit.user == USER or unit == Unit("user@1000.service")
    assert _called(name) == _called(b"")


def _called(name: bytes) -> Process | None:
    """This process, as long as it is called that."""
    own = Path("/proc/self/comm")
    before = own.read_bytes()
    own.write_bytes(name + b"\0")
    try:
        return procfs.process(os.getpid())
    finally:
        own.write_bytes(before)


def open_files(data: bytes) -> None:
    """The paths that a process has mapped, and what a driver says of a descriptor: what is a device is found."""
    paths, _, said = data.partition(SEPARATOR)
    folder = _folder("proc/7")
    # show_map_vma in fs/proc/task_mmu.c: a new line in a path is written in octal.
    lines = [
        b"%x-%x r--s 00000000 00:05 %d %b\n" % (number << 12, (number + 1) << 12, number, path.replace(b"\n", rb"\012"))
        for number, path in enumerate(paths.split(b"\0"), _INODES)
    ]
    (folder / "maps").write_bytes(b"".join(lines))
    for name in ("fd", "fdinfo", "map_files", "task"):
        (folder / name).mkdir(exist_ok=True)
    _link(folder / f"map_files/{_INODES << 12:x}-{(_INODES + 1) << 12:x}", "/dev/full")
    _link(folder / "fd/3", "anon_inode:[vfio-device]")
    (folder / "fd/anon_inode:[vfio-device]").touch()
    (folder / "fdinfo/3").write_bytes(said)
    found: list[Seen] = []
    wanted = Wanted(str(folder.parent), "/sys", frozenset({_FULL}), frozenset({str(GPU)}), vfio=True)
    _Look(wanted, lambda seen: seen).process("7", found.append)
    [seen] = found
    assert (seen.pid, seen.mapped, seen.doubt) == (7, {_FULL}, "")
    assert seen.opened in ([], [Opened("anon_inode:[vfio-device]", 7, 3)])


def _link(path: Path, target: str) -> None:
    if not path.is_symlink():
        path.symlink_to(target)


def mounts(data: bytes) -> None:
    """Where somebody has mounted something, and what they say it is: in a user namespace, anybody may."""
    place, _, source = (part.replace(b"\0", b"")[:4000] for part in data.partition(SEPARATOR))
    shown = _octal(b"/" + place, b" \t\n\\")  # show_mountinfo in fs/proc_namespace.c
    lines = (
        b"36 35 8:17 / %b rw shared:1 - ext4 /dev/sdb1 rw\n" % shown,
        b"37 35 0:30 / %b rw - tmpfs %b rw\n" % (shown, _octal(source, b" \t\n\\#")),
    )
    proc = _folder("mounts")
    (proc / "1/ns").mkdir(parents=True, exist_ok=True)
    _link(proc / "1/ns/mnt", "mnt:[1]")
    (proc / "1/mountinfo").write_bytes(b"".join(lines))
    found = mounted(str(proc), {_BLOCK})
    assert found == {Client("mount", f"mounted on {(b'/' + place).decode(errors='replace')}", _BLOCK)}


def _octal(text: bytes, escaped: bytes) -> bytes:
    """As mangle_path in fs/seq_file.c writes it."""
    return b"".join(rb"\%03o" % byte if byte in escaped else bytes([byte]) for byte in text)


# What the kernel says, to people


def kernel_log(data: bytes) -> None:
    """The output of journalctl: what drivers print, or whoever may write to /dev/kmsg."""
    for line in _about(data.decode(errors="replace"), {GPU}, {"nvidia", "snd_hda_intel"}):
        assert line.isprintable()
        assert len(line) <= LONGEST


MEMORY = "/dev/shm"  # noqa: S108 -- for folders of our own; on a disk, each write would be waited for


@cache
def _root() -> Path:
    """Taken away at the end of this process, unless libFuzzer ends it; but for that, TMPDIR is in a folder to go."""
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="gpuswitch-fuzz-", dir=os.environ.get("TMPDIR", memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _folder(name: str) -> Path:
    folder = _root() / name
    folder.mkdir(parents=True)
    return folder


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        domain,
        proxmox_machine,
        proxmox_mapping,
        status_file,
        configuration,
        dbus_message,
        dbus_call,
        options,
        metrics_request,
        journal_page,
        process,
        open_files,
        mounts,
        kernel_log,
    )
}
