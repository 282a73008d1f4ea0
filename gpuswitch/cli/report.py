"""`report`: one file for a report of a fault, with all that whoever mends it would ask for, and nobody's names in it.

It is in English, whoever makes it, since others are to read it. It works without the service, and says what could not
be seen.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import re
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from gpuswitch import __version__
from gpuswitch.cli import sysfs
from gpuswitch.cli.client import NAME, PEER, ROOT, Service, call
from gpuswitch.cli.configuration import DIRECTORY, judged
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.journal import Line, UnreadableError, kernel_lines, service_lines
from gpuswitch.cli.names import STOCK, names_in, uids_in
from gpuswitch.cli.output import as_json, clean, line, moment, write
from gpuswitch.cli.records import entry_record, gpu_record
from gpuswitch.cli.redaction import Redaction, words
from gpuswitch.cli.translate import _, english, is_english, mark, recognized
from gpuswitch.errors import EXIT_UNREACHABLE, Failed, InvalidArgument

PAGES = Path("/run/gpuswitch/gpus")
SWITCHES = 20
FAILURES = 3
"""Switches that did not end as was asked, with all their steps."""
LOG_LINES = 300
KERNEL_LINES = 300
_SECONDS = 10.0
"""How long a program may take to say its version."""
ANSWER_SECONDS = 10.0
"""How long the service may take to say that it is there: what else it says takes as long as it does elsewhere."""
_FIRST_PERSON, _NOBODY = 1000, 65534
"""User numbers of people begin there (UID_MIN in login.defs(5)), those of directories in the network far above."""
_PARAMETERS = re.compile(
    r"(iommu|intel_iommu|amd_iommu|vfio|pci|nvidia|amdgpu|nouveau|i915|xe|kvm|fbcon|video|module_blacklist"
    r"|modprobe\.blacklist|rd\.driver|initcall_blacklist|nomodeset|hugepages|default_hugepagesz)\b"
)
"""Those of the kernel command line that matter here; others may say what nobody is to know."""
_UNIT = (
    "ActiveState",
    "SubState",
    "Result",
    "NRestarts",
    "ExecMainStatus",
    "MemoryPeak",
    "TasksCurrent",
    "FragmentPath",
)
_LIBVIRT = ("/etc/libvirt/qemu", "/run/libvirt/qemu")


def report(args: Namespace) -> int:
    """Write the file, and say where it is and what is not in it.

    Raises:
        CtlError: it could not be written.
    """
    if args.output == "-" and args.json:
        raise CtlError.of(InvalidArgument, _("cannot print a report with --json, which says where it is: name a file"))
    with english():
        made = _Report(args.bus)
        text = made.text().encode(errors="backslashreplace").decode()
    if args.output == "-":
        for each in text.splitlines():
            write(each)
        return 0
    path = Path(args.output or time.strftime("gpuswitch-report-%Y%m%d-%H%M%S.md")).absolute()
    _write(path, text)
    if args.json:
        as_json({"report": {"path": str(path), "unseen": made.unseen}})
        return 0
    line(_("the report is in {path}; read it before you give it to anybody", path=path))
    for each in made.missed():
        line(f"  {_('not in it: {what}', what=each)}")
    if os.geteuid() and made.unseen:
        line(_("root can see more: {command}", command="sudo gpuswitchctl report"))
    return 0


def _known(text: str) -> str:
    """Of what is marked, also where a number has been put in."""
    return said if (said := _(text)) != text else recognized(text)


def _write(path: Path, text: str) -> None:
    """A new file that only its owner may read: one that is there is somebody's."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        text = _("cannot write {path}: it is there already; name another file with --output", path=path)
        raise CtlError.of(Failed, text) from None
    except OSError as error:
        text = _("cannot write {path}: {why}; name another file with --output", path=path, why=error.strerror)
        raise CtlError.of(Failed, text) from error
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 -- a descriptor
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CtlError.of(Failed, _("cannot write {path}: {why}", path=path, why=error.strerror)) from error


class _Report:
    """What can be seen, section by section; `unseen` is what cannot, a sentence each."""

    def __init__(self, bus: str | None) -> None:
        self.unseen: list[str] = []
        self._missed: list[tuple[str, str]] = []
        """What each of them is made of."""
        self._bus = bus
        self._redaction = Redaction()
        self._functions: set[str] = set()
        self._drivers: set[str] = set()
        self._sections: list[tuple[str, list[str]]] = []

    def text(self) -> str:
        """The whole file, in Markdown."""
        for what, known in (
            (mark("the names of this machine, so they may stand here"), self._know_hosts),
            (mark("a list of its users, so their names may stand here"), self._know_users),
            (mark("a list of its virtual machines, so their names may stand here"), self._know_machines),
            (mark("the functions of its GPUs"), self._know_functions),
        ):
            self._tried(what, known)
        self._section(mark("Versions"), _versions)
        self._tried(mark("what the service knows"), self._of_the_service)
        self._section(mark("GPUs, as the kernel has them"), lambda: map(sysfs.described, sysfs.functions().values()))
        self._section(mark("Modules"), sysfs.modules)
        self._section(mark("Kernel command line, what matters here of it"), _parameters)
        self._section(mark("Unit"), _unit)
        self._section(mark("Journal pages of the service"), self._pages)
        self._section(mark("Log of the service since the machine was started"), self._log)
        self._section(mark("What the kernel said of the GPUs since then"), self._kernel)
        shown = "".join(_fenced(title, lines) for title, lines in self._sections)
        who = "root" if os.geteuid() == 0 else "a user"
        missing = "".join(f"- not in it: {each}\n" for each in self.unseen)
        head = (
            f"# gpuswitch report\n\nMade at {moment(time.time())} by {who}, with gpuswitchctl {__version__}.\n{_HEAD}"
        )
        self._know_named_in(f"{missing}{shown}")
        return self._redaction.clean(f"{head}{missing}{shown}")

    def _section(self, title: str, lines: Callable[[], Iterable[str]]) -> bool:
        """False: nobody answered."""
        return self._tried(title, lambda: self._sections.append((title, list(lines()))))

    def _tried(self, what: str, does: Callable[[], None]) -> bool:
        """What goes wrong with one of them takes nothing from the others. False: nobody answered."""
        try:
            does()
        except (CtlError, UnreadableError, OSError) as error:
            self._miss(what, str(getattr(error, "strerror", None) or error))
            return getattr(error, "exit_code", None) != EXIT_UNREACHABLE
        except Exception as error:  # noqa: BLE001 -- a fault of ours is one more thing to tell, and ends this alone
            self._miss(what, f"a fault of gpuswitchctl: {type(error).__name__}: {error}")
        return True

    def _miss(self, what: str, why: str) -> None:
        named = what if what.startswith(("GPU", "IOMMU")) else f"{what[0].lower()}{what[1:]}"
        self.unseen.append(f"{named}: {why}")
        self._missed.append((what, why))

    def missed(self) -> Iterator[str]:
        """The sentences of `unseen` in the language of whoever reads them."""
        for said, (what, why) in zip(self.unseen, self._missed, strict=True):
            yield said if is_english() else f"{_known(what)}: {recognized(why)}"

    # What the service says --------------------------------------------------------------------------------------------

    def _of_the_service(self) -> None:
        try:
            service = Service.connect(self._bus)
        except CtlError as error:
            self._without_service(str(error))
            return
        with closing(service):
            try:
                # Nobody is to be started by a report about why it does not run.
                if not service.runs(ANSWER_SECONDS):
                    self._without_service(mark("the service does not run"))
                    return
                # One that hangs is waited for once.
                service.ask(call(NAME, ROOT, PEER, "Ping"), ANSWER_SECONDS)
            except CtlError as error:
                self._without_service(str(error))
                return
            asked: tuple[tuple[str, Callable[[], Iterable[str]]], ...] = (
                (mark("Version of the service"), lambda: [f"gpuswitchd {service.version()}"]),
                (mark("Configuration in force"), lambda: self._configuration(service)),
                (mark("GPUs"), lambda: self._gpus(service)),
                (_("History, the last {count}", count=SWITCHES), lambda: self._history(service)),
                (mark("IOMMU groups"), lambda: map(_json, service.groups())),
                (mark("Who has them open"), lambda: self._holders(service)),
            )
            for title, lines in asked:
                # One that does not answer now would be waited for as long with each of the others.
                if not self._section(title, lines):
                    break

    def _without_service(self, why: str) -> None:
        self._miss(mark("what the service knows"), why)
        self._section(mark("Configuration, as the service would read it"), _verdict)

    def _configuration(self, service: Service) -> Iterator[str]:
        # A name in a list of units is theirs who wrote it there, and is what a switch does.
        yield from map(_setting, service.config())
        yield from (f"warning: {each}" for each in service.warnings())

    def _gpus(self, service: Service) -> Iterator[str]:
        for gpu in service.gpus():
            self._redaction.name("machine", *words(gpu.properties["Owner"]))
            self._functions |= {function for function, _kind, _driver in gpu.properties["Functions"]}
            self._asker(gpu.properties["Switch"])
            self._drivers |= {gpu.properties["HostDriver"], gpu.properties["Driver"]} - {""}
            yield _json(gpu_record(gpu.properties), indent=1)

    def _holders(self, service: Service) -> Iterator[str]:
        for gpu in service.gpus():
            for holder in gpu.holders():
                self._programs(holder["command"])
                self._programs(holder["unit"], kind="unit")
                self._redaction.name("user", *words([holder["user"]]))
                yield _json({"gpu": gpu.address, **holder})

    def _history(self, service: Service) -> Iterator[str]:
        found = service.history(SWITCHES)
        for entry in found:
            self._asker(entry)
            yield _json(entry_record(entry))
        for entry in [each for each in found if each["result"] != "done" and each["count"]][:FAILURES]:
            whole = service.history_entry(entry["id"])
            self._asker(whole)
            yield _json(entry_record(whole), indent=1)

    def _asker(self, switch: Mapping[str, Any]) -> None:
        asker = switch.get("asker", {})  # its user's number is among those that the whole text is searched for
        self._redaction.name("machine", *words([asker.get("vm")]))
        self._programs(asker.get("command", ""))
        self._programs(asker.get("unit", ""), kind="unit")

    def _programs(self, *names: str, kind: str = "program") -> None:
        self._redaction.name(kind, *(name for name in words(names) if not STOCK.fullmatch(name)))

    # What this machine says -------------------------------------------------------------------------------------------

    def _know_hosts(self) -> None:
        known = self._redaction
        nodes = [os.uname().nodename, *_words_of("/etc/hostname"), *hosts_in(_lines_of("/etc/hosts"))]
        usual = ("localhost", "ip6-")
        for node in (node for node in nodes if not node.startswith(usual)):
            short, _dot, domain = node.partition(".")
            known.name("hostname", node, short)
            self._know_domains(domain)
        for each in _lines_of("/etc/resolv.conf"):
            if each.startswith(("search ", "domain ")):
                self._know_domains(*each.split()[1:])

    def _know_domains(self, *domains: str) -> None:
        # `lan` and `com` tell nothing of anybody, and `org` begins the name of the service.
        self._redaction.name("domain", *(each.strip(".") for each in domains if "." in each.strip(".")))

    def _know_users(self) -> None:
        self._redaction.name("user", *words(map(os.environ.get, ("USER", "LOGNAME", "SUDO_USER"))))
        self._know_people(pwd.getpwall())

    def _know_people(self, users: Iterable[pwd.struct_passwd]) -> None:
        for user in users:
            if user.pw_uid >= _FIRST_PERSON and user.pw_uid != _NOBODY:
                self._redaction.name("user", user.pw_name, user.pw_gecos.partition(",")[0])

    def _know_machines(self) -> None:
        for folder in _LIBVIRT:
            with suppress(OSError):
                self._redaction.name("machine", *(path.stem for path in Path(folder).glob("*.xml")))

    def _know_functions(self) -> None:
        self._functions |= set(sysfs.functions())

    def _know_named_in(self, text: str) -> None:
        """Whom no list of this machine has, though the text names them."""
        for kind, name in names_in(text):
            self._redaction.name(kind, name)
        for uid in (os.getuid(), *uids_in(text)):
            with suppress(KeyError, OverflowError):
                self._know_people([pwd.getpwuid(uid)])

    def _pages(self) -> Iterator[str]:
        for path in sorted(each for each in PAGES.iterdir() if each.suffix == ".json"):
            text = path.read_text(encoding="utf-8", errors="replace")
            with suppress(ValueError, RecursionError):
                page = json.loads(text)
                self._redaction.name("machine", *_named_with_uuid(page))
                text = _json(page)  # without escapes, in which no name is found
            yield f"{path.name}: {clean(text)}"

    def _log(self) -> list[str]:
        return self._told(service_lines(LOG_LINES))

    def _kernel(self) -> list[str]:
        return self._told(kernel_lines(self._functions, self._drivers)[-KERNEL_LINES:])

    def _told(self, lines: Sequence[Line]) -> list[str]:
        self._redaction.name("machine", *words(each.owner for each in lines))
        return [f"{moment(each.at)} {each.text}" for each in lines]


_HEAD = """\
Names of machines and people, addresses, serial numbers and the like are taken out, and the same `<word-1>` stands for
the same. Read it all the same before you give it to anybody.

"""


def _fenced(title: str, lines: Sequence[str]) -> str:
    body = "\n".join(lines or ["(nothing)"]).replace("```", "'''")
    return f"\n## {title}\n\n```text\n{body}\n```\n"


def _json(value: object, *, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _versions() -> Iterator[str]:
    uname = os.uname()
    yield f"gpuswitchctl {__version__}"
    yield f"Python {platform.python_version()}"
    for library in ("dbus-fast", "dbus-next", "jeepney", "transitions", "pydantic", "prometheus-client"):
        with suppress(PackageNotFoundError):
            yield f"{library} {version(library)}"
    yield f"kernel {uname.release} {uname.version} {uname.machine}"
    with suppress(OSError):
        yield f"system {platform.freedesktop_os_release().get('PRETTY_NAME', '')}"
    for command in (["systemctl", "--version"], ["virsh", "--version"], [f"qemu-system-{uname.machine}", "--version"]):
        yield f"{command[0]}: {_said(command).partition(chr(10))[0] or 'not found'}"


def _unit() -> Iterator[str]:
    said = _said(["systemctl", "show", "gpuswitchd.service", f"--property={','.join(_UNIT)}"])
    yield from said.splitlines()


def _parameters() -> Iterator[str]:
    yield from (each for each in _words_of("/proc/cmdline") if _PARAMETERS.match(each))


def _verdict() -> Iterator[str]:
    verdict = judged(DIRECTORY)
    yield from (f"fault: {each['text']}" for each in verdict.faults)
    yield from map(_setting, verdict.settings)
    yield from (f"warning: {each}" for each in verdict.warnings)


def _setting(setting: Mapping[str, Any]) -> str:
    return f"{setting['key']} = {setting['value']}  ({setting['origin']})"


def hosts_in(lines: Iterable[str]) -> Iterator[str]:
    """The names of machines in hosts(5). Those of loopback are everybody's, or blocked, but for Debian's 127.0.1.1."""
    for each in lines:
        where, *names = each.partition("#")[0].split() or [""]
        try:
            address = ip_address(where.partition("%")[0])
        except ValueError:
            continue
        if where == "127.0.1.1" or not (address.is_loopback or address.is_unspecified):
            yield from names


def _said(command: Sequence[str]) -> str:
    """What a program says on standard output; "" where it is not there, or takes too long."""
    with suppress(OSError, subprocess.TimeoutExpired):
        ended = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
        return ended.stdout.strip()
    return ""


def _named_with_uuid(value: object) -> Iterator[str]:
    """The names of virtual machines in a page of the journal: what has a name and a uuid."""
    if isinstance(value, dict):
        if value.get("uuid") and value.get("name"):
            yield str(value["name"])
        yield from (name for each in value.values() for name in _named_with_uuid(each))
    elif isinstance(value, list):
        yield from (name for each in value for name in _named_with_uuid(each))


def _lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words_of(path: str) -> list[str]:
    return " ".join(_lines_of(path)).split()
