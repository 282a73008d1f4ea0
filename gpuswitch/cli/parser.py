"""What gpuswitchctl understands: every verb with its options and its help. The work is done elsewhere.

Help, completion and the manual page are made of this tree. It imports argparse alone, so that help is there at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from gpuswitch import __version__
from gpuswitch.cli.translate import _, is_english, mark, ngettext

TYPE_CHECKING = False  # as typing has it, which takes longer to import than argparse
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO

BUS_VARIABLE = "GPUSWITCH_BUS"

EXIT_STATUSES = (
    (0, mark("done, or nothing to do")),
    (1, mark("failed, reverted or cancelled: the message says what became of the GPU")),
    (2, mark("wrong usage, no such GPU, an argument that makes no sense")),
    (3, mark("refused, or busy also after the wait: the message names what is in the way; all is as it was before")),
    (4, mark("you may not do this")),
    (5, mark("the service cannot be reached")),
    (6, mark("not finished within --timeout; the switch goes on")),
    (7, mark("wedged: the kernel has not returned from an operation on this GPU")),
    (8, mark("the output could not be written; a switch, once begun, goes on")),
    (130, mark("interrupted; a switch, once begun, goes on")),
    (141, mark("whoever read the output has gone; a switch, once begun, goes on")),
)
"""With several GPUs, the worst of theirs."""
EXIT_STATUS_OF_DOCTOR = mark("Of doctor: 0 all is well, 1 there are warnings, 2 there are problems.")
"""There, the numbers mean something else."""

_SHORTLY = (
    (0, mark("done, or there already")),
    (1, mark("failed, reverted, cancelled")),
    (2, mark("wrong usage, no such GPU")),
    (3, mark("refused or busy, and why")),
    (4, mark("you may not do this")),
    (5, mark("the service cannot be reached")),
    (6, mark("not finished in time")),
    (7, mark("wedged: the kernel does not return")),
    (8, mark("the output could not be written")),
    (130, mark("interrupted; the switch goes on")),
)
"""The same in few words, for the help; where whoever reads the output has gone, nobody reads this either."""

HELP_IS_TEXT = mark("cannot print help as JSON: it is text for people; leave --json out")

TARGETS = ("host", "vfio")
_UNIT_TYPES = frozenset(
    ("automount", "device", "mount", "path", "scope", "service", "slice", "socket", "swap", "target", "timer")
)
"""systemd.unit(5)."""
STATES = (
    *("host", "detaching", "vfio", "reattaching", "recovering"),
    *("failed", "wedged", "unknown", "absent"),
)
"""In which a GPU can be (docs/states.md)."""
RESULTS = ("done", "reverted", "failed", "cancelled", "wedged", "drifted")
POLICIES = ("refuse", "wait", "terminate", "kill")
RELEASES = ("shutdown", "destroyed", "crashed", "migrated", "saved", "failed")
"""Why a machine ends, in libvirt's words (docs/hooks.rst)."""
TOPICS = ("states", "exit-status", "configuration")
_LONGEST_WAIT = 86400
LONGEST = 4096
"""Letters of an argument: a path has no more (PATH_MAX in the kernel's include/uapi/linux/limits.h)."""
_UUID = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
"""Of examples."""


class UsageError(Exception):
    """The command line cannot be understood. `usage` is how it goes."""

    def __init__(self, text: str, usage: str) -> None:
        super().__init__(text)
        self.usage = usage


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Knows the width by itself: argparse asks shutil, which takes longer to import than all else that help needs."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 24) -> None:
        super().__init__(prog, indent_increment, max_help_position, width=terminal_columns(sys.stdout) - 2)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """An action of a command that may be left out, in brackets: argparse has them for what `nargs` says."""
        text = super()._format_args(action, default_metavar)
        return f"[{text}]" if action.nargs == argparse.PARSER and not action.required else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Each line of it broken between words, and not within an option of a command; the lines stay."""
        from textwrap import wrap  # noqa: PLC0415 -- for help alone

        lines = (
            wrap(line, width, subsequent_indent=_indent_of(line), break_on_hyphens=False) or [""]
            for line in text.splitlines()
        )
        return "\n".join(f"{indent}{each}" for wrapped in lines for each in wrapped)


def terminal_columns(stream: TextIO) -> int:
    """As shutil.get_terminal_size() has them: $COLUMNS first, and 80 where it is no terminal."""
    given = os.environ.get("COLUMNS", "")
    try:
        return (given.isdecimal() and int(given)) or os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _indent_of(line: str) -> str:
    """Of what a line is continued with: below its text, where that stands behind a number."""
    text = line.lstrip()
    number = text.partition(" ")[0]
    behind = text.removeprefix(number).lstrip() if number.isdecimal() else text
    return " " * (len(line) - len(behind))


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process, so that a fault can be told as JSON too."""

    def __init__(self, **how: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **how)
        self.as_json = False
        """Whether what it prints itself is read by a program."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and the version. Where that cannot be written, it is an OSError: argparse itself would pass over it."""
        (file or sys.stdout).write(message)
        (file or sys.stdout).flush()


class _ShowVersion(argparse.Action):
    """Prints the version, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_given: object) -> None:
        text = f"gpuswitchctl {__version__}"
        if getattr(parser, "as_json", False):
            import json  # noqa: PLC0415 -- for programs alone

            from gpuswitch.cli.output import JSON_VERSION  # noqa: PLC0415 -- as above

            text = json.dumps({"version": JSON_VERSION, "release": __version__}, indent=2)
        parser._print_message(f"{text}\n", sys.stdout)  # noqa: SLF001 -- ours
        parser.exit()


def _purpose(of: str) -> str:
    return of.format(gpu=_("a GPU"))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_Add = Callable[..., argparse.ArgumentParser]


def parser() -> _Parser:
    """Each verb sets `run`, where its function is (`module:function`), and `purpose`, what it does; {gpu} is in it."""
    if not is_english():
        # It looks for its own words where nobody has put any.
        vars(argparse).update(_=_, ngettext=ngettext)
    top = _Parser(
        prog="gpuswitchctl",
        description=_("Move GPUs between their host drivers and vfio-pci, and see where they are."),
        epilog="\n\n".join(_closing_words()),
    )
    top.add_argument(
        "--version",
        action=_ShowVersion,
        nargs=0,
        default=argparse.SUPPRESS,
        help=_("show program's version number and exit"),
    )
    _shared_options(top)
    shared = _Parser(add_help=False)
    _shared_options(shared)
    verbs = top.add_subparsers(metavar="COMMAND", required=True, dest="verb")

    def verb(name: str, run: str, purpose: str, *examples: str, **defaults: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=_purpose(purpose),
            description=_("{sentence}.", sentence=_capital(_purpose(purpose))),
            epilog="\n".join(_("example: {command}", command=example) for example in examples),
            parents=[shared],
        )
        added.set_defaults(run=f"gpuswitch.cli.{run}", purpose=purpose, **defaults)
        return added

    _looking(verb)
    _switching(verb)
    _lending(verb)
    _telling(verb)
    return top


def _closing_words() -> Iterator[str]:
    yield "\n".join([_("exit status:"), *exit_status_lines(terminal_columns(sys.stdout) - 2)])
    yield _("doctor: 0 all is well, 1 warnings, 2 problems")
    yield _("a GPU is named like 0000:01:00.0, 01:00.0, pci_0000_01_00_0, or by its name in the configuration")
    yield _("more: {topics}; {manual}", topics=_topics(), manual="man gpuswitchctl")


def exit_status_lines(columns: int) -> list[str]:
    """All exit statuses in few words, in two columns where these have room."""
    texts = [f"{status:>3}  {_(words)}" for status, words in _SHORTLY]
    half = (len(texts) + 1) // 2
    left = max(map(_cells, texts[:half]))
    if left + 2 + max(map(_cells, texts[half:])) > columns:
        return texts
    beside = [*texts[half:], *[""] * (2 * half - len(texts))]
    both = zip(texts[:half], beside, strict=True)
    return [f"{one}{' ' * (left - _cells(one))}  {other}".rstrip() for one, other in both]


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from gpuswitch.cli.output import cells  # noqa: PLC0415 -- in other languages alone

    return cells(text)


def _topics() -> str:
    return ", ".join(f"gpuswitchctl help {topic}" for topic in TOPICS)


def _looking(verb: _Add) -> None:
    listed = verb("list", "query:list_gpus", _("list the GPUs"), "gpuswitchctl list")
    listed.description = _(
        "List the GPUs. MANAGED says whether the configuration has a [[gpu]] table for it: virtual machines get those "
        "by themselves, and --all means them. The others can be switched all the same, by their address; plan says "
        "whether that can be done now."
    )
    shown = verb("status", "query:status", _("show the state of {gpu}"), "gpuswitchctl status 01:00.0")
    _gpus_argument(shown, _("of these only"))
    held = verb("holders", "query:holders", _("show who has {gpu} open"), "gpuswitchctl holders 01:00.0")
    _gpus_argument(held, _("of these only"))
    examined = verb(
        "doctor",
        "doctor:doctor",
        _("say what keeps this machine from giving {gpu} away, and what to do"),
        "gpuswitchctl doctor",
        "gpuswitchctl doctor 01:00.0 --short",
    )
    examined.description = _(
        "Look at the firmware, the kernel, the GPUs, libvirt and other tools, say of each thing whether it is well, "
        "and what to do about it on this distribution. Changes nothing; works without the service, and without root, "
        "which sees more. The exit status is 0 where all is well, 1 with warnings, 2 with problems, or where it was "
        "called wrongly."
    )
    _gpus_argument(examined, _("these only; default: those that the configuration names, else all"))
    examined.add_argument("--short", action="store_true", help=_("leave out what is well"))
    verb("groups", "groups:groups", _("show the IOMMU groups"), "gpuswitchctl groups")
    planned = verb(
        "plan",
        "switch:plan",
        _("show the steps of a switch of {gpu}"),
        "gpuswitchctl plan 01:00.0",
        "gpuswitchctl plan 01:00.0 vfio",
        "gpuswitchctl plan --all",
    )
    _gpu_argument(planned)
    planned.add_argument(
        "target",
        metavar="TARGET",
        type=str.lower,
        choices=TARGETS,
        nargs="?",
        help=_("host or vfio; default: to vfio from the host, else to the host"),
    )
    planned.add_argument("--all", action="store_true", help=_("all GPUs that the configuration has a table for"))
    _busy_arguments(planned)
    watched = verb("watch", "watch:watch", _("follow what happens, until ^C"), "gpuswitchctl watch --json")
    # What it could not do, where it ends by itself.
    watched.set_defaults(purpose=_("follow what happens"))
    _gpus_argument(watched, _("of these only"))
    noted = verb(
        "notify",
        "notify:notify",
        _("show a desktop notification when a switch ends or needs somebody, until ^C"),
        "systemctl --user enable --now gpuswitch-notify",
    )
    noted.set_defaults(purpose=_("show desktop notifications"))
    _gpus_argument(noted, _("about these only"))
    waited = verb(
        "wait",
        "watch:wait",
        _("wait until no switch of {gpu} is under way"),
        "gpuswitchctl wait 01:00.0",
        "gpuswitchctl wait 01:00.0 --for vfio --timeout 60",
    )
    _gpus_argument(waited, _("for these; the id of a switch means its GPU; default: all"))
    waited.add_argument(
        "--for",
        dest="state",
        metavar="STATE",
        type=str.lower,
        choices=STATES,
        help=_("until it is there: host, vfio, or another state of `gpuswitchctl help states`"),
    )
    waited.add_argument("--timeout", metavar="SECONDS", type=_seconds, help=_("give up then"))


def _switching(verb: _Add) -> None:
    for target in TARGETS[::-1]:
        moved = verb(
            f"to-{target}",
            "switch:move",
            _("move {gpu} to {target}", gpu="{gpu}", target=target),
            f"gpuswitchctl to-{target} 01:00.0 --wait 60",
            f"gpuswitchctl to-{target} --all",
            target=target,
        )
        _gpus_to_move(moved)
        _busy_arguments(moved)
        _watching_arguments(moved, dry_run=True)
        _yes_argument(moved)
    tried = verb("trial", "trial:trial", _("try {gpu} on vfio"), "gpuswitchctl trial 01:00.0 --seconds 60")
    tried.description = _(
        "Move a GPU to vfio, and home by itself after a while, whatever becomes of this terminal, the desktop or the "
        "service. On a terminal, h brings it home before, and k keeps it on vfio; so does to-vfio. One that is on vfio "
        "already goes home by itself from then on."
    )
    tried.set_defaults(target="vfio", timeout=None, no_wait=False)
    _gpu_argument(tried)
    _busy_arguments(tried)
    tried.add_argument(
        "--seconds",
        metavar="N",
        type=_trial_seconds,
        default=60.0,
        help=_("from when it is on vfio (default: 60; to 86400)"),
    )
    _yes_argument(tried)
    cancelled = verb("cancel", "switch:cancel", _("cancel the switch of {gpu}"), "gpuswitchctl cancel 01:00.0")
    _gpu_argument(cancelled)
    recovered = verb("recover", "switch:recover", _("recover {gpu}"), "gpuswitchctl recover 01:00.0", target="host")
    recovered.description = _(
        "Bring a GPU that is failed or unknown home, else to vfio-pci; then whatever the configuration allows.\n"
        "Nothing to do where it is in a known-good state."
    )
    _gpus_to_move(recovered)
    _watching_arguments(recovered)


def _lending(verb: _Add) -> None:
    ran = verb(
        "run",
        "run:run",
        _("run a command with {gpu}", gpu="{gpu}"),
        "gpuswitchctl run --gpu 01:00.0 -- qemu-system-x86_64 -device vfio-pci,host={}",
        "gpuswitchctl run --user -- qemu-system-x86_64 -m 16G -device vfio-pci,host={}",
    )
    ran.usage = "gpuswitchctl run [--gpu GPU] [...] -- COMMAND [ARGUMENT ...]"
    ran.description = _(
        "Move a GPU to vfio, run a command, and have the GPU brought home when the command, and whatever it has left "
        "that has the GPU open, has ended: however that ends, and whatever becomes of gpuswitchctl. What has {braces} "
        "in it stands once for each function of the GPU, with the option before it, {number} is the first of them, and "
        "{variable} has them all. The exit status is that of the command; 126 and 127 where it cannot be run.",
        braces="{}",
        number="{0}",
        variable="GPUSWITCH_ADDRESSES",
    )
    ran.add_argument(
        "--gpu",
        dest="gpus",
        metavar="GPU",
        action="append",
        default=[],
        help=_("may be given again; {if_left_out}", if_left_out=_only()),
    )
    ran.add_argument(
        "--user",
        action="store_true",
        help=_("you may open the nodes of vfio as long as the command runs, so that it need not be root"),
    )
    ran.add_argument("--name", metavar="WORD", default="", help=_("what it is called (default: as the command)"))
    _busy_arguments(ran)
    _yes_argument(ran)
    held = verb(
        "hold",
        "hold:hold",
        _("keep {gpu} on vfio", gpu="{gpu}"),
        "gpuswitchctl hold 01:00.0",
    )
    held.description = _(
        "Move a GPU to vfio, keep it there for as long as this runs, and have it brought home when this ends, however "
        "that happens, and whoever else has it open has let go. Nobody else gets it meanwhile. Ends by itself, with 1, "
        "when the GPU is lost: pulled, or moved by somebody else. The units {units} run it for what other units "
        "require.",
        units="gpuswitch-vfio@.service",
    )
    _gpu_argument(held)
    held.add_argument(
        "--unit",
        metavar="UNIT",
        default="",
        help=_("the unit that this is, {example}: its instance names the GPU", example="gpuswitch-vfio@GPU.service"),
    )
    _busy_arguments(held)
    _yes_argument(held)
    lent = verb(
        "acquire",
        "hooks:acquire",
        _("have managed GPUs on vfio for a virtual machine that is about to start"),
        f"gpuswitchctl acquire --name win11 --uuid {_UUID} 01:00.0 01:00.1",
    )
    lent.description = _(
        "For the hook of whatever runs virtual machines: before one starts. Returns when every managed GPU that has "
        "one of these functions is on vfio and belongs to the machine, all or none; other functions are left alone. "
        "Only root may."
    )
    adopted = verb(
        "adopt",
        "hooks:adopt",
        _("say that a virtual machine runs, and what it has"),
        f"gpuswitchctl adopt --name win11 --uuid {_UUID} 01:00.0 01:00.1",
    )
    released = verb(
        "release",
        "hooks:release",
        _("say that a virtual machine is gone"),
        f"gpuswitchctl release --name win11 --uuid {_UUID}",
    )
    for of in (lent, adopted, released):
        of.add_argument("--name", metavar="NAME", required=True, help=_("the virtual machine, as people know it"))
        of.add_argument("--uuid", metavar="UUID", required=True, help=_("what tells it from all others"))
    for of in (lent, adopted):
        of.add_argument("addresses", metavar="ADDRESS", nargs="+", help=_("the PCI functions that it gets"))
    released.add_argument(
        "--reason",
        choices=RELEASES,
        default="shutdown",
        help=_("how it ended (default: shutdown): what is saved or migrated may be told to stay, by the configuration"),
    )


def _telling(verb: _Add) -> None:
    told = verb(
        "history",
        "history:history",
        _("list finished switches"),
        "gpuswitchctl history 01:00.0 --limit 5",
        "gpuswitchctl history --since yesterday --result failed --result reverted",
        "gpuswitchctl history --since 2026-11-29T20:00 --until 1h",
    )
    told.add_argument("gpu", metavar="GPU", nargs="?", default="", help=_("of this one only"))
    told.add_argument(
        "--since",
        metavar="TIME",
        type=_point_in_time,
        help=_("begun then or later: '2h ago' or 2h, today, yesterday, '2026-11-29 20:00', 20:00, RFC 3339"),
    )
    told.add_argument("--until", metavar="TIME", type=_point_in_time, help=_("begun then or earlier"))
    told.add_argument(
        "--result",
        action="append",
        default=[],
        choices=RESULTS,
        help=_(
            "only what ended so; may be given again; what went wrong is mostly reverted, failed where that failed too; "
            "drifted: what somebody else has moved"
        ),
    )
    told.add_argument(
        "--limit", metavar="N", type=_count, help=_("the last N (default: 20, with a time or a result all; 0: all)")
    )
    shown = verb("show", "history:show", _("show the steps of a finished switch"), "gpuswitchctl show 5f0c3a1b")
    shown.add_argument(
        "id",
        metavar="ID",
        nargs="?",
        default="",
        help=_("as `history` lists it, or the beginning of it; default: the last"),
    )
    _configuration(verb)
    _setup(verb)
    reported = verb(
        "report",
        "report:report",
        _("write a file for a report of a fault"),
        "gpuswitchctl report --output ./report.md",
    )
    reported.description = _(
        "Write a file for a report of a fault: versions, the configuration and who set it, GPUs, IOMMU groups, "
        "history, the log of the service, and what the kernel said of the GPUs. Names of machines and people, "
        "addresses, serial numbers and the like are taken out; read it all the same before you give it to anybody. "
        "Works without the service. Root sees more than others."
    )
    reported.add_argument(
        "--output",
        metavar="FILE",
        default="",
        help=_("a new file; - for standard output (default: gpuswitch-report-DATE-TIME.md, here)"),
    )
    helped = verb("help", "topics:show_help", _("explain a command or a topic"), "gpuswitchctl help states")
    helped.add_argument(
        "topic",
        metavar="TOPIC",
        nargs="*",
        default=[],
        help=_("a command, or one of {topics}", topics=", ".join(TOPICS)),
    )
    verb("demo", "demo:demo", _("show switches on simulated machines"), "gpuswitchctl demo")


def _configuration(verb: _Add) -> None:
    shown = verb("config", "query:config", _("show, check or edit the configuration"), "gpuswitchctl config --changed")
    shown.description = _(
        "Show, check or edit the configuration. Every key that there is, and what it is for: {command}.",
        command="gpuswitchctl help configuration",
    )
    only_changed = _("show only what differs from the default")
    shown.add_argument("--changed", action="store_true", help=only_changed)
    actions = shown.add_subparsers(metavar="ACTION", required=False, dest="action")
    purpose = _("show the configuration in force")
    # What is done without an action.
    shown_too = actions.add_parser(
        "show",
        help=purpose,
        description=_("{sentence}.", sentence=_capital(purpose)),
        epilog=_("example: {command}", command="gpuswitchctl config show --changed"),
    )
    _shared_options(shown_too)
    # Left out here, it may stand before the action.
    shown_too.add_argument("--changed", action="store_true", default=argparse.SUPPRESS, help=only_changed)
    shown_too.set_defaults(purpose=purpose)
    for name, run, purpose, example, what in (
        (
            "check",
            "configuration:check",
            _("check a configuration, without the service"),
            "gpuswitchctl config check ./config.toml",
            _("a file, or a directory as a whole; default: the one that the service reads, mostly /etc/gpuswitch"),
        ),
        (
            "edit",
            "editing:edit",
            _("edit a file, which is replaced only by one that can be used"),
            "gpuswitchctl config edit",
            _("default: config.toml in the directory that the service reads, mostly /etc/gpuswitch"),
        ),
    ):
        action = actions.add_parser(
            name,
            help=purpose,
            description=_("{sentence}.", sentence=_capital(purpose)),
            epilog=_("example: {command}", command=example),
        )
        _shared_options(action)
        action.add_argument("path", metavar="PATH", nargs="?", help=what)
        action.set_defaults(run=f"gpuswitch.cli.{run}", purpose=purpose)


def _setup(verb: _Add) -> None:
    asked = verb(
        "setup",
        "setup:setup",
        _("set up GPUs for virtual machines"),
        "gpuswitchctl setup",
        "gpuswitchctl setup --gpu 01:00.0 --screens two --vm win10 --yes",
        "gpuswitchctl setup undo",
    )
    asked.description = _(
        "Say what is in the way, ask which GPU goes to virtual machines and where the desktop draws, show what would "
        "be written, write it, have the service read it, and offer a trial. It writes one file, "
        "/etc/gpuswitch/conf.d/50-setup.toml, anew each time; `setup undo` puts back every byte. It does not touch the "
        "definition of a virtual machine: it prints the commands. With --yes or --dry-run it asks nothing: what is not "
        "given is taken as it is likely, or named where nobody can tell."
    )
    asked.add_argument(
        "--gpu",
        dest="gpus",
        metavar="GPU",
        action="append",
        default=[],
        help=_("the one that goes to virtual machines; may be given again"),
    )
    asked.add_argument(
        "--screens",
        choices=("one", "two"),
        help=_("one: the desktop draws on this GPU, and ends meanwhile; two: it draws on another"),
    )
    asked.add_argument("--vm", metavar="NAME", default="", help=_("a virtual machine of libvirt that gets it"))
    asked.add_argument(
        "--at-boot",
        choices=("keep", "host", "vfio"),
        help=_("where it is when the machine has started (default: keep, as it is found)"),
    )
    asked.add_argument("--name", metavar="WORD", default="", help=_("what it is called (default: after its model)"))
    asked.add_argument("-y", "--yes", action="store_true", help=_("ask nothing, and write"))
    asked.add_argument("--dry-run", action="store_true", help=_("show what would be written, write nothing"))
    actions = asked.add_subparsers(metavar="ACTION", required=False, dest="action")
    purpose = _("put back every byte of what setup wrote")
    undone = _undo(actions, "setup:undo", purpose, "gpuswitchctl setup undo --dry-run")
    # Left out here, it may stand before the action.
    undone.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help=_("show what would be put back, change nothing"),
    )
    _force_argument(undone)
    _setup_proxmox(actions)
    _setup_prometheus(actions)
    _setup_boot(actions)


def _setup_proxmox(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purpose = _("have virtual machines of Proxmox VE ask for their GPUs")
    asked = actions.add_parser(
        "proxmox",
        help=purpose,
        description=_(
            "Put a hookscript on a storage that has snippets, and name it in the virtual machines of this node that "
            "get a managed GPU, or in those that are given. It shows what it would do, and asks. `setup undo` takes "
            "it back."
        ),
        epilog=_("example: {command}", command="gpuswitchctl setup proxmox 101 --dry-run"),
    )
    _shared_options(asked)
    asked.add_argument("vmids", metavar="VMID", nargs="*", help=_("a virtual machine, by its number"))
    asked.add_argument("--storage", metavar="NAME", default="", help=_("where the script is put (default: local)"))
    # Both may stand before the word, too.
    skip = argparse.SUPPRESS
    asked.add_argument("-y", "--yes", action="store_true", default=skip, help=_("ask nothing, and do it"))
    asked.add_argument(
        "--dry-run", action="store_true", default=skip, help=_("show what would be done, change nothing")
    )
    asked.set_defaults(run="gpuswitch.cli.proxmox:setup", purpose=purpose)


def _setup_prometheus(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purpose = _("have the Prometheus of this machine ask for the metrics, with the alerts")
    asked = actions.add_parser(
        "prometheus",
        help=purpose,
        description=_(
            "Put a job and the file of our alerts into {file}, and have Prometheus read it. It shows what it would "
            "write, asks, has promtool judge it, and leaves all other lines as they are. `setup undo` takes it back. "
            "Who sends the alerts on to people is Alertmanager, which is not touched.",
            file="/etc/prometheus/prometheus.yml",
        ),
        epilog=_("example: {command}", command="gpuswitchctl setup prometheus --dry-run"),
    )
    _shared_options(asked)
    # Both may stand before the word, too.
    skip = argparse.SUPPRESS
    asked.add_argument("-y", "--yes", action="store_true", default=skip, help=_("ask nothing, and write"))
    asked.add_argument(
        "--dry-run", action="store_true", default=skip, help=_("show what would be written, write nothing")
    )
    asked.set_defaults(run="gpuswitch.cli.prometheus:setup", purpose=purpose)


def _setup_boot(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purpose = _("have the initrd give {gpu} to vfio-pci, before any host driver")
    early = actions.add_parser(
        "boot",
        help=_purpose(purpose),
        description=_(
            "Have the initrd give a GPU to vfio-pci before udev starts, for one that a host driver must never touch; "
            "for all others, at_boot in gpuswitch.toml(5) does. Shows what would be written for initramfs-tools, "
            "dracut or mkinitcpio, writes it, and makes the initrd anew; where that fails, all is put back. Counts "
            "from the next start on, for all functions of the GPU at their addresses, as long as they are the same "
            "devices. What was written before is replaced. With gpuswitch.early=off on the kernel's command line "
            "nothing is bound."
        ),
        epilog="\n".join(
            _("example: {command}", command=example)
            for example in ("gpuswitchctl setup boot --gpu 01:00.0", "gpuswitchctl setup boot undo")
        ),
    )
    _shared_options(early)
    # What stands before the word counts as well, and is not to be overwritten by a default.
    early.add_argument(
        "--gpu",
        dest="gpus",
        metavar="GPU",
        action="append",
        default=argparse.SUPPRESS,
        help=_("the one that is given; may be given again"),
    )
    early.add_argument("-y", "--yes", action="store_true", default=argparse.SUPPRESS, help=_("ask nothing, and write"))
    early.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help=_("show what would be written, write nothing"),
    )
    early.set_defaults(run="gpuswitch.cli.setup_boot:boot", purpose=purpose)
    again = early.add_subparsers(metavar="ACTION", required=False, dest="boot_action")
    purpose = _("take back what setup boot has written, and make the initrd anew")
    _force_argument(_undo(again, "setup_boot:undo", purpose, "gpuswitchctl setup boot undo"))


def _undo(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], run: str, purpose: str, example: str
) -> argparse.ArgumentParser:
    undone = actions.add_parser(
        "undo",
        help=purpose,
        description=_("{sentence}.", sentence=_capital(purpose)),
        epilog=_("example: {command}", command=example),
    )
    _shared_options(undone)
    # It may stand before the word, too.
    undone.add_argument("-y", "--yes", action="store_true", default=argparse.SUPPRESS, help=_("it asks nothing anyway"))
    undone.set_defaults(run=f"gpuswitch.cli.{run}", purpose=purpose)
    return undone


def _force_argument(undo: argparse.ArgumentParser) -> None:
    undo.add_argument(
        "--force", action="store_true", help=_("also what somebody else has changed since; that text is kept")
    )


def _shared_options(of: argparse.ArgumentParser) -> None:
    """They may stand before the verb and after it; what is left out there says nothing (`parse`)."""
    of.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=_("print JSON"))
    of.add_argument(
        "--bus",
        metavar="ADDRESS",
        default=argparse.SUPPRESS,
        help=_(
            "the D-Bus address to find the service at (default: ${variable}, else the system bus)",
            variable=BUS_VARIABLE,
        ),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with a value for each option of all verbs.

    Raises:
        UsageError: it cannot be understood.
        OSError: it asks for help or the version, and standard output cannot be written.
        SystemExit: it asked for that, and has it.
    """
    top = parser()
    words, command = _without_command(sys.argv[1:] if arguments is None else arguments)
    typed = [*words, "--", *command] if command else words
    top.as_json = "--json" in words
    if any(len(word) > LONGEST for word in words):
        longest = max(words, key=len)
        raise UsageError(
            _("{word} has {count} letters: nothing here is called so", word=repr(longest), count=len(longest)),
            top.format_usage(),
        )
    if top.as_json and not {"-h", "--help"}.isdisjoint(words):
        raise UsageError(_(HELP_IS_TEXT), _named_by(top, words).format_usage())
    try:
        args, more = top.parse_known_args(words)
        if more:
            from gpuswitch.cli.usage import options_first  # noqa: PLC0415 -- for who types them so alone

            args, more = top.parse_known_args(options_first(top, words))
    except UsageError as error:
        raise _fault_in(top, typed) or error from None
    # What it takes all the same, and nobody means.
    doubtful = "--" in words[:1] or "" in words or any(each.startswith("-") and each.endswith("=") for each in words)
    if (more or doubtful or getattr(args, "action", None)) and (fault := _fault_in(top, typed)):
        raise fault
    if args.verb == "plan" and args.target is None and args.gpu.lower() in TARGETS:
        args.gpu, args.target = "", args.gpu.lower()
    if args.verb == "run":
        if not command:
            raise UsageError(_("run needs -- and a command after it"), commands_of(top)["run"].format_usage())
        args.command = command
    if more:
        raise UsageError(_("{verb} does not know {words}", verb=args.verb, words=" ".join(more)), top.format_usage())
    args.json = getattr(args, "json", False)
    args.bus = getattr(args, "bus", None) or os.environ.get(BUS_VARIABLE) or None
    return args


def _without_command(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The words, and apart from them the command of `run`, which argparse would read: it stands after the first --."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before = [word for at, word in enumerate(arguments[:end]) if not at or arguments[at - 1] != "--bus"]
    if next((word for word in before if not word.startswith("-")), "") != "run":
        return arguments, ()
    return arguments[:end], arguments[end + 1 :]


def _fault_in(top: argparse.ArgumentParser, words: Sequence[str]) -> UsageError | None:
    """What is wrong with these words, where that is known."""
    from gpuswitch.cli.usage import fault_in  # noqa: PLC0415 -- for who mistypes alone

    found = fault_in(top, words)
    return UsageError(*found) if found else None


def arguments_of(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    """Its arguments and options, in order; those that a verb has are in `choices` of the argument for it."""
    return parser._actions  # noqa: SLF001 -- argparse has no public name for them


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The commands below it, or the actions of a command, by their names."""
    for action in arguments_of(parser):
        if isinstance(action.choices, dict):
            return action.choices
    return {}


def _named_by(top: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """That of the command, or action of one, that these words begin with; the top where it is none."""
    named = top
    for at, word in enumerate(words):
        if word.startswith("-") or (at and words[at - 1] == "--bus"):
            continue
        if word not in commands_of(named):
            break
        named = commands_of(named)[word]
    return named


def _only() -> str:
    """Which one is meant where none is named, as the service has it (`GetGpu`)."""
    return _("if left out: the only GPU of this host, else the only one that the configuration has")


def _gpu_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gpu", metavar="GPU", nargs="?", default="", help=_only())


def _gpus_argument(verb: argparse.ArgumentParser, which: str) -> None:
    verb.add_argument("gpus", metavar="GPU", nargs="*", default=[], help=which)


def _gpus_to_move(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gpus", metavar="GPU", nargs="*", default=[], help=_only())
    verb.add_argument("--all", action="store_true", help=_("all GPUs that the configuration has a table for, at once"))


def _watching_arguments(verb: argparse.ArgumentParser, *, dry_run: bool = False) -> None:
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--timeout", metavar="SECONDS", type=_seconds, help=_("stop watching then; the switch goes on"))
    how.add_argument("--no-wait", action="store_true", help=_("print the id of the switch, do not follow it"))
    if dry_run:
        how.add_argument("--dry-run", action="store_true", help=_("print the steps, take none"))


def _yes_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-y", "--yes", action="store_true", help=_("do not ask before a desktop or a session is ended"))


def _busy_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--busy",
        choices=POLICIES,
        help=_("what becomes of programs that have it open (default: as the configuration says)"),
    )
    verb.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_whole_seconds,
        help=_("wait this long for them; by itself, the same as --busy=wait"),
    )
    verb.add_argument(
        "--stop-unit",
        metavar="UNIT",
        action="append",
        type=_unit,
        default=[],
        help=_("stop this unit first; may be given again"),
    )


def _unit(text: str) -> str:
    """The full name of a systemd unit; one without a type is a service, as systemctl has it (unit_name_mangle in
    systemd's basic/unit-name.c).
    """
    _name, dot, kind = text.rpartition(".")
    name = text if dot and kind in _UNIT_TYPES else f"{text}.service"
    if not text or not all(c.isascii() and (c.isalnum() or c in ":_.\\@-") for c in name):
        raise argparse.ArgumentTypeError(
            _("{text} is not the name of a unit, such as display-manager or docker.socket", text=repr(text))
        )
    return name


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 32):
        raise argparse.ArgumentTypeError(_("{text} is not a number of switches", text=repr(text)))
    return int(text)


def _point_in_time(text: str) -> float:
    from gpuswitch.cli.times import point_in_time  # noqa: PLC0415 -- datetime takes a while, and few name a time

    try:
        return point_in_time(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            _(
                "{text} is not a time; write it like '2h ago', yesterday, 20:00, '2026-11-29 20:00', "
                "2026-11-29T20:00:00Z",
                text=repr(text),
            )
        ) from None


def _instead(text: str) -> str:
    """What a span of time is typed as, the end of a sentence; "" where it is none."""
    from gpuswitch.cli.times import as_seconds  # noqa: PLC0415 -- for who mistypes alone

    seconds = as_seconds(text)
    return _("; write {text}", text=seconds) if seconds else ""


def _whole_seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _LONGEST_WAIT):
        raise argparse.ArgumentTypeError(
            _("{text} is not a whole number of seconds from 1 to {most}", text=repr(text), most=_LONGEST_WAIT)
            + _instead(text)
        )
    return int(text)


def _trial_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= _LONGEST_WAIT:
        raise argparse.ArgumentTypeError(
            _("{text} is not a number of seconds from 1 to {most}", text=repr(text), most=_LONGEST_WAIT)
            + _instead(text)
        )
    return seconds


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # Neither infinite nor no number at all.
    if not 0 < seconds < float("inf"):
        text = _("{text} is not a number of seconds above 0", text=repr(text)) + _instead(text)
        raise argparse.ArgumentTypeError(text)
    return seconds
