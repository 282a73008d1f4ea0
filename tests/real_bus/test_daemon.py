"""What the real service shows on the bus, and what it answers to those who ask for nonsense."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jeepney
import pytest
from jeepney.io.blocking import open_dbus_connection

from gpuswitch import __version__
from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import PeerError
from tests.harness.service.services import ANY_PORT, GPU, MANAGER, NAME, PROPERTIES, ROOT, Service, plain, write_config
from tests.real_bus.conftest import Start

POLICY = Path(__file__).parents[2] / "units" / "org.gpuswitch1.conf"

INTEGRATED, DISCRETE = f"{ROOT}/gpu/0000_00_02_0", f"{ROOT}/gpu/0000_01_00_0"
NAMED = f"""{ANY_PORT}
[[gpu]]
address = "0000:01:00.0"
name = "geforce"
"""


async def refused(service: Service, path: str, method: str, signature: str = "", *arguments: object) -> str:
    """The error that a call is answered with: its name without the prefix, and its sentence."""
    with pytest.raises(PeerError) as raised:
        await service.call(path, method, signature, *arguments)
    return str(raised.value).removeprefix("org.gpuswitch1.Error.")


# What it shows


async def test_every_gpu_is_an_object_that_the_root_knows(start: Start) -> None:
    service = await start("laptop")
    objects = await service.call(ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects")
    assert {path: list(interfaces) for path, interfaces in objects.items()} == {INTEGRATED: [GPU], DISCRETE: [GPU]}


async def test_a_gpu_shows_what_it_is_and_where(start: Start) -> None:
    service = await start("laptop", config=NAMED)
    shown = await service.properties(DISCRETE)
    assert shown.pop("StateSince") > 0
    assert shown == {
        "Address": "0000:01:00.0",
        "Name": "geforce",
        "Model": "NVIDIA Corporation GA104 [GeForce RTX 3070]",
        "Vendor": "nvidia",
        "Managed": True,
        "AtBoot": "keep",
        "State": "host",
        "Driver": "nvidia",
        "HostDriver": "nvidia",
        "Functions": [
            ("0000:01:00.0", "display", "nvidia"),
            ("0000:01:00.1", "audio", "snd_hda_intel"),
            ("0000:01:00.2", "usb", "xhci_hcd"),
            ("0000:01:00.3", "ucsi", "nvidia-gpu"),
        ],
        "IommuGroups": [13],
        "Adds": [],
        "Match": {"vendor": "10de", "device": "2484", "subsystem": "10de:0000", "port": "0000:00:01.0"},
        "Owner": ("", ""),
        "Switch": {},
        "Reason": "",
        "StaysOut": False,
        "Remedies": [],
        "TrialEnds": 0.0,
        "StoppedUnits": [],
    }
    unnamed = await service.properties(INTEGRATED)
    assert (unnamed["Name"], unnamed["Managed"], unnamed["Vendor"]) == ("", False, "intel")


async def test_the_manager_tells_its_version(start: Start) -> None:
    service = await start("laptop")
    assert await service.call(ROOT, f"{PROPERTIES}.Get", "ss", MANAGER, "Version") == ("s", __version__)


async def test_a_gpu_is_found_by_address_in_any_spelling_and_by_name(start: Start) -> None:
    service = await start("laptop", config=NAMED)
    for selector in ("0000:01:00.0", "01:00.0", "pci_0000_01_00_0", "0000:01:00.3", "geforce"):
        assert await service.ask("GetGpu", "s", selector) == DISCRETE


async def test_the_only_gpu_needs_no_name(start: Start) -> None:
    service = await start("single")
    assert await service.ask("GetGpu", "s", "") == DISCRETE


async def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(start: Start) -> None:
    service = await start("laptop", config=NAMED)
    there = "0000:00:02.0, geforce (0000:01:00.0)"
    for selector, error in (
        ("radeon", f"NoSuchGpu: no GPU is named 'radeon'; this host has {there}"),
        ("09:00.0", f"NoSuchGpu: 0000:09:00.0 is not a GPU of this host; this host has {there}"),
        ("02:00.0", f"NoSuchGpu: 0000:02:00.0 is not a GPU of this host; this host has {there}"),
    ):
        assert await refused(service, ROOT, f"{MANAGER}.GetGpu", "s", selector) == error


async def test_without_a_name_it_is_the_only_managed_gpu(start: Start) -> None:
    service = await start("laptop", config=NAMED)
    assert await service.call(ROOT, f"{MANAGER}.GetGpu", "s", "") == DISCRETE
    write_config(service.config, ANY_PORT)
    await service.ask("Reload")
    several = "InvalidArgument: this host has 2 GPUs; name one of 0000:00:02.0, 0000:01:00.0"
    assert await refused(service, ROOT, f"{MANAGER}.GetGpu", "s", "") == several


async def test_a_plan_names_its_steps_and_takes_none(start: Start) -> None:
    service = await start("laptop", config=f"{ANY_PORT}[deadlines]\nunbind = 7\n")
    before = await service.properties(DISCRETE)
    steps = await service.call(DISCRETE, f"{GPU}.Plan", "sa{sv}", "vfio", {})
    assert steps[0] == {
        "kind": ("s", "module"),
        "title": ("s", "load vfio-pci"),
        "deadline": ("d", 30.0),
        "stops": ("as", []),
        "starts": ("as", []),
        "ends_programs": ("b", False),
        "drivers": ("a{sv}", {}),
    }
    after = {function: told[1] for step in steps for function, told in step["drivers"][1].items()}
    assert after == {f"0000:01:00.{number}": "vfio-pci" for number in range(4)}
    unbinds = [step["title"][1] for step in steps if step["kind"][1] == "unbind"]
    assert unbinds == [
        "unbind 0000:01:00.1 from snd_hda_intel",
        "unbind 0000:01:00.2 from xhci_hcd",
        "unbind 0000:01:00.3 from nvidia-gpu",
    ]
    assert "unload nvidia_drm, nvidia_modeset, nvidia_uvm, nvidia" in [step["title"][1] for step in steps]
    # The last one waits for a port that is silent.
    assert [step["deadline"][1] for step in steps if step["kind"][1] == "unbind"] == [7.0, 7.0, 200.0]
    assert await service.properties(DISCRETE) == before


async def test_a_plan_that_a_guard_refuses_names_what_is_in_the_way(start: Start) -> None:
    service = await start("shared")
    error = await refused(service, DISCRETE, f"{GPU}.Plan", "sa{sv}", "vfio", {})
    assert error.startswith("NotViable: the network card 0000:02:00.0 (Realtek Semiconductor Co., Ltd. RTL8111")


async def test_groups_are_every_function_that_is_in_one(start: Start) -> None:
    service = await start("laptop")
    groups = await service.ask("Groups")
    by_address = {function["address"][1]: function for function in groups}
    assert len(by_address) == 10
    audio = {
        "group": ("x", 13),
        "address": ("s", "0000:01:00.1"),
        "kind": ("s", "audio"),
        "class": ("x", 0x040300),
        "vendor": ("x", 0x10DE),
        "device": ("x", 0x228B),
        "maker": ("s", "NVIDIA Corporation"),
        "model": ("s", "GA104 High Definition Audio Controller"),
        "driver": ("s", "snd_hda_intel"),
        "gpu": ("s", "0000:01:00.0"),
        "adds": ("as", []),
    }
    assert by_address["0000:01:00.1"] == audio
    assert by_address["0000:02:00.0"]["gpu"] == ("s", "")


async def test_the_configuration_in_force_is_told_with_who_set_it(start: Start) -> None:
    service = await start("laptop", config=NAMED, GPUSWITCH_DEADLINES__PROBE="3")
    told = [{name: value for name, (_, value) in each.items()} for each in await service.ask("Config")]
    settings = {each["key"]: (each["value"], each["default"], each["origin"]) for each in told}
    assert settings["gpu[0000:01:00.0].name"] == ('"geforce"', '""', f"{service.config}/config.toml")
    assert settings["deadlines.probe"] == ("3.0", "30.0", "the variable GPUSWITCH_DEADLINES__PROBE")
    assert settings["deadlines.unbind"] == ("20.0", "20.0", "default")


# Who may call what


def test_by_the_bus_policy_only_root_may_be_the_service() -> None:
    """Who may call what, polkit says: tests/real_system/test_polkit.py."""
    owners = {
        policy.attrib.get("user") or policy.attrib["context"]
        for policy in ET.parse(POLICY).iter("policy")  # noqa: S314 -- our own file
        if policy.find("allow[@own]") is not None
    }
    assert owners == {"root"}


def filled(template: str, data: Mapping[str, Any]) -> str:
    """The English text, made of what stands beside it."""
    parts = {k: v if isinstance(v, str) else filled(v["template"], v["data"]) for k, v in data.items()}
    return template.format(**parts)


async def test_the_reasons_of_a_refusal_can_be_had_as_data(start: Start) -> None:
    service = await start("single")
    told = [plain(each) for each in await service.call(DISCRETE, f"{GPU}.Blockers", "sa{sv}", "vfio", {})]
    said = await refused(service, DISCRETE, f"{GPU}.ToVfio", "a{sv}", {})
    assert [blocker["text"] for blocker in told] == said.partition(": ")[2].splitlines()
    kinds = {(blocker["kind"], blocker["error"]) for blocker in told}
    assert kinds == {("boot_display", "NotViable"), ("busy", "Busy")}
    assert [filled(blocker["template"], blocker["data"]) for blocker in told] == [each["text"] for each in told]
    display = next(blocker["data"] for blocker in told if blocker["kind"] == "boot_display")
    assert display["function"] == "0000:01:00.0"
    assert display["set"]["data"]["line"] == "allow_boot_display = true"
    assert await service.call(DISCRETE, f"{GPU}.Blockers", "sa{sv}", "host", {}) == []
    assert (await refused(service, DISCRETE, f"{GPU}.Blockers", "sa{sv}", "mars", {})).startswith("InvalidArgument")


# Nonsense

DEEP: tuple[str, Any] = ("s", "deep")
for _ in range(20):
    DEEP = ("v", DEEP)
BODY_TOO_LARGE = "org.freedesktop.DBus.Error.LimitsExceeded: cannot take a message of "
STANDARD = "org.freedesktop.DBus.Error"

NONSENSE: list[tuple[tuple[Any, ...], str]] = [
    ((DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"force": ("b", True)}), "InvalidArgument: unknown option 'force'"),
    ((DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"\n\x1b[2J": DEEP}), r"InvalidArgument: unknown option '\n\x1b[2J'"),
    ((DISCRETE, f"{GPU}.ToHost", "a{sv}", {"a" * 60000: ("s", "")}), f"InvalidArgument: unknown option '{'a' * 80}'"),
    ((DISCRETE, f"{GPU}.ToHost", "a{sv}", {"a" * 2_000_000: ("s", "")}), BODY_TOO_LARGE),
    ((DISCRETE, f"{GPU}.ToVfio"), f'{STANDARD}.InvalidArgs: ToVfio takes "a{{sv}}", not ""'),
    ((DISCRETE, f"{GPU}.ToVfio", "s", "now"), f'{STANDARD}.InvalidArgs: ToVfio takes "a{{sv}}", not "s"'),
    ((DISCRETE, f"{GPU}.Plan", "sa{sv}", "nvidia", {}), "InvalidArgument: 'nvidia' is not a target; it is one of host"),
    ((DISCRETE, f"{GPU}.Plan", "sa{sv}", "", {}), "InvalidArgument: '' is not a target"),
    ((DISCRETE, f"{GPU}.Plan", "sa{sv}", "\u202evfio", {}), r"InvalidArgument: '\u202evfio' is not a target"),
    ((DISCRETE, f"{GPU}.Plan", "a{sv}s", {}, "vfio"), f'{STANDARD}.InvalidArgs: Plan takes "sa{{sv}}"'),
    ((DISCRETE, f"{GPU}.Wait", "s", ""), "InvalidArgument: 0000:01:00.0 knows of no switch ''"),
    ((DISCRETE, f"{GPU}.Wait", "s", "x" * 60000), f"InvalidArgument: 0000:01:00.0 knows of no switch '{'x' * 80}'"),
    ((DISCRETE, f"{GPU}.Wait", "i", 1), f'{STANDARD}.InvalidArgs: Wait takes "s", not "i"'),
    ((DISCRETE, f"{GPU}.Cancel", "s", "x" * 60000), f"InvalidArgument: 0000:01:00.0 knows of no switch '{'x' * 80}'"),
    ((ROOT, f"{MANAGER}.HistoryEntry", "s", ""), "InvalidArgument: the history knows of no switch ''"),
    ((ROOT, f"{MANAGER}.HistoryEntry", "s", "x" * 999), f"InvalidArgument: the history knows of no switch '{'x' * 9}"),
    ((ROOT, f"{MANAGER}.History", "i", -1), f'{STANDARD}.InvalidArgs: History takes "u", not "i"'),
    ((DISCRETE, f"{GPU}.Explode"), f"{STANDARD}.UnknownMethod: {DISCRETE} has no method Explode"),
    ((DISCRETE, f"{MANAGER}.Reload"), f"{STANDARD}.UnknownInterface: {DISCRETE} has no interface {MANAGER}"),
    ((DISCRETE, f"{PROPERTIES}.Set", "ssv", GPU, "State", ("s", "vfio")), f"{STANDARD}.PropertyReadOnly: cannot set"),
    ((f"{ROOT}/gpu/0000_09_00_0", f"{GPU}.ToVfio", "a{sv}", {}), f"{STANDARD}.UnknownObject: there is no object"),
    ((ROOT, f"{MANAGER}.GetGpu", "s", "../../etc/passwd"), "NoSuchGpu: no GPU is named '../../etc/passwd'"),
    ((ROOT, f"{MANAGER}.GetGpu", "s", "０１:00.0"), "NoSuchGpu: no GPU is named '０１:00.0'"),  # noqa: RUF001 -- digits, of a kind
    ((ROOT, f"{MANAGER}.GetGpu", "s", "0" * 60000), f"NoSuchGpu: no GPU is named '{'0' * 80}'"),
    ((ROOT, f"{MANAGER}.Config", "u", 7), f'{STANDARD}.InvalidArgs: Config takes "", not "u"'),
]  # fmt: skip  # one call a line


async def test_nonsense_gets_an_error_and_changes_nothing(start: Start) -> None:
    service = await start("laptop")
    before = await service.properties(DISCRETE)
    answers = [(await refused(service, *call), error) for call, error in NONSENSE]
    assert [(answer[:200], error) for answer, error in answers if not answer.startswith(error)] == []
    assert [answer for answer, _ in answers if "\n" in answer] == []
    assert await service.properties(DISCRETE) == before
    assert "Traceback" not in service.log


async def test_bytes_that_are_no_text_end_at_the_bus(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop")
    call = jeepney.new_method_call(jeepney.DBusAddress(ROOT, NAME, MANAGER), "GetGpu", "s", ("MARK",))
    with open_dbus_connection(private_bus.address) as stranger:
        stranger.sock.sendall(call.serialise(99).replace(b"MARK", b"\xff\xfe\xc0\x80"))
        with pytest.raises((EOFError, ConnectionError)):
            stranger.recv_until_filtered(deque(), timeout=30)
    assert await service.ask("GetGpu", "s", "01:00.0") == DISCRETE
