"""Output: everything that is printed goes through here, so nothing from the bus reaches a terminal raw.

How columns fit is `layout.py`'s; what moves on a terminal is `terminal.py`'s.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from gpuswitch.cli.parser import terminal_columns
from gpuswitch.cli.translate import _, recognized, step_title

JSON_VERSION = 1
"""Of the forms in docs/json.md: another one where a program that reads this one could go wrong."""


_UNBROKEN = re.compile(
    r"`[^`]*`"
    r"|\{ \w+ = [^{}]*\}"
    r"|\b(?:gpuswitchctl(?!:| of | \()|systemctl|kill|loginctl|usermod|echo|virsh|modprobe|mdevctl|rm)\b"
    r"(?:(?!: )[^;,；，。])*"  # noqa: RUF001 -- as Chinese has them
    r"|\b[\d.]+ m?s\b"
)
"""What stands here is not broken, whatever the width: commands and tables of TOML, which are to be copied, and
durations.
"""
_TABLE = re.compile(r"(.*?) ?(`\[\[[^`]*`(?:, `[^`]*`)+)")
"""How a reason ends that tells what to add to the configuration (switch/planning/remedies.py)."""
_BLOCK = "      "
"""Before each line of it."""
_KEPT = "\0"
LIST = "  "
"""Before each line of a list below a sentence."""
SINCE = "and since then: "
"""Before what became of the last attempt since a GPU is failed (gpuswitch/gpu/strategies.py)."""


class OutputError(Exception):
    """Standard output cannot be written."""


class ReaderGoneError(Exception):
    """Whoever read standard output has gone, and that was seen before anything was written."""


def output_descriptor() -> int | None:
    """That of standard output; None where no file is behind it."""
    try:
        return sys.stdout.fileno()
    except (OSError, ValueError):
        return None


def clean(text: object) -> str:
    """The text on one line, with all that could move a cursor, set a colour or turn the writing direction escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(letter: str) -> str:
    """A byte that is no text comes from the command line as half a pair (PEP 383)."""
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def on_terminal(stream: TextIO) -> bool:
    """Whether lines on it can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "") not in {"", "dumb"}


def in_foreground(stream: TextIO) -> bool:
    """Whether nobody else works on the terminal that it is: who is in the background (`&`, `bg`) may write there, and
    neither move the cursor nor erase what others wrote. Where it is not the one of this session, nobody controls jobs
    by it.
    """
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return True


def can_write(text: str) -> bool:
    """Whether standard output has these characters; others are escaped there."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def in_colour(stream: TextIO) -> bool:
    """Whether it may have colours (no-color.org)."""
    return on_terminal(stream) and not os.environ.get("NO_COLOR")


def width(stream: TextIO) -> int:
    """Columns of the terminal that it is; 0: it is none, and nothing needs to fit."""
    return terminal_columns(stream) if on_terminal(stream) else 0


def cells(text: str) -> int:
    """Columns that a text takes on a terminal: two for each of the wide characters of the Far East (UAX #11)."""
    if text.isascii():
        return len(text)
    from unicodedata import east_asian_width  # noqa: PLC0415 -- few texts need it

    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, columns: int, *, indent: str = "") -> list[str]:
    """The text in lines of so many columns (0: one line): broken between words, and not within a command or a
    duration. `indent` stands before each but the first.
    """
    if not columns or cells(text) <= columns:
        return [text]
    kept = _UNBROKEN.sub(
        lambda found: found[0].rstrip().replace(" ", _KEPT) + found[0][len(found[0].rstrip()) :], text.lstrip(" ")
    )
    first, *words = kept.split(" ")
    lines = [text[: len(text) - len(text.lstrip(" "))] + first]
    for word in words:
        if cells(lines[-1]) + 1 + cells(word) <= columns:
            lines[-1] += f" {word}"
        else:
            lines.append(f"{indent}{word}")
    return [each.replace(_KEPT, " ") for each in lines]


def write(text: str) -> None:
    """Print this, now: whoever reads a pipe wants to see a switch while it runs.

    Raises:
        BrokenPipeError: nobody reads it.
        OutputError: it cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno == errno.EIO and stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode):
            # A terminal that has hung up (tty_write in the kernel's drivers/tty/tty_io.c): nobody reads it.
            raise BrokenPipeError from error
        raise OutputError(error.strerror) from error


def line(text: str) -> None:
    """Print one line; on a terminal that is narrower, as many as that takes."""
    write("\n".join(wrapped(clean(text), width(sys.stdout), indent="  ")))


def problem(text: str) -> None:
    """Say on standard error what went wrong; further lines of `text` are further reasons. A table of TOML that is to be
    added stands below its reason, as a block to be pasted.
    """
    first, *more = map(clean, text.splitlines())
    _say(each for reason in (f"gpuswitchctl: {first}", *(f"  {each}" for each in more)) for each in _unfolded(reason))


def _unfolded(reason: str) -> list[str]:
    if (found := _TABLE.fullmatch(reason)) is None:
        return [reason]
    return [found[1], *(f"{_BLOCK}{each}" for each in found[2].strip("`").split("`, `"))]


def place(where: str, text: str) -> None:
    """Say on standard error what is wrong there: `FILE:LINE`."""
    _say([f"{clean(where)}: {clean(text)}"])


def warning(text: str) -> None:
    """Say on standard error what somebody should look after, though nothing went wrong now."""
    _say([f"gpuswitchctl: {_('warning: {text}', text=clean(text))}"])


def _say(texts: Iterable[str]) -> None:
    columns = width(sys.stderr)
    try:
        for text in texts:
            lines = [text] if text.startswith(_BLOCK) else wrapped(text, columns, indent="    ")
            print(*lines, sep="\n", file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        # It cannot be said, and the exit status still tells: Python is not to try once more at its exit, and change it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def wrong_usage(usage: str, text: str) -> None:
    """Say on standard error what cannot be understood, with how it goes."""
    _say([*usage.splitlines(), f"gpuswitchctl: {clean(text)}"])


def lines_of(text: str) -> list[str]:
    """What the service says in a sentence a line, in the language of whoever reads it: what comes after the first one,
    and after the first one of a later attempt, stands below it, indented.
    """
    return [
        f"{LIST if number and not each.startswith(SINCE) else ''}{recognized(each)}"
        for number, each in enumerate(text.splitlines() or [""])
    ]


def sentence(purpose: str, text: str, *, is_whole: bool = False, lead: str = "") -> str:
    """`cannot PURPOSE: TEXT`, or `LEAD TEXT`; several reasons stand below each other. Text that says what it cannot
    stays as it is, and so does what `is_whole`.
    """
    text = recognized(text)
    if is_whole or text.startswith(("cannot ", _("cannot "))):
        return text
    if lead:
        return f"{lead}\n{text}" if "\n" in text else f"{lead} {text}"
    if "\n" in text:
        return _("cannot {purpose}:\n{text}", purpose=purpose, text=text)
    return _("cannot {purpose}: {text}", purpose=purpose, text=text)


def as_json(value: Mapping[str, Any], *, among_lines: bool = False) -> None:
    """Print a document: docs/json.md has the form of each. `among_lines`: events stand before it, a line each."""
    write(_json({"version": JSON_VERSION, **value}, indent=None if among_lines else 2))


def as_json_line(value: Mapping[str, Any]) -> None:
    """Print one event, with the time. Errors are events, too."""
    write(_json({"version": JSON_VERSION, "event": value["event"], "at": rfc3339(time.time()), **value}))


def _json(value: object, *, indent: int | None = None) -> str:
    import json  # noqa: PLC0415 -- for few, and it takes as long as the rest

    return json.dumps(value, indent=indent)


def rfc3339(seconds: float) -> str | None:
    """Seconds since the epoch for programs: `2026-11-29T19:49:09.522901Z`; None for 0, which is never."""
    if not seconds:
        return None
    whole, micro = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{micro:06}Z"


def moment(seconds: float) -> str:
    """Seconds since the epoch as local time, to the second, with its distance from UTC."""
    there = time.localtime(seconds)
    offset = time.strftime("%z", there)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', there)}{offset[:3]}:{offset[3:]}"


def clock(seconds: float) -> str:
    """Seconds since the epoch as the time of the day."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """Seconds as people say them: `12 ms`, `1.24 s`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.00995 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def numbered(index: int, count: int, title: str) -> str:
    """`[ 3/12] unbind 0000:01:00.1 from snd_hda_intel`."""
    return f"[{index:>{len(str(count))}}/{count}] {clean(step_title(title))}"
