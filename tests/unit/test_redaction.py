"""What a report takes out, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from gpuswitch.cli.redaction import KEPT_WORDS, Redaction
from gpuswitch.switch.journal.journal import Entry
from tests.harness.json_schemas import SCHEMAS

HOME = "/home"


def known() -> Redaction:
    redaction = Redaction()
    redaction.name("hostname", "tower.example.org", "tower")
    redaction.name("user", "kim", "Kim Example")
    redaction.name("machine", "win11", "my secret (work)")
    redaction.name("program", "payroll")
    return redaction


@pytest.mark.parametrize(
    "secret",
    [
        *("tower.example.org", "tower", "TOWER", "kim", "Kim Example", "win11", "my secret (work)", "payroll"),
        *("192.168.7.23", "8.8.8.8", "fe80::1ff:fe23:4567:890a", "2001:db8:7::42", "fe80::1%eth0"),
        *("52:54:00:12:34:56", "52-54-00-12-34-56", "80:00:02:08:fe:80:00:00", "525400aabbcc", "525400123456"),
        *("5254.00aa.bbcc", "80:00:02:08:fe:80:00:00:00:00:00:00:00:02:c9:03:00:00:00:01"),
        *("2001:db8:7:1:2:3:4:42", "2001:db8:aa:bb:cc:dd:ee:ff"),
        *("f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "0123456789abcdef0123456789abcdef"),
        *("kim.example@mail.example.org", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "glpat-abcdefghijkl1234567"),
        *("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc-def", "Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MGFiY2RlZmdoaWo"),
    ],
)
@pytest.mark.parametrize(
    "around", ["%s", "the one of %s, and more", '"%s"', "x=%s", "/srv/%s/file", "(%s)", "%s: text", "word:%s"]
)
def test_what_tells_who_somebody_is(secret: str, around: str) -> None:
    if around.startswith("/srv/") and len(secret) > 36 and "." not in secret:
        return  # what is as long as this in a path may as well be the name of a file
    assert secret not in known().clean(around % secret)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("token = abc", "token = <token-1>"),
        ('{"api_key": "abc"}', '{"api_key": "<token-1>"}'),
        ("remote_write_password: hunter2", "remote_write_password: <token-1>"),
        ("Authorization: Bearer abcdef", "Authorization: <token-2> <token-1>"),
        ("http://user:word@there/x", "http://<credentials-1>@there/x"),
        ("https://abcdef@there/x", "https://<credentials-1>@there/x"),
        ("psk=abc pwd=def, ", "psk=<token-1> pwd=<token-2>, "),
        ("--password abc --user-password=def --verbose", "--password <token-2> --user-password=<token-1> --verbose"),
        ('password = "two words" x', 'password = "<token-1>" x'),
        ("password='two words' x", "password='<token-1>' x"),
        ('"password": "with \\" quote" x', '"password": "<token-1>" x'),
        ('"log: password=\\"two words\\" x"', '"log: password=\\"<token-1>\\" x"'),
        ('"--password abc"', '"--password <token-1>"'),
        ("password=<abc", "password=<token-1>"),
        ("password=system", "password=<token-1>"),
        (
            "/media/lee/KIMS DISK, /run/media/lee/disk/x",
            "/media/<user-1>/<disk-1> DISK, /run/media/<user-1>/<disk-2>/x",
        ),
        ("dad:2001:db8:0:0:0:0:7:1", "<address-1>"),
        ("2001:db8:0:0:0:0:7:1:8080", "<address-1>"),
        ("Serial Number: 0324A17", "Serial Number: <serial-1>"),
        (f"{HOME}/lee/notes, /var{HOME}/lee", f"{HOME}/<user-1>/notes, /var{HOME}/<user-1>"),
        ("a -----BEGIN RSA PRIVATE KEY-----\nx\n-----END RSA PRIVATE KEY----- b", "a <key-1> b"),
    ],
)
def test_what_opens_something(text: str, cleaned: str) -> None:
    assert Redaction().clean(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        *("0000:01:00.0", "10000:e1:00.0", "[10de:2484]", "+pci:0000:01:00.0", "5f0c3a1b", "580.105.08"),
        *("2026-11-30 00:39:57+00:00", "2026-11-29T19:49:09.522901Z", "127.0.0.1", "::1", "::"),
        *(
            "gpuswitchd.service",
            "user@1234.service",
            "display-manager.service",
            "/dev/vfio/12",
            "kernel 6.1.0-31-amd64",
        ),
        *("/etc/gpuswitch/config.toml", "/etc/gpuswitch/tls/key.pem", "nvidia_drm.modeset = Y", "not authorized"),
        *("org.gpuswitch1.Error.NotAuthorized", "kimono", "unkim", "/sys/bus/pci/devices/0000:01:00.1/driver"),
        *("GA104 [GeForce RTX 3070]", "137438953472", "0.525400123456", "12:34:56", "0000:01:00.0: text"),
        *("CPU0: 1234:5678", "std::vector", "--token-file", "/media"),
    ],
)
def test_what_a_report_is_for_stays(text: str) -> None:
    assert known().clean(text) == text


def test_the_same_stands_for_the_same() -> None:
    redaction = known()
    assert redaction.clean("win11, kim, 10.0.0.1") == redaction.clean("win11, kim, 10.0.0.1")
    one, other = redaction.clean("10.0.0.2 10.0.0.3").split()
    assert one != other


def test_words_of_ours_are_nobodys_names() -> None:
    redaction = Redaction()
    redaction.name("hostname", "host", "gpu", "x", "")
    redaction.name("user", "root", "1000")
    assert redaction.clean("host gpu x root 1000") == "host gpu x root 1000"


def test_capital_letters_of_any_language() -> None:
    redaction = Redaction()
    redaction.name("user", "İsmail", "İlker", "Straße")
    assert redaction.clean("ismail İsmail ISMAIL, ilker; straße") == "<user-1> <user-1> <user-1>, <user-2>; <user-3>"


def test_the_longest_name_goes_where_several_begin_alike() -> None:
    redaction = known()
    redaction.name("user", "Kim", "Kim Example Jones")
    assert redaction.clean("Kim Example Jones, Kim Example-x, kim") == "<user-3>, <user-2>-x, <user-1>"


def test_many_names_are_looked_up_and_not_tried_one_by_one() -> None:
    """A host that blocks names has tens of thousands of them: an alternation of these takes half a minute."""
    redaction = Redaction()
    redaction.name("hostname", *(f"host{n}.example.org" for n in range(30000)))
    words = " ".join(f"some text, host{n}.example.org" for n in range(0, 30000, 10))
    assert "host" not in redaction.clean(words).replace("<hostname", "")


def of_schema(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict):
            yield from part["properties"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from of_schema(each)


def of_dataclass(hint: Any) -> Iterator[str]:
    if is_dataclass(hint):
        yield from (field.name for field in fields(hint))
        for each in get_type_hints(hint, include_extras=True).values():
            yield from of_dataclass(each)
    for each in get_args(hint):
        yield from of_dataclass(each)


def test_our_keys_stay_whoever_is_called_so() -> None:
    """A machine called `vm` would make each key "vm" unreadable."""
    shown = ("common", "groups", "history", "holders", "show", "status")
    keys = {*of_dataclass(Entry), *(key for name in shown for key in of_schema(SCHEMAS[name]))}
    assert keys > {"vm", "requester", "unfinished"}
    assert sorted(keys - KEPT_WORDS) == []
