"""What journald has of the kernel and of the service, as far as whoever asks may read it.

The kernel names the device in most of what drivers print of it (`_KERNEL_DEVICE=+pci:0000:01:00.0`,
systemd.journal-fields(7)); the rest has the address, or the name of the driver, in its text.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Collection, Iterable, Iterator, Sequence

from gpuswitch.cli.output import clean
from gpuswitch.cli.translate import _

TYPE_CHECKING = False  # as typing has it, which takes longer to import than argparse
if TYPE_CHECKING:
    from typing import Any

SECONDS = 20.0
"""How long journalctl may take: it reads files, and a slow disk is no reason to wait for ever."""
MOST = 20000
"""Lines of the kernel that are looked through, the last ones."""
_FIELDS = "MESSAGE,PRIORITY,_KERNEL_DEVICE,_SOURCE_REALTIME_TIMESTAMP,OWNER,__REALTIME_TIMESTAMP"
_ADDRESS = re.compile(r"\b[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]\b")
_REFUSED = ("not seeing messages", "insufficient permissions", "Permission denied")
"""How journalctl says that it was not let to read (src/journal/journalctl-misc.c, acquire_journal)."""

Line = namedtuple("Line", "at text owner")
"""`at`: seconds since the epoch. `owner`: the virtual machine that the line is about, or ""."""


class UnreadableError(Exception):
    """The journal cannot be read: why, in a sentence."""


def kernel_lines(
    functions: Collection[str], drivers: Iterable[str], *, since: float | None = None, until: float | None = None
) -> list[Line]:
    """What the kernel said of these functions or drivers; `since` and `until` in seconds since the epoch. Without
    `since`: since the machine was started.

    Raises:
        UnreadableError: nobody can tell.
    """
    within = [f"--since=@{since:.6f}"] if since is not None else ["--boot"]
    within += [f"--until=@{until:.6f}"] if until is not None else []
    entries = _entries([*within, f"--lines={MOST}", "_TRANSPORT=kernel"])
    own, named = set(functions), _named(drivers)
    return [_line(entry) for entry in entries if _about(entry, own, named)]


def service_lines(most: int) -> list[Line]:
    """The last lines of the service since the machine was started. Raises as `kernel_lines`."""
    return [_line(entry) for entry in _entries(["--boot", f"--lines={most}", "--unit=gpuswitchd.service"])]


def _named(drivers: Iterable[str]) -> re.Pattern[str] | None:
    # The kernel writes both in names, whichever a file has.
    words = "|".join("[-_]".join(map(re.escape, re.split("[-_]", name))) for name in drivers if name)
    return re.compile(rf"\b({words})\b", re.IGNORECASE) if words else None


def _about(entry: dict[str, Any], own: set[str], named: re.Pattern[str] | None) -> bool:
    text, device = entry["MESSAGE"], entry.get("_KERNEL_DEVICE", "")
    devices = {*_ADDRESS.findall(text), str(device).removeprefix("+pci:")} - {""}
    return bool(devices & own or (named is not None and not devices and named.search(text)))


def _line(entry: dict[str, Any]) -> Line:
    at = entry.get("_SOURCE_REALTIME_TIMESTAMP") or entry.get("__REALTIME_TIMESTAMP") or 0
    return Line(int(at) / 1e6, "\n".join(map(clean, entry["MESSAGE"].split("\n"))), str(entry.get("OWNER") or ""))


def _entries(query: Sequence[str]) -> Iterator[dict[str, Any]]:
    import json  # noqa: PLC0415 -- for few, and it takes as long as the rest

    for line in _output(query).split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        # What is no text comes as numbers.
        if isinstance(entry, dict) and isinstance(entry.get("MESSAGE"), str):
            yield entry


def _output(query: Sequence[str]) -> str:
    import os  # noqa: PLC0415 -- as above
    import subprocess  # noqa: PLC0415 -- as above

    how = ["journalctl", "--output=json", f"--output-fields={_FIELDS}", "--no-pager", "--all", *query]
    try:
        ended = subprocess.run(
            how,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnreadableError(_("journalctl took longer than {seconds} s", seconds=f"{SECONDS:g}")) from None
    except OSError as error:
        raise UnreadableError(_("cannot start journalctl: {why}", why=error.strerror)) from None
    said = ended.stderr.decode(errors="replace")
    if any(word in said for word in _REFUSED):
        raise UnreadableError(_("only root and the groups adm and systemd-journal may read the journal"))
    if ended.returncode:
        raise UnreadableError(_("journalctl says: {text}", text=clean(said.strip().rpartition("\n")[2])))
    return ended.stdout.decode(errors="replace")
