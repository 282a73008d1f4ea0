"""What setup proposes: names, what a card is told by, the text; what it sees of a desktop; and of virtual machines."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpuswitch.cli import machines, what_ends
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.proposal import Desk, Wanted, match_of, name_for, text_of
from gpuswitch.config.loading import load
from gpuswitch.doctor.looks import desktop
from gpuswitch.doctor.looks.desktop import Desktop, Session
from gpuswitch.doctor.machine import Files
from gpuswitch.model.desktop import DISPLAY_MANAGER, DISPLAY_MANAGERS
from tests.harness.made_machine import MadeMachine


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA Corporation GA104 [GeForce RTX 3070]", "rtx3070"),
        ("NVIDIA Corporation AD102 [GeForce RTX 4090]", "rtx4090"),
        ("Advanced Micro Devices, Inc. [AMD/ATI] Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]", "rx6800"),
        ("Advanced Micro Devices, Inc. [AMD/ATI] Navi 31 [Radeon RX 7900 XT/7900 XTX/7900M]", "rx7900xt"),
        ("Intel Corporation DG2 [Arc A770]", "a770"),
        ("NVIDIA Corporation GH100 [H100 SXM5 80GB]", "h100sxm580gb"),
        ("Intel Corporation Alder Lake-P GT2 [Iris Xe Graphics]", "irisxe"),
        ("", "gpu"),
        ("Radeon 680", "gpu680"),
        ("\u663e\u5361", "gpu"),
        ("x" * 90, "x" * 29),
    ],
)
def test_a_name_is_what_people_call_the_card(model: str, name: str) -> None:
    assert name_for(model, set()) == name
    assert name_for(model, {name, f"{name}-2"}) == f"{name}-3"


CARD = {"vendor": "10de", "device": "2484", "subsystem": "1043:87c1", "port": "0000:00:01.0"}


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], ("vendor", "device")),
        ([{"vendor": "8086", "device": "46a6"}], ("vendor", "device")),
        ([CARD | {"subsystem": "1458:0001"}], ("vendor", "device", "subsystem")),
        ([CARD | {"port": "0000:00:06.0"}], ("vendor", "device", "subsystem", "port")),
        ([CARD], ()),
    ],
)
def test_a_card_is_told_from_the_others_by_as_little_as_does(
    others: Sequence[dict[str, str]], said: Sequence[str]
) -> None:
    assert match_of(CARD, others) == {key: CARD[key] for key in said}


def test_the_text_is_toml_that_the_service_takes_whatever_a_card_is_called(tmp_path: Path) -> None:
    gpus = [
        Wanted("0000:01:00.0", "rtx3070", 'a "card"\n[of] \x1b mine', CARD, "vfio", allow_boot_display=True),
        Wanted(
            "0000:02:00.0",
            "other",
            stop_units=["b.service"],
            desk=Desk(DISPLAY_MANAGER, "gdm.service", end_sessions=True),
        ),
    ]
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/50-setup.toml").write_text(text_of(gpus))
    first, second = tomllib.loads(text_of(gpus))["gpu"]
    assert first == {
        "address": "0000:01:00.0",
        "match": CARD,
        "name": "rtx3070",
        "allow_boot_display": True,
        "at_boot": "vfio",
    }
    assert second == {
        "address": "0000:02:00.0",
        "name": "other",
        "stop_units": ["b.service", DISPLAY_MANAGER],
        "end_sessions": True,
    }
    config = load(tmp_path, {})
    assert ([each.name for each in config.gpus], [each.table.name for each in config.sought]) == (
        ["other"],
        ["rtx3070"],
    )


# Desktops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("desk", "by_hand", "outlives"),
    [
        (Desktop(DISPLAY_MANAGER, "lightdm.service", Session("2", service="lightdm", desktop="xfce")), False, False),
        (Desktop(DISPLAY_MANAGER, "gdm.service", Session("2", service="gdm-password", desktop="gnome")), False, True),
        (Desktop(DISPLAY_MANAGER, "lightdm.service", Session("2", service="lightdm", desktop="KDE")), False, True),
        (Desktop(DISPLAY_MANAGER, "sddm.service", None), False, True),
        (Desktop(DISPLAY_MANAGER, "lightdm.service", Session("2", type="tty", service="login")), True, True),
        (Desktop("", "", Session("2", type="tty", service="login")), True, True),
        (Desktop(), True, True),
    ],
)
def test_sessions_are_ended_where_one_may_stay(desk: Desktop, by_hand: bool, outlives: bool) -> None:
    assert (desk.started_by_hand, desk.may_outlive_its_manager) == (by_hand, outlives)


def test_the_display_manager_is_the_one_that_the_alias_means_else_one_that_runs(tmp_path: Path) -> None:
    made = MadeMachine(tmp_path)
    made.program("loginctl", "[ $1 = show-seat ] && echo ActiveSession=7 || printf 'Type=x11\\nClass=greeter\\n'")
    made.unit("greetd.service")
    made.examined()
    seen = desktop.look(Files(made.machine))
    assert seen == Desktop("greetd.service", "greetd.service", Session("7", type="x11", greeter=True))
    made.unit(DISPLAY_MANAGER, Id="gdm.service", ActiveState="inactive")
    made.program("loginctl", "exit 1")
    made.examined()
    assert desktop.look(Files(made.machine)) == Desktop(DISPLAY_MANAGER, "gdm.service", None)
    made.program("systemctl", "exit 1")
    assert desktop.look(Files(made.machine)) == Desktop()


def test_the_command_knows_display_managers_by_the_same_names() -> None:
    assert {DISPLAY_MANAGER, *DISPLAY_MANAGERS} == what_ends._DESKTOPS


# Virtual machines ----------------------------------------------------------------------------------------------------


def test_what_a_machine_lacks_is_a_line_for_a_shell() -> None:
    domain = """<domain><devices>
      <hostdev mode='subsystem' type='pci'>
        <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
        <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x1'/>
      </hostdev>
      <hostdev mode='subsystem' type='usb'><source><address bus='1' device='2'/></source></hostdev>
    </devices></domain>"""
    functions = ["0000:01:00.0", "0000:05:00.1"]
    assert machines.lacking("win10", functions, lambda *_: domain) == ["0000:05:00.1"]
    line = machines.to_attach("it's \u6211", "0000:05:00.1")
    assert line.endswith("/></source></hostdev>\" | virsh attach-device 'it'\\''s \u6211' /dev/stdin --config")
    assert "bus='0x05' slot='0x00' function='0x1'" in line
    for said, why in ((None, "no answer from virsh"), ("<domain", "cannot read the definition")):
        with pytest.raises(CtlError, match=why):
            machines.lacking("win10", functions, lambda *_, said=said: said)


def test_a_machine_is_found_in_any_case_and_else_named_with_those_that_there_are() -> None:
    assert machines.names(lambda *_: "b\na\n\n") == ["a", "b"]
    assert machines.named("Win10", ["win10"]) == "win10"
    assert machines.named("WIN10", ["win10", "WIN10"]) == "WIN10"
    for known, why in ((["a", "b"], "there are: a, b"), ([], "there are: none"), (None, "no answer from virsh")):
        with pytest.raises(CtlError, match=why):
            machines.named("win10", known)
