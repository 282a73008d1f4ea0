"""Takes out of a text what tells who somebody is, or opens something: names, addresses, numbers of machines, tokens.

The same stands for the same, all through the text (`<user-1>`), so what belongs together can still be seen. Where it is
not sure, it takes out: a report with a hole is of more use than a secret that is public.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import ip_address

KEPT_WORDS = frozenset(
    [
        *("absent", "accelerator", "audio", "bridge", "console", "debian", "detaching", "display", "driver", "failed"),
        *("fedora", "gpu", "group", "host", "kernel", "linux", "localhost", "none", "nobody", "nvidia", "amdgpu"),
        *("reattaching", "recovering", "root", "service", "switch", "system", "ubuntu", "unknown", "user", "vfio"),
        *("vfio-pci", "wedged", "gpuswitch", "gpuswitchctl", "gpuswitchd", "nouveau", "i915", "arch", "opensuse"),
    ]
)
"""Words of ours, or everybody's: a machine or a user that is called so is not told from others by that."""
_HEX = "[0-9a-fA-F]"
_OPENS = r"[\w.-]*(?:token|passw(?:or)?d|passphrase|secret|api[_-]?key|credential|authorization)[\w.-]*"
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
    ("token", r"(?i:(?<=bearer )\S+|(?<=\bbasic )[A-Za-z0-9+/=]{8,})"),
    ("token", r"\b(?:gh[opsu]_|github_pat_|glpat-|xox[a-z]-|sk-|AKIA|eyJ)[\w.-]{12,}"),
    ("credentials", r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)"),
    ("email", r"[\w.+-]+@[A-Za-z0-9-]+\.(?!service\b|slice\b|scope\b|socket\b|target\b|mount\b)[A-Za-z0-9.-]+"),
    ("uuid", rf"\b{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}\b"),
    ("id", rf"(?<![\w-]){_HEX}{{32,}}(?![\w-])"),
    ("mac", rf"(?<![\w:-])(?:{_HEX}{{2}}[:-]){{5,}}{_HEX}{{2}}(?!\w|[:-]\w)"),
    ("token", r"(?<![\w/.-])(?=[A-Za-z0-9+_=-]*[A-Za-z])(?=[A-Za-z0-9+_=-]*\d)[A-Za-z0-9+_=-]{36,}(?![\w/.-])"),
)
_AFTER_NAME = (
    ("token", re.compile(rf"""(?i)({_OPENS}["']?\s*[:=]\s*["']?)([^\s"',;|}}\]]+)""")),
    ("serial", re.compile(r"(?i)(serial(?:[ _-]?(?:number|no))?\.?[\"']?\s*[:=#]\s*[\"']?)([\w-]+)")),
)
_HOME = re.compile(r"((?:/var)?/home[/])([^/\s\"':,;)<]+)")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-fA-F:]*:[0-9a-fA-F:]+(?:\.\d{1,3}){0,3}(?:%\w+)?")


class Redaction:
    """Knows what to take out, and what stands there instead."""

    def __init__(self) -> None:
        self._instead: dict[str, str] = {}
        self._names: set[str] = set()
        self._count: dict[str, int] = {}

    def name(self, kind: str, *names: str) -> None:
        """These are names of a `kind`, wherever they stand as a word: of users, of machines."""
        for name in names:
            if len(name) > 1 and name.casefold() not in KEPT_WORDS and not name.isdigit():
                self._names.add(name)
                self._stand_in(kind, name)

    def clean(self, text: str) -> str:
        """The text without all that."""
        for kind, pattern in _PATTERNS:
            text = re.sub(pattern, self._one(kind), text)
        for kind, expression in _AFTER_NAME:
            text = expression.sub(self._second(kind), text)
        text = _HOME.sub(self._second("user"), text)
        for expression in (_IPV4, _IPV6):
            text = expression.sub(self._address, text)
        if self._names:
            names = "|".join(map(re.escape, sorted(self._names, key=len, reverse=True)))
            text = re.sub(
                rf"(?<!\w)(?:{names})(?!\w)", lambda found: self._instead[found[0].casefold()], text, flags=re.I
            )
        return text

    def _stand_in(self, kind: str, secret: str) -> str:
        known = self._instead.get(secret.casefold())
        if known is None:
            self._count[kind] = self._count.get(kind, 0) + 1
            known = self._instead[secret.casefold()] = f"<{kind}-{self._count[kind]}>"
        return known

    def _one(self, kind: str) -> Callable[[re.Match[str]], str]:
        return lambda found: self._stand_in(kind, found[0])

    def _second(self, kind: str) -> Callable[[re.Match[str]], str]:
        """Its second group is what goes; what stands there for something already, or is a word of ours, stays."""

        def replaced(found: re.Match[str]) -> str:
            secret: str = found[2]
            stays = secret.startswith("<") or secret.casefold() in KEPT_WORDS
            return str(found[0]) if stays else f"{found[1]}{self._stand_in(kind, secret)}"

        return replaced

    def _address(self, found: re.Match[str]) -> str:
        whole = str(found[0])
        text = whole if whole.endswith("::") else whole.rstrip(":")
        try:
            address = ip_address(text.partition("%")[0])
        except ValueError:
            return whole
        if address.is_loopback or address.is_unspecified:
            return whole
        return self._stand_in("address", text) + whole[len(text) :]


def words(texts: Iterable[object]) -> list[str]:
    """Those that are not empty, as text."""
    return [str(text) for text in texts if text]
