"""What introspection tells of our interfaces, and the files in which it stands."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from gpuswitch.api.authority import Action
from gpuswitch.api.gpu import GpuObject
from gpuswitch.api.interface import Interface
from gpuswitch.api.introspection import document
from gpuswitch.api.manager import ManagerObject
from gpuswitch.api.standard import Introspectable, ObjectManager, Peer, Properties

ROOT = Path(__file__).parents[2]
OURS: list[type[Interface]] = [ManagerObject, GpuObject]
ALL = [*OURS, Introspectable, ObjectManager, Peer, Properties]
TEXT = "annotation[@name='org.gtk.GDBus.DocString']"


def told(interface: type[Interface]) -> ET.Element:
    [element] = ET.fromstring(document([interface]))  # noqa: S314 -- we wrote it
    return element


@pytest.mark.parametrize("interface", ALL, ids=lambda each: each.dbus_name)
def test_each_member_has_a_sentence_and_each_argument_a_name(interface: type[Interface]) -> None:
    element = told(interface)
    members = [each for each in element if each.tag != "annotation"]
    assert len(members) == len(interface.methods) + len(interface.signals) + len(interface.properties)
    for each in (element, *members):
        [sentence] = [text.attrib["value"] for text in each.findall(TEXT)]
        assert sentence.rstrip("`").endswith((".", "`"))
    assert [arg for arg in element.iter("arg") if not arg.get("name")] == []


@pytest.mark.parametrize("interface", ALL, ids=lambda each: each.dbus_name)
def test_each_property_says_whether_it_changes(interface: type[Interface]) -> None:
    emits = "annotation[@name='org.freedesktop.DBus.Property.EmitsChangedSignal']"
    said = {
        each.attrib["name"]: [a.attrib["value"] for a in each.findall(emits)]
        for each in told(interface).iter("property")
    }
    constant = {"Version", "ConfigDirectory", "Simulated", "Address"}
    assert said == {name: ["const" if name in constant else "true"] for name in interface.properties}


def test_each_action_is_one_of_polkits() -> None:
    policy = ET.parse(ROOT / "units/org.gpuswitch1.policy").getroot()  # noqa: S314 -- a file of ours
    assert {each.attrib["id"] for each in policy.iter("action")} == {action.id for action in Action}
    needed = {member.action for interface in OURS for member in interface.methods.values()}
    assert needed == {"", *Action} - {Action.FORCE}


@pytest.mark.parametrize("language", ["de", "fr", "zh_CN"])
def test_polkit_asks_in_each_language_with_the_same_details(language: str) -> None:
    policy = ET.parse(ROOT / "units/org.gpuswitch1.policy").getroot()  # noqa: S314 -- a file of ours
    attribute = "{http://www.w3.org/XML/1998/namespace}lang"
    for action in policy.iter("action"):
        for tag in ("description", "message"):
            texts = {each.get(attribute, ""): each.text or "" for each in action.findall(tag)}
            details = [
                sorted(word for word in ("$(gpu)", "$(stops)", "$(machine)") if word in texts[of])
                for of in ("", language)
            ]
            assert details[0] == details[1]
            assert texts[language] != texts[""]


def test_the_files_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "docs/generate_dbus.py", tmp_path], cwd=ROOT, check=True)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name: path.read_text() for path in (ROOT / "docs/dbus").iterdir()} == fresh, "run `make docs`"
