"""Takes out of a text what tells who somebody is, or opens something: names, addresses, numbers of machines, tokens.

The same stands for the same, all through the text (`<user-1>`), so what belongs together can still be seen. Where it is
not sure, it takes out: a report with a hole is of more use than a secret that is public.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

_KEYS = (
    "access address adds alone announced at at_boot attributes back before before_restart blockers boot_framebuffers "
    "busy changed class command count deadline_seconds device device_id doubt drivers ends ends_programs error "
    "error_kind event exit_status failure finished for for_process forgone functions goes_by_itself gpus groups "
    "holders host_driver id in_the_way index iommu_groups joined kernel_wait kind machine maker managed match model "
    "module modules name needed nodes now options override owner persistent pid plan plans port power_control process "
    "process_state reason remedies remedy requester restarted restore_state result returned running seconds serial "
    "session shown_by_others since slot somebody_else stack started starts state state_label state_since status "
    "stays_out step_started steps stop_units stopped_units stops stuck subsystem switches target terminals text title "
    "trial trial_ends trial_seconds uid unfinished unit units until user_unit uuid vendor vendor_id version vm "
    "vtconsoles wait_seconds waiting_for waiting_until what worker"
)
"""Keys in what we print: who is called like one of them would make it unreadable."""
KEPT_WORDS = frozenset(
    [
        *_KEYS.split(),
        *("absent", "accelerator", "audio", "bridge", "console", "debian", "detaching", "display", "driver", "failed"),
        *("fedora", "gpu", "group", "host", "kernel", "linux", "localhost", "none", "nobody", "nvidia", "amdgpu"),
        *("reattaching", "recovering", "root", "service", "switch", "system", "ubuntu", "unknown", "user", "vfio"),
        *("vfio-pci", "wedged", "gpuswitch", "gpuswitchctl", "gpuswitchd", "nouveau", "i915", "arch", "opensuse"),
    ]
)
"""Words of ours, or everybody's: a machine or a user that is called so is not told from others by that."""
_HEX = "[0-9a-fA-F]"
_OPENS = (
    r"(?<![\w.-])(?>[\w.-]*?(?:token|passw(?:or)?d|passphrase|passcode|pwd|psk|secret|api[_-]?key|credential"
    r"|authorization)[\w.-]*)"
)
"""Looks at each letter once, however long a word is."""
_MAC = rf"(?:{_HEX}{{2}}:){{5,}}{_HEX}{{2}}"
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
    ("token", r"(?i:(?<=bearer )\S+|(?<=\bbasic )[A-Za-z0-9+/=]{8,})"),
    ("token", r"\b(?:gh[opsu]_|github_pat_|glpat-|xox[a-z]-|sk-|AKIA|eyJ)[\w.-]{12,}"),
    ("credentials", r"""(?<=://)[^/\s"'<>]+(?=@)"""),
    (
        "email",
        r"(?<![\w.+-])[\w.+-]+@[A-Za-z0-9-]+\.(?!service\b|slice\b|scope\b|socket\b|target\b|mount\b)[A-Za-z0-9.-]+",
    ),
    ("uuid", rf"\b{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}\b"),
    ("id", rf"(?<![\w-]){_HEX}{{32,}}(?![\w-])"),
)
_AFTER_ADDRESSES: tuple[tuple[str, str], ...] = (
    ("mac", rf"(?<![\w-]){_MAC}(?!\w|:\w)"),
    ("mac", rf"(?<![\w-])(?:{_HEX}{{2}}-){{5,}}{_HEX}{{2}}(?!\w|-\w)"),
    ("mac", rf"(?<![\w.])(?:{_HEX}{{4}}\.){{2}}{_HEX}{{4}}(?!\w|\.\w)"),
    # Twelve digits of ten may as well be a size; those that begin so are QEMU's.
    ("mac", rf"(?<![\w-])(?<!\d\.)(?=525400|\d*[a-fA-F]){_HEX}{{12}}(?![\w-])"),
    ("token", r"(?<![\w/.-])(?=[A-Za-z0-9+_=-]*[A-Za-z])(?=[A-Za-z0-9+_=-]*\d)[A-Za-z0-9+_=-]{36,}(?![\w/.-])"),
)
"""An IPv6 address may have pairs of digits in it that look like a MAC."""
_SET = rf"""(?:{_OPENS}(?:\\?["'])?\s*[:=]|(?=-){_OPENS})\s*"""
_AFTER_NAME = (
    # In quotes it has spaces; in JSON the quotes of a text have a backslash, and so has a quote within.
    ("token", re.compile(rf"""(?i)({_SET}\\")((?:(?!\\").)+)""")),
    ("token", re.compile(rf"""(?i)({_SET}")((?:\\.|[^"\\\n])+)""")),
    ("token", re.compile(rf"""(?i)({_SET}')([^'\n]+)""")),
    ("token", re.compile(rf"""(?i)({_OPENS}["']?\s*[:=]\s*)([^\s"',;|}}\]\\]+)""")),
    ("token", re.compile(rf"""(?i)((?=-){_OPENS}\s+)([^\s"',;|}}\]\\-][^\s"',;|}}\]\\]*)""")),
    ("serial", re.compile(r"(?i)(serial(?:[ _-]?(?:number|no))?\.?[\"']?\s*[:=#]\s*[\"']?)([\w-]+)")),
)
_FOLDERS = (
    ("user", re.compile(r"((?:/var)?/home[/]|(?:/run)?/media[/])([^/\s\"':,;)<]+)")),
    # Of a disk, whose name people give it: /media/USER/DISK.
    ("disk", re.compile(r"((?:/run)?/media[/][^/\s\"':,;)]+[/])([^/\s\"':,;)<]+)")),
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w.])[0-9a-fA-F:]*:[0-9a-fA-F:]+(?:\.\d{1,3}){0,3}(?:%\w+)?")
_STANDS_IN = re.compile(r"<[a-z]+-\d+>")
_WORD = re.compile(r"\w+")


class Redaction:
    """Knows what to take out, and what stands there instead."""

    def __init__(self) -> None:
        self._instead: dict[str, str] = {}
        self._names: dict[str, dict[str, int]] = {}
        """By its first word: each name, and how many characters it has before that word."""
        self._count: dict[str, int] = {}

    def name(self, kind: str, *names: str) -> None:
        """These are names of a `kind`, wherever they stand as a word: of users, of machines."""
        for name in names:
            first = _WORD.search(name)
            if len(name) > 1 and first and _folded(name) not in KEPT_WORDS and not name.isdigit():
                self._names.setdefault(_folded(first[0]), {})[name] = first.start()
                self._stand_in(kind, name)

    def clean(self, text: str) -> str:
        """The text without all that."""
        for kind, pattern in _PATTERNS:
            text = re.sub(pattern, self._one(kind), text)
        for kind, expression in _AFTER_NAME:
            text = expression.sub(self._second(kind), text)
        for kind, expression in _FOLDERS:
            text = expression.sub(self._second(kind), text)
        for expression in (_IPV4, _IPV6):
            text = expression.sub(self._address, text)
        for kind, pattern in _AFTER_ADDRESSES:
            text = re.sub(pattern, self._one(kind), text)
        return "".join(self._without_names(text))

    def _without_names(self, text: str) -> Iterator[str]:
        """Each word is looked up, so it is no matter how many names there are."""
        done = 0
        for word in _WORD.finditer(text):
            known = self._names.get(_folded(word[0]))
            if not known or word.start() < done:
                continue
            # The longest, where several begin so.
            for name in sorted(known, key=len, reverse=True):
                start = word.start() - known[name]
                end = start + len(name)
                if start >= done and _folded(text[start:end]) == _folded(name) and _is_word(text, start, end):
                    yield text[done:start]
                    yield self._instead[_folded(name)]
                    done = end
                    break
        yield text[done:]

    def _stand_in(self, kind: str, secret: str) -> str:
        known = self._instead.get(_folded(secret))
        if known is None:
            self._count[kind] = self._count.get(kind, 0) + 1
            known = self._instead[_folded(secret)] = f"<{kind}-{self._count[kind]}>"
        return known

    def _one(self, kind: str) -> Callable[[re.Match[str]], str]:
        return lambda found: self._stand_in(kind, found[0])

    def _second(self, kind: str) -> Callable[[re.Match[str]], str]:
        """Its second group is what goes; what stands there for something already, or is a word of ours, stays."""

        def replaced(found: re.Match[str]) -> str:
            secret: str = found[2]
            # A bad password may be a word of ours.
            stays = _STANDS_IN.match(secret) or (kind != "token" and _folded(secret) in KEPT_WORDS)
            return str(found[0]) if stays else f"{found[1]}{self._stand_in(kind, secret)}"

        return replaced

    def _address(self, found: re.Match[str]) -> str:
        whole = str(found[0])
        text = whole if whole.endswith("::") else whole.rstrip(":")
        if re.fullmatch(_MAC, text):  # with eight pairs it would be an address by its form
            return self._stand_in("mac", text) + whole[len(text) :]
        for address in map(_as_address, _parts(text)):
            if address is not None:
                kept = address.is_loopback or address.is_unspecified
                return whole if kept else self._stand_in("address", text) + whole[len(text) :]
        return whole


def _folded(text: str) -> str:
    """As it is compared: small and capital letters are the same, Turkish ones too, of which Unicode makes two signs."""
    return text.casefold().replace("\u0307", "").replace("\u0131", "i")


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether it is none within another."""
    return not any(_WORD.match(each) for each in (text[start - 1 : start], text[end : end + 1]) if each)


def _as_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _parts(text: str) -> Iterator[str]:
    """It, then what may be an address in it, where something else stands before or after, as a port does."""
    yield text
    groups = text.split(":")
    if len(groups) > 8:
        yield from (":".join(groups[first : first + 8]) for first in range(len(groups) - 7))
    elif "::" in text:
        yield from (":".join(groups[first:]) for first in range(1, len(groups) - 2))


def words(texts: Iterable[object]) -> list[str]:
    """Those that are not empty, as text."""
    return [str(text) for text in texts if text]
