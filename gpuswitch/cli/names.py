"""Whose names stand in a text, by what the kernel, systemd and the service itself write around them.

What a machine tells of its users and virtual machines is never all: a directory in the network is not listed, a machine
has been deleted since. Names are found too often rather than too seldom: whoever uses them takes a word out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

STOCK = re.compile(
    r"gpuswitch.*|python3.*|systemd.*|\(?sd-.*|(rpc-|prio-)*(libvirt|virtqemu).*|qemu.*|busctl|nvidia-(persist|power).*"
    r"|Xorg|Xwayland|gnome-shell|kwin.*|plasmashell|sddm.*|gdm.*|lightdm.*|display-manager.*|pipewire.*|wireplumber.*"
    r"|pulseaudio|user@\d+\.service|session-\w+\.scope|machine-qemu.*|init\.scope|kernel|kworker.*|swapper.*|irq/.*"
    r"|(ba|da|z)?sh|modprobe|insmod|rmmod|nvidia-(smi|modeset|settings).*|nv_queue|nv_open_q|khungtaskd|kthreadd|vfio.*"
)
"""Programs and units that everybody has: their names tell nothing of anybody."""
_USER = r"""([^\s,;:()\[\]"'<>]+)"""
_COMM = r"""([^\s\[\]"'<>,(][^\[\]"<>,\n]{0,30}?)"""
"""A process's name has spaces where it likes."""
_QUOTE = r"""\\?["']"""
_ENDS = r"""(?=: |, |;|"|$| is | was | has | had )"""
"""How a sentence goes on after the name of a machine, which may have spaces too."""
_WHERE: tuple[tuple[str, str], ...] = (
    # gpuswitch/switch/holder_policy.py, _whose and remedy.
    ("user", rf"\bsession \S+ of {_USER}"),
    ("user", rf"\.(?:service|scope|slice|socket|timer|mount|target) of {_USER}"),
    ("user", rf"\(pids? [\d, ]+, user {_USER}\)"),
    ("user", rf"--machine={_QUOTE}?{_USER}(?:{_QUOTE})?@"),
    ("user", rf"{_QUOTE}user{_QUOTE}: {_QUOTE}{_USER}{_QUOTE}"),
    ("user", rf"\buser \d+ \({_USER}\)"),
    # systemd-logind and pam_unix(8): "New session 2 of user kim.", "session opened for user kim(uid=1000)".
    ("user", rf"\b[Uu]ser {_USER}(?=\(uid=)"),
    ("user", rf"\b(?:of|for) [Uu]ser {_USER}"),
    # gpuswitch/model/owner.py, gpuswitch/switch/shared/clearing_up.py.
    ("machine", rf"\bthe virtual machine ([^\s\"].{{0,80}}?){_ENDS}"),
    ("machine", r"\bclear up after (?:the virtual machine )?([^\s\"].{0,80}?)(?=: |\"|$)"),
    ("machine", rf"\bvirsh (?:shutdown|destroy|start|reboot|undefine) (?:{_QUOTE}([^\"'\n]+){_QUOTE}|{_USER})"),
    # libvirt, virSystemdMakeScopeName; qemu's command line.
    ("machine", r"\bmachine-qemu(?:\\+x2d|-)\d+(?:\\+x2d|-)([^\s\"]{1,255}?)\.scope"),
    ("machine", r"\bguest=([^,\s\"]+)"),
    ("program", r"\bprocess ([^\s\"].{0,80}?) \(pid \d+\)"),
    # gpuswitch/switch/record.py, Requester, and holder_policy.py, _who.
    ("program", r"(?<![\w./:+-])([\w./:+-]+) \(pids? \d+"),
    # NVIDIA: "Xid (PCI:0000:01:00): 31, pid=4242, name=game, Ch 00000008".
    ("program", rf"\bpid='?\d+'?, name={_COMM}(?=,|\"|$)"),
    # amdgpu_vm.c and amdgpu_job.c: "Process game pid 1 thread game:cs0 pid 2".
    ("program", rf"(?i)\bprocess (?!information){_COMM} pid:? ?\d+"),
    ("program", rf"(?i)\bthread {_COMM} pid:? ?\d+"),
    # i915_gpu_error.c and xe_guc_submit.c: "in game [4321]".
    ("program", rf"\bin {_COMM} \[\d+\]"),
    # nouveau: "channel 2 [007f9c1000 game[4321]]"; what faults: "game[4321]: segfault at".
    ("program", rf"\[[0-9a-f]+ {_COMM}\[\d+\]\]"),
    ("program", r"""(?<![^\s"])([^\s\[\]"'<>:]{1,30})\[\d{2,7}\](?=: |\]| general protection| segfault| trap)"""),
    # Call traces, tasks that hang, the out-of-memory killer, audit.
    ("program", rf"\bComm: {_COMM}(?= Not tainted| Tainted| Kdump|\"|$)"),
    ("program", rf"(?i)\bcomm[= ]+{_QUOTE}([^\"'\\\n]+)"),
    ("program", rf"\bexe={_QUOTE}(?:[^\"'\\\n]*/)?([^\"'\\/\n]+)"),
    ("program", rf"(?i)\btask {_COMM}:\d+ blocked"),
    ("program", rf"(?i)\btask {_COMM} \(\d+\)"),
    ("program", r"(?i)\bkilled process \d+ \(([^()\n]{1,30})\)"),
)
_PATTERNS = tuple((kind, re.compile(pattern, re.MULTILINE)) for kind, pattern in _WHERE)
_NOBODY = frozenset(
    [
        *("a", "an", "and", "at", "by", "for", "from", "has", "he", "in", "is", "it", "its", "name", "of", "on", "or"),
        *("she", "that", "the", "this", "to", "was", "which", "with"),
    ]
)
_UIDS = re.compile(r"""\b(?:uid\\?["']?[ =:]+|user[ @-])(\d{4,10})\b""")


def names_in(text: str) -> Iterator[tuple[str, str]]:
    """Each name that stands in it, with what it is of: a `user`, a `machine`, a `program`; one may come again."""
    for kind, pattern in _PATTERNS:
        for found in pattern.finditer(text):
            name = next(filter(None, found.groups()), "").strip().rstrip(".\\")
            if name.casefold() in _NOBODY or (kind == "program" and STOCK.fullmatch(name)):
                continue
            yield from ((kind, each) for each in {name, *_also(kind, name)} if each)


def uids_in(text: str) -> set[int]:
    """The user numbers that it names."""
    return {int(each) for each in _UIDS.findall(text)}


def _also(kind: str, name: str) -> Iterator[str]:
    """As the same is written elsewhere."""
    if kind == "user":  # of a domain: EXAMPLE\\kim, kim@example.org
        yield name.rpartition("\\")[2].partition("@")[0]
    elif kind == "machine" and "x2d" in name:  # as systemd escapes it
        yield re.sub(r"\\+x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), name)
    elif kind == "program":
        yield name.removesuffix(".exe")
        yield name.partition(":")[0]
