"""What gpuswitchctl understands: every verb with its options and its help. The work is done elsewhere.

Help, completion and the manual page are made of this tree. It imports argparse alone, so that help is there at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

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
    (3, mark("refused: the message names what is in the way; nothing was changed, or all was taken back")),
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

EXIT_STATUS = mark(
    """\
exit status:
  0  done, or there already        5    the service cannot be reached
  1  failed, reverted, cancelled   6    not finished in time
  2  wrong usage, no such GPU      7    wedged: the kernel does not return
  3  refused, with the reasons     8    the output could not be written
  4  you may not do this           130  interrupted; the switch goes on

doctor: 0 all is well, 1 warnings, 2 problems

a GPU is named like 0000:01:00.0, 01:00.0, pci_0000_01_00_0, or by its name in the configuration
"""
)

TARGETS = ("host", "vfio")
RESULTS = ("done", "reverted", "failed", "cancelled", "wedged", "drifted")
POLICIES = ("refuse", "wait", "terminate", "kill")
TOPICS = ("states", "exit-status", "configuration")
_LONGEST_WAIT = 86400


class UsageError(Exception):
    """The command line cannot be understood. `usage` is how it goes."""

    def __init__(self, text: str, usage: str) -> None:
        super().__init__(text)
        self.usage = usage


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Knows the width by itself: argparse asks shutil, which takes longer to import than all else that help needs."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 24) -> None:
        super().__init__(prog, indent_increment, max_help_position, width=terminal_columns(sys.stdout) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Each line of it broken between words; the lines stay."""
        import textwrap  # noqa: PLC0415 -- for help alone

        lines = (textwrap.wrap(line, width, subsequent_indent=_indent_of(line)) or [""] for line in text.splitlines())
        return "\n".join(f"{indent}{each}" for wrapped in lines for each in wrapped)


def terminal_columns(stream: TextIO) -> int:
    """As shutil.get_terminal_size() has them: $COLUMNS first, and 80 where it is no terminal."""
    given = os.environ.get("COLUMNS", "")
    try:
        return (given.isdecimal() and int(given)) or os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process, so that a fault can be told as JSON too."""

    def __init__(self, **how: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """A command that is none is told with the one that was meant, and not with all that there are."""
        if action.dest == "verb" and value not in (action.choices or ()):
            text = _("there is no command {word}", word=repr(value)) + _meant(value, action.choices or ())
            raise argparse.ArgumentError(None, text)
        super()._check_value(action, value)


def _meant(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 -- for who mistypes alone

    if close := get_close_matches(word.casefold().replace("_", "-"), known, 1):
        return _("; did you mean {word}?", word=close[0])
    return _("; {command} lists what there is", command="gpuswitchctl help")


def _purpose(of: str) -> str:
    return of.format(gpu=_("a GPU"))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_Add = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """Each verb sets `run`, where its function is (`module:function`), and `purpose`, what it does; {gpu} is in it."""
    if not is_english():
        # It looks for its own words where nobody has put any.
        vars(argparse).update(_=_, ngettext=ngettext)
    top = _Parser(
        prog="gpuswitchctl",
        description=_("Move GPUs between their host drivers and vfio-pci, and see where they are."),
        epilog=_(EXIT_STATUS) + "\n" + _("more: {topics}; {manual}", topics=_topics(), manual="man gpuswitchctl"),
    )
    top.add_argument(
        "--version",
        action="version",
        version=f"gpuswitchctl {__version__}",
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
    _telling(verb)
    return top


def _topics() -> str:
    return ", ".join(f"gpuswitchctl help {topic}" for topic in TOPICS)


def _looking(verb: _Add) -> None:
    verb("list", "query:list_gpus", _("list the GPUs"), "gpuswitchctl list")
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
    planned = verb("plan", "switch:plan", _("show the steps of a switch of {gpu}"), "gpuswitchctl plan 01:00.0 vfio")
    _gpu_argument(planned)
    planned.add_argument("target", metavar="TARGET", type=str.lower, choices=TARGETS, help=_("host or vfio"))
    _busy_arguments(planned)
    watched = verb("watch", "watch:watch", _("follow what happens, until ^C"), "gpuswitchctl watch --json")
    _gpus_argument(watched, _("of these only"))
    noted = verb(
        "notify",
        "notify:notify",
        _("show a desktop notification when a switch ends or needs somebody, until ^C"),
        "systemctl --user enable --now gpuswitch-notify",
    )
    _gpus_argument(noted, _("about these only"))
    waited = verb(
        "wait",
        "watch:wait",
        _("wait until no switch of {gpu} is under way"),
        "gpuswitchctl wait 01:00.0",
        "gpuswitchctl wait 01:00.0 --for vfio --timeout 60",
    )
    _gpus_argument(waited, _("for these; default: all"))
    waited.add_argument(
        "--for", dest="state", metavar="STATE", type=str.lower, choices=TARGETS, help=_("until it is there")
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


def _telling(verb: _Add) -> None:
    told = verb(
        "history",
        "history:history",
        _("list finished switches"),
        "gpuswitchctl history 01:00.0 --limit 5",
        "gpuswitchctl history --since yesterday --result failed",
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
    told.add_argument("--result", choices=RESULTS, help=_("only what ended so; drifted: what somebody else has moved"))
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
        nargs="?",
        default="",
        help=_("a command, or one of {topics}", topics=", ".join(TOPICS)),
    )
    verb("demo", "demo:demo", _("show switches on simulated machines"), "gpuswitchctl demo")


def _configuration(verb: _Add) -> None:
    shown = verb("config", "query:config", _("show, check or edit the configuration"), "gpuswitchctl config --changed")
    shown.add_argument("--changed", action="store_true", help=_("show only what differs from the default"))
    actions = shown.add_subparsers(metavar="ACTION", required=False, dest="action")
    for name, run, purpose, example, what in (
        (
            "check",
            "configuration:check",
            _("check a configuration, without the service"),
            "gpuswitchctl config check ./config.toml",
            _("a file, or a directory as a whole; default: /etc/gpuswitch"),
        ),
        (
            "edit",
            "editing:edit",
            _("edit a file, which is replaced only by one that can be used"),
            "gpuswitchctl config edit",
            _("default: /etc/gpuswitch/config.toml"),
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
    undone = actions.add_parser(
        "undo",
        help=purpose,
        description=_("{sentence}.", sentence=_capital(purpose)),
        epilog=_("example: {command}", command="gpuswitchctl setup undo"),
    )
    _shared_options(undone)
    undone.add_argument(
        "--force", action="store_true", help=_("also what somebody else has changed since; that text is kept")
    )
    undone.set_defaults(run="gpuswitch.cli.setup:undo", purpose=purpose)
    _setup_boot(actions)


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
    undone = again.add_parser(
        "undo",
        help=purpose,
        description=_("{sentence}.", sentence=_capital(purpose)),
        epilog=_("example: {command}", command="gpuswitchctl setup boot undo"),
    )
    _shared_options(undone)
    undone.add_argument(
        "--force", action="store_true", help=_("also what somebody else has changed since; that text is kept")
    )
    undone.set_defaults(run="gpuswitch.cli.setup_boot:undo", purpose=purpose)


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
    """
    top = parser()
    args, more = top.parse_known_args(arguments)
    if more:
        verb = _verbs(top)[args.verb]
        options = [option for action in arguments_of(verb) for option in action.option_strings]
        meant = _meant(more[0], options) if more[0].startswith("-") else ""
        text = _("{verb} does not know {words}", verb=args.verb, words=" ".join(more))
        raise UsageError(f"{text}{meant}", verb.format_usage())
    args.json = getattr(args, "json", False)
    args.bus = getattr(args, "bus", None) or os.environ.get(BUS_VARIABLE) or None
    return args


def _verbs(top: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    found: Mapping[str, argparse.ArgumentParser] = next(
        vars(action)["choices"] for action in arguments_of(top) if action.dest == "verb"
    )
    return found


def arguments_of(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    """Its arguments and options, in order; those that a verb has are in `choices` of the argument for it."""
    return parser._actions  # noqa: SLF001 -- argparse has no public name for them


def _gpu_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gpu", metavar="GPU", nargs="?", default="", help=_("may be left out where there is only one"))


def _gpus_argument(verb: argparse.ArgumentParser, which: str) -> None:
    verb.add_argument("gpus", metavar="GPU", nargs="*", default=[], help=which)


def _gpus_to_move(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gpus", metavar="GPU", nargs="*", default=[], help=_("may be left out where there is only one"))
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
        "--stop-unit", metavar="UNIT", action="append", default=[], help=_("stop this unit first; may be given again")
    )


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


def _whole_seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _LONGEST_WAIT):
        raise argparse.ArgumentTypeError(
            _("{text} is not a whole number of seconds from 1 to {most}", text=repr(text), most=_LONGEST_WAIT)
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
        )
    return seconds


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # Neither infinite nor no number at all.
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(_("{text} is not a number of seconds above 0", text=repr(text)))
    return seconds
