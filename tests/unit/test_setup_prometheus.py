"""`gpuswitchctl setup prometheus` on a machine of files: what it writes, what it refuses, and how it is taken back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.cli import prometheus, setup
from gpuswitch.cli.client import Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.kept_files import KeptFiles
from gpuswitch.cli.parser import parse
from gpuswitch.cli.prometheus_text import BEGIN, END, NoPlaceError, job, rule_file, with_items, without_ours
from tests.harness.json_schemas import check
from tests.harness.made_machine import MadeMachine
from tests.harness.promtool import RULES
from tests.harness.service.fixed import fixed

RULES_HERE = "usr/share/gpuswitch/prometheus/gpuswitch.rules.yml"
DEBIAN = """\
# Sample config for Prometheus.

global:
  scrape_interval:     15s # Set the scrape interval to every 15 seconds.

rule_files:
  # - "first_rules.yml"

scrape_configs:
  # The job name is added as a label `job=<job_name>`.
  - job_name: 'prometheus'

    static_configs:
      - targets: ['localhost:9090']
"""
"""As Debian's package has it, with fewer comments."""
JOB = job("127.0.0.1:9752", "desk")
METRICS = {"enabled": "true", "address": '"127.0.0.1"', "port": "9752", "certificate": '""'}
SYSTEMCTL = """
case $1 in
show) printf 'Id=prometheus.service\\nLoadState=loaded\\nActiveState=%s\\n\\n' "$(cat "${0%/usr*}/active")" ;;
*) echo "$*" >>"${0%/usr*}/systemctl.log"; [ ! -e "${0%/usr*}/deaf" ] || { echo 'Job failed.' >&2; exit 1; } ;;
esac
"""
PROMTOOL = """
! grep -s BROKEN "$3" >&2 || { echo "  FAILED: parsing YAML file $3: no such key" >&2; exit 1; }
"""


class Desk:
    """A machine with Prometheus, and the service with some settings."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = MadeMachine(folder / "root")
        self.state = folder / "setup"
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.file = self.made.write("etc/prometheus/prometheus.yml", DEBIAN)
        self.file.chmod(0o640)
        self.made.write(RULES_HERE, RULES.read_text())
        self.made.write("active", "active")
        self.made.program("systemctl", SYSTEMCTL)
        self.made.program("promtool", PROMTOOL)
        self.serves()

    def serves(self, **settings: str) -> None:
        service = fixed()
        rows = [
            {"key": f"metrics.{key}", "value": value, "default": "", "origin": ""}
            for key, value in (METRICS | settings).items()
        ]
        self.monkeypatch.setattr(service, "config", lambda: rows, raising=False)
        self.monkeypatch.setattr(Service, "connect", lambda _address: service)

    def run(self, *words: str) -> str:
        """What it says."""
        self.capsys.readouterr()
        args = parse(["setup", *words])
        if words[0] == "undo":
            setup.undo(args, self.made.machine, setup.Places(self.state.with_name("etc"), self.state))
        else:
            prometheus.setup(args, self.made.machine)
        return self.capsys.readouterr().out

    def json(self, *words: str) -> dict[str, Any]:
        said = json.loads(self.run(*words, "--json"))
        check("setup", said)
        return dict(said)

    def run_commands(self) -> list[str]:
        log = self.made.root / "systemctl.log"
        return log.read_text().splitlines() if log.exists() else []

    def tree(self) -> Mapping[str, bytes]:
        return {str(each): each.read_bytes() for each in self.made.root.rglob("*") if each.is_file()}


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, capsys, monkeypatch)


def test_it_has_a_job_and_the_alerts_once_and_undo_takes_every_byte_back(desk: Desk) -> None:
    before = desk.tree()
    dry = desk.json("prometheus", "--dry-run")
    assert (dry["changed"], dry["target"], desk.tree()) == (False, "127.0.0.1:9752", before)

    done = desk.json("--yes", "prometheus")
    assert (done["changed"], done["commands"]) == (True, ["systemctl reload prometheus.service"])
    assert (done["before"], done["text"], desk.file.read_text()) == (DEBIAN, dry["text"], dry["text"])
    assert desk.file.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in desk.file.parent.iterdir()] == ["prometheus.yml"]
    assert desk.file.read_text() == DEBIAN.replace(
        "rule_files:\n", f'rule_files:\n  {BEGIN}\n  - "/{RULES_HERE}"\n  {END}\n'
    ).replace(
        "scrape_configs:\n",
        f"scrape_configs:\n  {BEGIN}\n  - job_name: gpuswitch\n    static_configs:\n"
        f'      - targets: ["127.0.0.1:9752"]\n        labels: {{instance: "{os.uname().nodename}"}}\n  {END}\n',
    )
    again = desk.json("prometheus", "--yes")
    assert (again["changed"], again["commands"]) == (False, [])
    assert "says all of this already" in desk.run("prometheus", "--yes")

    would = desk.json("undo", "--dry-run")
    assert (would["files"], would["commands"]) == (
        [{"path": str(desk.file), "result": "restored", "kept": ""}],
        [],
    )
    assert "would be without our lines" in desk.run("undo", "--dry-run")
    undone = desk.json("undo")
    assert (undone["files"], undone["commands"]) == (would["files"], ["systemctl reload prometheus.service"])
    assert (desk.file.read_text(), desk.file.stat().st_mode & 0o777) == (DEBIAN, 0o640)
    assert desk.run_commands() == ["reload prometheus.service"] * 2
    assert desk.run("undo") == "there is nothing to undo: setup has written nothing\n"


def test_what_somebody_else_has_written_meanwhile_stays(desk: Desk) -> None:
    desk.run("prometheus", "--yes")
    desk.file.write_text(desk.file.read_text().replace("15s #", "30s #") + "  - job_name: mine\n")
    assert "is without our lines\n" in desk.run("undo")
    assert desk.file.read_text() == DEBIAN.replace("15s #", "30s #") + "  - job_name: mine\n"


def test_undo_does_nothing_at_all_where_nobody_can_tell_which_lines_are_ours(desk: Desk) -> None:
    desk.run("prometheus", "--yes")
    file = desk.state.with_name("etc") / "conf.d/50-setup.toml"
    KeptFiles(desk.state).write({file: b"# of setup\n"})
    desk.file.write_text(desk.file.read_text().replace(f"  {END}\n", "", 1))
    before = desk.tree()
    with pytest.raises(CtlError, match="without its other end; take them out by hand"):
        desk.run("undo")
    assert (desk.tree(), file.read_bytes()) == (before, b"# of setup\n")


def test_undo_leaves_a_configuration_without_our_lines_alone_whatever_it_is(desk: Desk) -> None:
    desk.file.write_bytes(b"# \xff\n")
    assert desk.json("undo")["files"] == []
    with pytest.raises(CtlError, match="it is no text in UTF-8; nothing is changed"):
        desk.run("prometheus", "--yes")


def test_another_port_is_told_by_doing_it_again(desk: Desk) -> None:
    desk.run("prometheus", "--yes")
    desk.serves(port="9753", address='"::"')
    done = desk.json("prometheus", "--yes")
    assert done["target"] == "[::1]:9753"
    assert (done["text"].count("[::1]:9753"), done["text"].count(BEGIN), "9752" in done["text"]) == (1, 2, False)


def test_people_see_what_is_to_be_written(desk: Desk) -> None:
    said = desk.run("prometheus", "--dry-run").splitlines()
    assert "+  - job_name: gpuswitch" in said
    assert f'+  - "/{RULES_HERE}"' in said
    assert [each for each in said if each.startswith("-")] == [f"--- {desk.file}"]
    assert said[-1] == "nothing is written: this was a dry run"
    (desk.made.root / "active").write_text("inactive")
    said = desk.run("prometheus", "--yes").splitlines()
    assert said[-2] == f"{desk.file} is written; to take it back: gpuswitchctl setup undo"
    assert said[-1].endswith("reads it when it starts: systemctl enable --now prometheus.service")
    assert desk.run_commands() == []


def test_what_is_there_by_hand_is_not_written_a_second_time(desk: Desk) -> None:
    """In files that the configuration names, too."""
    desk.file.write_text("rule_files: ['rules/*.yml']\nscrape_config_files:\n- jobs/*.yml\n")
    desk.made.write("etc/prometheus/rules/gpus.yml", RULES.read_text())
    desk.made.write("etc/prometheus/jobs/gpus.yml", 'scrape_configs:\n- job_name: "gpuswitch"  # ours\n')
    assert desk.json("prometheus", "--yes")["changed"] is False
    desk.made.remove("etc/prometheus/jobs/gpus.yml")
    assert "job_name: gpuswitch" in desk.json("prometheus", "--dry-run")["text"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"enabled": "false"}, "metrics.enabled and metrics.address serve none; first: gpuswitchctl config edit"),
        ({"address": '""'}, "metrics.enabled and metrics.address serve none"),
        ({"port": "0"}, "metrics.port is 0, another one each time"),
        ({"certificate": '"/x.pem"'}, "over HTTPS .*by hand: docs/monitoring.md has it"),
    ],
)
def test_metrics_that_it_could_not_ask_for(desk: Desk, settings: dict[str, str], why: str) -> None:
    desk.serves(**settings)
    before = desk.tree()
    with pytest.raises(CtlError, match=why):
        desk.run("prometheus", "--yes")
    assert desk.tree() == before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"BROKEN\n{DEBIAN}", r"it has faults as it is: .*/etc/prometheus/prometheus.yml: no such key; correct them"),
        ("scrape_configs: []\n", r"has 'scrape_configs: \[\]'; write that list .*\[\{job_name: gpuswitch, static_con"),
        (f"{DEBIAN}  {BEGIN}\n", f"it has '{BEGIN}' without its other end; take them out by hand"),
    ],
)
def test_a_configuration_that_it_cannot_use_stays_as_it_is(desk: Desk, text: str, why: str) -> None:
    desk.file.write_text(text)
    before = desk.tree()
    with pytest.raises(CtlError, match=why):
        desk.run("prometheus", "--yes")
    assert desk.tree() == before


def test_what_promtool_does_not_take_is_not_written(desk: Desk) -> None:
    desk.made.program("promtool", 'grep -q gpuswitch "$3" || exit 0; echo "  FAILED: $3: no" >&2; exit 1')
    before = desk.tree()
    with pytest.raises(CtlError, match=r"cannot use \S+ with what setup would write: FAILED: \S+/prometheus.yml: no;"):
        desk.run("prometheus", "--yes")
    assert desk.tree() == before


def test_it_is_said_where_prometheus_could_not_be_told(desk: Desk) -> None:
    desk.made.write("deaf", "")
    with pytest.raises(
        CtlError, match=r"written, and Prometheus was not told: Job failed\.; once that is mended: systemc"
    ):
        desk.run("prometheus", "--yes")
    assert BEGIN in desk.file.read_text()


def test_where_it_makes_no_sense(desk: Desk) -> None:
    with pytest.raises(CtlError, match="cannot ask: this is no terminal; say --yes, or --dry-run"):
        desk.run("prometheus")
    desk.made.remove(RULES_HERE)
    with pytest.raises(CtlError, match=r"cannot find gpuswitch\.rules\.yml; install gpuswitch anew"):
        desk.run("prometheus", "--yes")
    desk.made.as_root = False
    with pytest.raises(CtlError, match="it takes root: sudo gpuswitchctl setup prometheus"):
        desk.run("prometheus", "--yes")
    desk.made.remove("usr/bin/promtool")
    with pytest.raises(CtlError, match="promtool is not installed; it comes with Prometheus"):
        desk.run("prometheus", "--yes")
    desk.file.unlink()
    with pytest.raises(CtlError, match=r"no /etc/prometheus/prometheus\.yml; to .* it: apt-get install prometheus$"):
        desk.run("prometheus", "--yes")


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("", "{b}\nk:\n  - x\n{e}\n"),
        ("---\na: 1\n", "---\n{b}\nk:\n  - x\n{e}\na: 1\n"),
        ("k:\n- y\n", "k:\n{b}\n- x\n{e}\n- y\n"),
        ("k: # why\n    - y\na:\n- z\n", "k: # why\n    {b}\n    - x\n    {e}\n    - y\na:\n- z\n"),
        ("k:\na:\n- z\n", "k:\n  {b}\n  - x\n  {e}\na:\n- z\n"),
        ("a: 1\nk:", "a: 1\nk:\n  {b}\n  - x\n  {e}"),
        ("k:\r\n  - y\r\n", "k:\r\n  {b}\n  - x\n  {e}\n  - y\r\n"),
    ],
)
def test_an_item_stands_with_the_others_and_goes_without_a_trace(text: str, becomes: str) -> None:
    written = with_items(text, "k", ["- x"])
    assert written == becomes.format(b=BEGIN, e=END)
    assert without_ours(written) == text


def test_an_item_is_put_where_a_list_is_written_a_line_each() -> None:
    with pytest.raises(NoPlaceError, match=r"k: \[y\]"):
        with_items("k: [y]\n", "k", ["- x"])
    both = with_items(with_items(DEBIAN, "scrape_configs", JOB), "rule_files", rule_file("/a b"))
    assert without_ours(both) == DEBIAN


def test_a_key_that_came_with_our_lines_stays_for_the_items_of_others() -> None:
    ours = with_items("global: {}\n", "rule_files", rule_file("/ours.yml"))
    assert without_ours(ours) == "global: {}\n"
    with_theirs = ours.replace(f"{END}\n", f"{END}\n  - theirs.yml\n", 1)
    assert without_ours(with_theirs) == "rule_files:\n  - theirs.yml\nglobal: {}\n"


def test_undo_writes_nothing_that_promtool_does_not_take(desk: Desk) -> None:
    desk.run("prometheus", "--yes")
    written = desk.file.read_text()
    desk.made.program("promtool", f'grep -qF \'{BEGIN}\' "$3" || {{ echo "  FAILED: $3 lacks it" >&2; exit 1; }}')
    with pytest.raises(CtlError, match=r"^cannot take our lines out of .*prometheus.yml: .* take them out by hand$"):
        desk.run("undo")
    assert (desk.file.read_text(), list(desk.file.parent.glob(".*"))) == (written, [])


def test_undo_that_is_refused_leaves_our_lines_where_they_are(desk: Desk) -> None:
    """Somebody has changed another file since: nothing is put back before that is settled."""
    desk.run("prometheus", "--yes")
    file = desk.state.with_name("etc") / "conf.d/50-setup.toml"
    KeptFiles(desk.state).write({file: b"# of setup\n"})
    file.write_bytes(b"# of somebody else\n")
    before = desk.tree()
    with pytest.raises(CtlError, match="somebody has changed it since"):
        desk.run("undo")
    assert desk.tree() == before
