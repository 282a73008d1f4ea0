"""`gpuswitchctl report`, of a service on a simulated host: what is in the file, and whose names are not."""

from __future__ import annotations

import json
import os
import pwd
import stat
from contextlib import closing
from pathlib import Path

import pytest
from jeepney import HeaderFields, Message, message_bus
from jeepney.io.blocking import open_dbus_connection

from gpuswitch.cli import report, sysfs
from gpuswitch.cli.client import NAME, Service
from gpuswitch.cli.journal import Line
from gpuswitch.cli.main import main
from gpuswitch.errors import Failed
from tests.harness.buses.private import PrivateBus
from tests.real_bus.conftest import Ctl, Start
from tests.real_bus.test_json import Json, environ, told

__all__ = ["environ", "told"]

GPU = "0000:01:00.0"
CONFIG = f"""
[metrics]
enabled = false
[[gpu]]
address = "{GPU}"
name = "geforce"
allow_boot_display = true
"""


def made(ctl: Ctl, path: Path, *options: str) -> str:
    said = ctl("report", "--output", str(path), *options)
    assert said.returncode == 0, said.stderr
    return path.read_text()


async def test_all_that_is_asked_for_is_in_it(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("laptop", "probe@0000:01:00.0#1=EINVAL", config=CONFIG)
    assert ctl("to-vfio", GPU).returncode == 1
    text = made(ctl, tmp_path / "report.md")
    for title in (
        "Versions",
        "Configuration in force",
        "GPUs",
        "Who has them open",
        "IOMMU groups",
        "History, the last 20",
    ):
        assert f"\n## {title}\n\n```text\n" in text
    assert "gpuswitchd 0." in text
    assert '"address": "0000:01:00.0"' in text
    assert '"status": "revert' in text
    assert "gpu.0000:01:00.0.name = " in text or '"geforce"' in text
    assert text.count("```") % 2 == 0


async def test_it_is_a_new_file_that_nobody_else_reads(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("plain")
    path = tmp_path / "report.md"
    made(ctl, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    again = ctl("report", "--output", str(path))
    assert again.returncode == Failed.exit_code
    assert again.stderr == f"gpuswitchctl: cannot write {path}: it is there already; name another file with --output\n"
    assert path.read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert ctl("report", "--output", str(tmp_path / "link")).returncode == Failed.exit_code
    assert not (tmp_path / "elsewhere").exists()


async def test_standard_output_and_json(start: Start, ctl: Ctl, told: Json, tmp_path: Path) -> None:
    await start("plain")
    assert ctl("report", "--output", "-").stdout.startswith("# gpuswitch report\n")
    [document] = told("report", "--output", str(tmp_path / "report.md"))
    assert document["report"]["path"] == str(tmp_path / "report.md")
    assert (tmp_path / "report.md").exists()
    [error] = told("report", "--output", "-")
    assert error["error"]["kind"] == "invalid_argument"


def test_without_the_service_it_says_what_is_not_in_it(ctl: Ctl, tmp_path: Path) -> None:
    text = made(ctl, tmp_path / "report.md")
    assert "- not in it: what the service knows: the service does not run\n" in text
    assert "## Versions" in text
    assert "## Configuration, as the service would read it" in text


async def test_nobodys_names_are_in_it(start: Start, ctl: Ctl, tmp_path: Path) -> None:
    await start("laptop", config=CONFIG)
    ctl("to-vfio", GPU)
    text = made(ctl, tmp_path / "report.md")
    people = [user.pw_name for user in pwd.getpwall() if 1000 <= user.pw_uid < 60000]
    node = os.uname().nodename
    assert [name for name in (*people, node) if name in text.split()] == []


async def test_it_is_in_english_and_its_words_are_not(
    start: Start, ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start("plain")
    monkeypatch.setenv("LANGUAGE", "de")
    text = made(ctl, tmp_path / "report.md")
    assert text.startswith("# gpuswitch report\n")


@pytest.fixture
def here(private_bus: PrivateBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command runs in this process, and the configuration lies here."""
    for name in ("LANGUAGE", "LC_ALL", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUSWITCH_BUS", private_bus.address)
    monkeypatch.setattr(report, "DIRECTORY", tmp_path / "etc")
    (tmp_path / "etc").mkdir()
    return tmp_path


def made_here(here: Path) -> str:
    assert main(["report", "--output", str(here / "report.md")]) == 0
    return (here / "report.md").read_text()


TITLE = "\n## Configuration, as the service would read it\n\n```text\n"


def test_without_the_service_a_fault_in_the_configuration_is_a_sentence(here: Path) -> None:
    file = here / "etc" / "config.toml"
    file.write_text("[deadlines]\nunbind = true\n")
    section = made_here(here).partition(TITLE)[2].partition("\n```")[0]
    assert section.startswith(f"fault: cannot use {file}:2: deadlines.unbind: ")
    assert "{" not in section


def test_without_the_service_the_settings_are_there_and_who_set_them(here: Path) -> None:
    file = here / "etc" / "config.toml"
    file.write_text("[deadlines]\nunbind = 77\n")
    section = made_here(here).partition(TITLE)[2].partition("\n```")[0].splitlines()
    assert f"deadlines.unbind = 77.0  ({file})" in section
    assert 'defaults.busy = "refuse"  (default)' in section


def test_a_service_that_hangs_is_waited_for_once_and_named(
    here: Path, private_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ANSWER_SECONDS", 0.1)
    asked: list[str] = []
    ask = Service.ask

    def counted(self: Service, message: Message, *within: float | None) -> Message:
        asked.append(message.header.fields[HeaderFields.member])
        return ask(self, message, *within)

    monkeypatch.setattr(Service, "ask", counted)
    hanging = open_dbus_connection(private_bus.address)
    hanging.send_and_get_reply(message_bus.RequestName(NAME))
    with closing(hanging):
        text = made_here(here)
    assert "- not in it: what the service knows: the service did not answer within 0.1 s\n" in text
    assert asked == ["NameHasOwner", "Ping"]
    assert TITLE in text
    for title in ("Versions", "Modules", "Unit"):
        assert f"\n## {title}\n" in text


def test_what_nobody_expected_is_a_line_and_the_rest_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("what?")

    monkeypatch.setattr(sysfs, "modules", broken)
    monkeypatch.setattr(sysfs, "functions", broken)
    monkeypatch.setattr(Service, "connect", broken)
    text = made_here(here)
    assert "- not in it: modules: a fault of gpuswitchctl: KeyError: 'what?'\n" in text
    assert "- not in it: what the service knows: a fault of gpuswitchctl: " in text
    for title in ("Versions", "Unit"):
        assert f"\n## {title}\n" in text


def test_where_users_cannot_be_listed_the_report_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pwd, "getpwall", broken)
    said = "- not in it: a list of its users, so their names may stand here: Input/output error\n"
    assert said in made_here(here)


def test_people_whom_no_list_has_are_known_by_their_numbers_and_by_what_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a directory in the network, or of systemd-homed."""
    lines = [
        Line(0.0, "game-7 (pid 4, uid 1500000) asked; Jane Doe and jdoe did", ""),
        Line(0.0, "x (pid 7, session 2 of lee) has it open: lee did", ""),
        Line(0.0, "0000:01:00.0 belongs to the virtual machine payroll: shut that down first", ""),
    ]
    found = pwd.struct_passwd(("jdoe", "x", 1500000, 1500000, "Jane Doe", "/", "/bin/sh"))
    getpwuid = pwd.getpwuid
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: found if uid == 1500000 else getpwuid(uid))
    monkeypatch.setattr(report, "service_lines", lambda _most: lines)
    text = made_here(here)
    assert "<program-1> (pid 4, uid 1500000) asked; <user-" in text
    assert [name for name in ("jdoe", "Jane Doe", "of lee", "lee did", "payroll", "game-7") if name in text] == []


def test_a_machine_with_letters_that_json_escapes_is_nobodys(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PAGES", here)
    owner = {"owner": {"name": "Büro", "uuid": "5c9b1a7e-2f4d-4c1b-9a57-3e0f8d6b2c41"}, "vm": "büro", "state": "host"}
    (here / "gpu.json").write_text(json.dumps(owner))
    text = made_here(here)
    assert (
        'gpu.json: {"owner": {"name": "<machine-1>", "uuid": "<uuid-1>"}, "vm": "<machine-1>", "state": "host"}' in text
    )


def test_blocked_hosts_are_nobodys_machines() -> None:
    text = (
        "127.0.0.1 localhost\n127.0.1.1 tower # me\n0.0.0.0 target\n::1 ip6\n10.0.0.1 nas nas.example.org\nx y\n\n# z"
    )
    assert list(report.hosts_in(text.splitlines())) == ["tower", "nas", "nas.example.org"]
