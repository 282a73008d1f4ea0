"""Write docs/man/: the manual pages, from what the programs understand. `python docs/generate_man.py [FOLDER]`.

Verbs and options are those of the parsers, keys those of gpuswitch/config/reference.py, members of the bus those of
docs/dbus/. Only what stands nowhere else stands here.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from roff import bold, example, heading, italic, item, paragraph, section, see_also, subsection, verbatim

from gpuswitch import __version__, errors, service
from gpuswitch.cli import parser as ctl
from gpuswitch.cli.topics import STATES
from gpuswitch.cli.translate import speak
from gpuswitch.config.reference import Key, TableReference, reference
from gpuswitch.config.schema import ENVIRONMENT

DOCS = Path(__file__).parent
DATE = "2026-11-29"
"""Of the version. man(7) wants one, and it is to change with no build."""
SOURCE = f"gpuswitch {__version__}"

_BUS = (ctl.BUS_VARIABLE, "The D-Bus address to find the service at, where `--bus` does not say.")
_CONFIG_FILES = (
    ("/etc/gpuswitch/config.toml", "The configuration: see gpuswitch.toml(5). None is needed."),
    ("/etc/gpuswitch/conf.d/*.toml", "Read after it, by name; a key in a later file wins."),
)


def pages() -> dict[str, str]:
    """The text of each file, by its name."""
    return {
        "gpuswitchctl.1": _gpuswitchctl(),
        "gpuswitchd.8": _gpuswitchd(),
        "gpuswitch.toml.5": _configuration(),
        "org.gpuswitch1.5": _bus(),
    }


# gpuswitchctl(1) ----------------------------------------------------------------------------------------------------


def _gpuswitchctl() -> str:
    top = ctl.parser()
    shared = {each.dest for each in ctl.arguments_of(top)}
    verbs = next(each.choices for each in ctl.arguments_of(top) if each.dest == "verb")
    assert isinstance(verbs, dict)  # noqa: S101 -- a program for whoever changes the parser
    return "".join(
        (
            heading("gpuswitchctl", 1, DATE, SOURCE, "User Commands"),
            section("NAME", r"gpuswitchctl \- move GPUs between their host drivers and vfio\-pci", "\n"),
            section("SYNOPSIS", f"{bold('gpuswitchctl')} [{italic('OPTION')}...] {italic('COMMAND')} [...]\n"),
            section("DESCRIPTION", paragraph(_CTL_DESCRIPTION)),
            section("COMMANDS", *(text for name, verb in verbs.items() for text in _verb(name, verb, shared))),
            section("OPTIONS", paragraph("Before a command or after it:"), *_options(ctl.arguments_of(top))),
            section("STATES", *(item(bold(state), f"{text}.") for state, text in STATES)),
            section("JSON", paragraph(_JSON)),
            section("EXIT STATUS", *_exit_statuses(ctl.EXIT_STATUSES), paragraph(_EXIT_STATUS_BESIDES)),
            section("ENVIRONMENT", *(item(bold(name), text) for name, text in (_BUS, *_CTL_ENVIRONMENT))),
            section("FILES", *(item(italic(path), text) for path, text in _CONFIG_FILES)),
            see_also([("gpuswitchd", 8), ("gpuswitch.toml", 5), ("org.gpuswitch1", 5), ("virsh", 1)]),
        )
    )


_CTL_DESCRIPTION = """\
gpuswitchctl asks gpuswitchd(8), over D-Bus, to move a GPU with all its functions to vfio-pci, so that a virtual machine
can have it, and back to the drivers that it had. Anyone may look; members of the group `gpuswitch` may switch, others
after an administrator's password.

A GPU is named by its address (0000:01:00.0, 01:00.0, `pci_0000_01_00_0`, or that of any of its functions), or by
its name in the configuration, in any case. Where there is only one, it need not be named.

A request that is refused changes nothing, and says all that is in the way, and what to do about it. A step that
fails is taken back, with all before it.
"""
_JSON = """\
With `--json`, everything that is printed is JSON: one object, or for what goes on (switches, `watch`, `wait`) one
object a line. Each has `version`, which is 1. A refusal is an object, too, with `error` and `blockers`. docs/json.md in
the sources has every form, with a schema for each command.
"""
_EXIT_STATUS_BESIDES = f"With several GPUs, the worst. {ctl.EXIT_STATUS_OF_DOCTOR}"
_CTL_ENVIRONMENT = (
    ("NO_COLOR", "Where it is set, nothing has colours."),
    ("TERM", "On a terminal called dumb, nothing is redrawn in place."),
    ("COLUMNS", "How wide the terminal is, where it is not asked itself."),
)


def _verb(name: str, verb: argparse.ArgumentParser, shared: Collection[str]) -> Iterator[str]:
    """Its part of the page, and those of the verbs below it."""
    arguments = [each for each in ctl.arguments_of(verb) if each.dest not in shared]
    own = [each for each in arguments if not isinstance(each.choices, dict)]
    synopsis = " ".join([bold(f"gpuswitchctl {name}"), *map(_in_synopsis, own)])
    shown = [line.removeprefix("example: ") for line in (verb.epilog or "").splitlines()]
    yield subsection(
        bold(name),
        f"{synopsis}\n",
        paragraph(verb.description or ""),
        *_options(own),
        *([example(*shown)] if shown else []),
    )
    for argument in arguments:
        if isinstance(argument.choices, dict):
            for below, parser in argument.choices.items():
                yield from _verb(f"{name} {below}", parser, shared)


def _in_synopsis(argument: argparse.Action) -> str:
    if argument.option_strings:
        return f"[{_option_words(argument, argument.option_strings[-1:])}]"
    name = italic(_value_name(argument))
    return {None: name, "?": f"[{name}]", "*": f"[{name}...]", "+": f"{name}..."}[argument.nargs]  # type: ignore[index]  # nargs may be a number, ours never is


def _options(arguments: Iterable[argparse.Action]) -> Iterator[str]:
    for argument in arguments:
        if argument.option_strings:
            yield item(_option_words(argument, argument.option_strings), _sentence(argument))
        elif not isinstance(argument.choices, dict):
            yield item(italic(_value_name(argument)), _sentence(argument))


def _option_words(option: argparse.Action, names: Sequence[str]) -> str:
    value = _choices(option) or " ".join(map(italic, _value_names(option)))
    if option.nargs == "?":
        value = f"[{value}]"
    value = "" if option.nargs == 0 else f" {value}"
    return ", ".join(f"{bold(name)}{value}" for name in names)


def _value_name(argument: argparse.Action) -> str:
    return " ".join(_value_names(argument))


def _value_names(argument: argparse.Action) -> tuple[str, ...]:
    name = argument.metavar or argument.dest.upper()
    return name if isinstance(name, tuple) else (name,)


def _choices(argument: argparse.Action) -> str:
    """In place of the value, where they are not named as a whole."""
    return "|".join(map(bold, argument.choices)) if argument.choices and not argument.metavar else ""


def _sentence(argument: argparse.Action) -> str:
    text = (argument.help or "") % {**vars(argument), "prog": ""}
    if argument.choices and argument.metavar and not all(choice in text for choice in argument.choices):
        text += f": one of {', '.join(f'`{choice}`' for choice in argument.choices)}"
    return f"{text[:1].upper()}{text[1:]}."


def _exit_statuses(statuses: Iterable[tuple[int, str]]) -> list[str]:
    return [item(bold(str(status)), f"{text[:1].upper()}{text[1:]}.") for status, text in statuses]


# gpuswitchd(8) ------------------------------------------------------------------------------------------------------


def _gpuswitchd() -> str:
    options = ctl.arguments_of(service.parser())
    return "".join(
        (
            heading("gpuswitchd", 8, DATE, SOURCE, "System Manager's Manual"),
            section(
                "NAME", r"gpuswitchd \- the service that moves GPUs between their host drivers and vfio\-pci", "\n"
            ),
            section("SYNOPSIS", " ".join([bold("gpuswitchd"), *map(_in_synopsis, options)]), "\n"),
            section("DESCRIPTION", paragraph(_D_DESCRIPTION)),
            section("OPTIONS", *_options(options)),
            section("SIGNALS", *(item(bold(name), text) for name, text in _SIGNALS)),
            section("EXIT STATUS", *_exit_statuses(service.EXIT_STATUSES)),
            section("ENVIRONMENT", *(item(bold(name), text) for name, text in _D_ENVIRONMENT)),
            section("FILES", *(item(italic(path), text) for path, text in (*_CONFIG_FILES, *_D_FILES))),
            section(
                "EXAMPLES",
                paragraph("The service on a machine in memory, on a bus of its own, and a look at it:"),
                example(
                    "dbus-daemon --session --fork --address=unix:path=/tmp/bus",
                    "gpuswitchd --simulate laptop --bus unix:path=/tmp/bus &",
                    "gpuswitchctl --bus unix:path=/tmp/bus list",
                ),
            ),
            see_also([("gpuswitchctl", 1), ("gpuswitch.toml", 5), ("org.gpuswitch1", 5), ("systemctl", 1)]),
        )
    )


_D_DESCRIPTION = """\
gpuswitchd does what gpuswitchctl(1), libvirt's hook and other clients ask of it over D-Bus: it plans a switch from what
the kernel shows, takes its steps one by one, each with a deadline and verified, and takes them back where one fails.
systemd starts it (gpuswitchd.service), and so does the bus for whoever asks first.

It may be stopped at any time: what is under way is taken back first, and a GPU that a virtual machine has stays where
it is. After a crash, the next start brings home what was left half-way, before it is ready.
"""
_SIGNALS = (
    ("SIGHUP", "Read the configuration again; one with a fault is refused whole, and the old one stays."),
    ("SIGTERM, SIGINT", "Take back what is under way, and end."),
)
_D_ENVIRONMENT = (
    (f"{ENVIRONMENT}*", "Settings: see gpuswitch.toml(5)."),
    ("DBUS_SYSTEM_BUS_ADDRESS", "The address of the system bus, where `--bus` does not say."),
    ("RUNTIME_DIRECTORY, STATE_DIRECTORY", "As systemd sets them; `--runtime` and `--state` go before."),
    ("NOTIFY_SOCKET, WATCHDOG_USEC", "Where systemd is told that it is ready, and well: see sd_notify(3)."),
)
_D_FILES = (
    ("/run/gpuswitch/", "What is under way and what the way home will restore. It lives as long as the kernel."),
    ("/var/lib/gpuswitch/history.db", "Finished switches."),
)


# gpuswitch.toml(5) --------------------------------------------------------------------------------------------------


def _configuration() -> str:
    return "".join(
        (
            heading("gpuswitch.toml", 5, DATE, SOURCE, "File Formats Manual"),
            section("NAME", r"gpuswitch.toml \- configuration of gpuswitchd", "\n"),
            section("SYNOPSIS", "\n.br\n".join(italic(path) for path, _ in _CONFIG_FILES), "\n"),
            section("DESCRIPTION", paragraph(_TOML_DESCRIPTION)),
            *map(_table, reference()),
            section("ENVIRONMENT", paragraph(_TOML_ENVIRONMENT)),
            section("EXAMPLES", example(*_TOML_EXAMPLE.splitlines())),
            section("FILES", *(item(italic(path), text) for path, text in _CONFIG_FILES)),
            see_also([("gpuswitchctl", 1), ("gpuswitchd", 8)]),
        )
    )


_TOML_DESCRIPTION = """\
No configuration is needed: without it, nothing is managed, and every GPU can be looked at and switched by hand.

The files are TOML. config.toml is read first, then those in conf.d, by name; a key in a later file wins. `[[gpu]]`
tables with the same address, in different files, are one table. One mistake anywhere refuses the whole, and a service
that runs keeps what it had.

`gpuswitchctl config check` tells what is wrong before the service reads it, with file and line, and
`gpuswitchctl config edit` checks before it replaces a file. `gpuswitchctl config` shows what is in force, and
which file set it; `systemctl reload gpuswitchd` has the service read it again.
"""
_TOML_ENVIRONMENT = f"""\
Variables of the service's environment go before all files: `{ENVIRONMENT}DEADLINES__UNBIND=40` sets `unbind` in
`[deadlines]`. Lists and whole tables are JSON there.
"""
_TOML_EXAMPLE = """\
[[gpu]]
address = "0000:01:00.0"
name = "rtx3070"

[defaults]
busy = "wait"
wait_seconds = 60
"""


def _table(table: TableReference) -> str:
    return section(f"THE TABLE {table.heading}", paragraph(table.sentence), *map(_key, table.keys))


def _key(key: Key) -> str:
    form = ", ".join(filter(None, (key.type, f"{key.values} {key.unit}".strip())))
    default = f"default: `{key.default}`" if key.default else "required"
    return item(f"{bold(key.name)} ({form}; {default})".replace("`", ""), key.sentence)


# org.gpuswitch1(5) --------------------------------------------------------------------------------------------------

_ACTIONS = {
    "inspect": "Anyone may.",
    "switch": "Members of the group gpuswitch may, others after an administrator's password.",
    "recover": "As for a switch.",
    "vm": "Only root may: libvirt's hook does.",
    "manage": "Administrators may.",
}


def _bus() -> str:
    interfaces = [
        interface
        for file in ("org.gpuswitch1.Manager.xml", "org.gpuswitch1.Gpu.xml")
        for interface in ET.parse(DOCS / "dbus" / file).iter("interface")  # noqa: S314 -- our own file
    ]
    return "".join(
        (
            heading("org.gpuswitch1", 5, DATE, SOURCE, "File Formats Manual"),
            section("NAME", r"org.gpuswitch1 \- the D\-Bus interface of gpuswitchd", "\n"),
            section("DESCRIPTION", paragraph(_BUS_DESCRIPTION)),
            *(_interface(each) for each in interfaces),
            section("ERRORS", paragraph("Each is `org.gpuswitch1.Error.` and this name:"), *_errors()),
            section(
                "EXAMPLES",
                example(
                    "busctl call org.gpuswitch1 /org/gpuswitch1 org.gpuswitch1.Manager GetGpu s 01:00.0",
                    "busctl introspect org.gpuswitch1 /org/gpuswitch1/gpu/0000_01_00_0",
                ),
            ),
            see_also([("busctl", 1), ("gpuswitchctl", 1), ("gpuswitchd", 8), ("polkit", 8)]),
        )
    )


_BUS_DESCRIPTION = """\
The service has the name `org.gpuswitch1` on the system bus, and is started there by who asks first. The object
`/org/gpuswitch1` has the interface `org.gpuswitch1.Manager`, and is an `org.freedesktop.DBus.ObjectManager`; each GPU
is an object below it, such as `/org/gpuswitch1/gpu/0000_01_00_0`.

All times are seconds, points in time since the epoch, as `d`; all other numbers in an `a{sv}` are `x`. docs/dbus.md in
the sources has the keys of each `a{sv}`.

Anyone may look; who may do more is up to polkit(8). A call that needs it may take as long as a person who is asked.
"""


def _interface(interface: ET.Element) -> str:
    parts = [paragraph(_told(interface))]
    for kind, title in (("property", "Properties"), ("method", "Methods"), ("signal", "Signals")):
        members = list(interface.iter(kind))
        if members:
            parts.append(subsection(title, *(_member(each) for each in members)))
    return section(interface.attrib["name"], *parts)


def _member(member: ET.Element) -> str:
    name = bold(member.attrib["name"])
    if member.tag == "property":
        return item(f"{name} {italic(member.attrib['type'])}", _told(member))
    given = [_argument(each) for each in member.iter("arg") if each.get("direction") != "out"]
    got = [_argument(each) for each in member.iter("arg") if each.get("direction") == "out"]
    signature = f"{name}({', '.join(given)})" + (rf" \(-> {', '.join(got)}" if got else "")
    action = _annotation(member, "org.gpuswitch1.Action")
    return item(signature, "\n\n".join(filter(None, (_told(member), _ACTIONS[action] if action else ""))))


def _argument(argument: ET.Element) -> str:
    return f"{verbatim(argument.attrib['type'])} {italic(argument.attrib['name'])}"


def _told(of: ET.Element) -> str:
    return _annotation(of, "org.gtk.GDBus.DocString")


def _annotation(of: ET.Element, name: str) -> str:
    return next((each.attrib["value"] for each in of.findall("annotation") if each.attrib["name"] == name), "")


def _errors() -> Iterator[str]:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.GpuswitchError) and kind().dbus_name == _own_name(kind):
            yield item(bold(kind.name), inspect.cleandoc(str(kind.__doc__)).partition("\n\n")[0])


def _own_name(kind: type[errors.GpuswitchError]) -> str:
    """Those that are another one on the bus, or what all of them are, are not told twice."""
    return errors.PREFIX + kind.__name__


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "man"
    folder.mkdir(exist_ok=True)
    speak("en")
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
