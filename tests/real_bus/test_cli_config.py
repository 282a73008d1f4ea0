"""`gpuswitchctl config`: what is in force, and `config check`: what is wrong with what is not yet."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from gpuswitch.cli.configuration import DIRECTORY, judged
from gpuswitch.cli.doctor import doctor
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.parser import parse
from gpuswitch.cli.setup import setup
from gpuswitch.cli.simulated import Serving, serving, tell_of_this_machine
from gpuswitch.config import loading, settings
from gpuswitch.doctor import seen
from gpuswitch.doctor.machine import Machine
from gpuswitch.errors import ConfigError, NoSuchGpu
from tests.harness.buses.private import PrivateBus
from tests.harness.service.services import BIN, environment, write_config
from tests.real_bus.conftest import Start

CTL = str(BIN / "gpuswitchctl")
QUIET = "[metrics]\nenabled = false\n"
TYPO = f"{QUIET}[deadlines]\nunbnid = 7\n"
GOOD = f'{QUIET}[deadlines]\nunbind = 7\n[[gpu]]\naddress = "01:00.0"\nname = "geforce"\n'
LONG = "x" * 300

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(private_bus: PrivateBus) -> dict[str, str]:
    return environment(GPUSWITCH_BUS=private_bus.address, TERM="dumb")


@pytest.fixture
def ctl(environ: dict[str, str]) -> Ctl:
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [CTL, "config", *arguments]
        return subprocess.run(command, env=environ | variables, capture_output=True, text=True, check=False)

    return run


def said(environ: dict[str, str], *arguments: str) -> str:
    """What another verb of the command says."""
    return subprocess.run([CTL, *arguments], env=environ, capture_output=True, text=True, check=True).stdout


def ran(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Another verb of the command, however it ended."""
    return subprocess.run([CTL, *arguments], env=environ, capture_output=True, text=True, check=False)


# What is in force


async def test_a_card_is_managed_wherever_it_is(start: Start, ctl: Ctl, environ: dict[str, str]) -> None:
    """By what `status` shows of it."""
    service = await start("laptop", config=QUIET)
    status = said(environ, "status", "01:00.0")
    [match] = [line.partition(": ")[2] for line in status.splitlines() if line.lstrip().startswith("match: ")]
    write_config(service.config, f'{QUIET}[[gpu]]\nmatch = {match}\nname = "geforce"\n')
    await service.ask("Reload")
    shown = said(environ, "list", "--json")
    named = {gpu["name"]: (gpu["address"], gpu["managed"]) for gpu in json.loads(shown)["gpus"]}
    assert named["geforce"] == ("0000:01:00.0", True)
    [key] = [row.split()[0] for row in ctl("--changed").stdout.splitlines() if ".name" in row]
    assert key == "gpu[vendor=10de,device=2484,subsystem=10de:0000,port=0000:00:01.0].name"


async def test_changed_shows_what_differs_from_the_default(start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=f"{GOOD}[history]\nkeep = 1000\n")
    keys = [row.split()[0] for row in ctl("--changed").stdout.splitlines()[1:]]
    gpu = "gpu[0000:01:00.0]"
    assert keys == [f"{gpu}.address", f"{gpu}.name", "deadlines.unbind", "metrics.enabled"]
    write_config(service.config, "[history]\nkeep = 1000\n[metrics]\nport = 0\n")
    await service.ask("Reload")
    assert [row.split()[0] for row in ctl("--changed").stdout.splitlines()[1:]] == ["metrics.port"]


async def test_what_the_service_would_refuse_now_is_said_beside_what_is_in_force(start: Start, ctl: Ctl) -> None:
    service = await start("laptop", config=GOOD)
    before = ctl()
    assert "warning" not in before.stderr
    write_config(service.config, TYPO)
    shown = ctl()
    assert (shown.returncode, shown.stdout) == (0, before.stdout)
    sentence = (
        f"the configuration in {service.config} cannot be used as it is now, so this is what the service has read "
        f"before: gpuswitchctl config check {service.config} names what is wrong"
    )
    assert shown.stderr == f"gpuswitchctl: warning: {sentence}\n"
    assert json.loads(ctl("--json").stdout)["warnings"] == [sentence]


async def test_where_nothing_differs_that_is_said(start: Start, ctl: Ctl) -> None:
    await start("laptop", config="", GPUSWITCH_METRICS__ENABLED="true", GPUSWITCH_METRICS__PORT="9752")
    shown = ctl("--changed")
    assert (shown.returncode, shown.stdout) == (0, "everything is as by default\n")


# What is wrong


def test_a_directory_is_checked_without_the_service(ctl: Ctl, tmp_path: Path) -> None:
    file = write_config(tmp_path / "etc", TYPO)
    what = "no such key; did you mean unbind?"
    fault = f"cannot use {file}:4: deadlines.unbnid: {what}"
    checked = ctl("check", str(tmp_path / "etc"))
    assert (checked.returncode, checked.stdout, checked.stderr) == (2, "", f"{file}:4: deadlines.unbnid: {what}\n")
    checked = ctl("check", str(file), "--json")
    told = json.loads(checked.stdout)
    assert (checked.returncode, told["path"], told["faults"], told["warnings"]) == (2, str(file), [fault], [])
    place = {"file": str(file), "line": 4, "column": None, "key": "deadlines.unbnid", "what": what}
    assert told["places"] == [{"text": fault, **place}]


def test_all_faults_of_a_file_are_told_from_above_as_editors_read_them(ctl: Ctl, tmp_path: Path) -> None:
    file = write_config(
        tmp_path / "etc", f"{TYPO}[[gpu]]\naddress = '01:00'\nmembers = [\n  'x'\n]\n[history]\nkeep = 0\n"
    )
    checked = ctl("check", str(tmp_path / "etc"))
    places = [line.split(": ")[:2] for line in checked.stderr.splitlines()]
    assert places == [
        [f"{file}:4", "deadlines.unbnid"],
        [f"{file}:6", "gpu['01:00'].address"],
        [f"{file}:8", "gpu['01:00'].members[1]"],
        [f"{file}:11", "history.keep"],
    ]
    file.write_text("[metrics]\nenabled = yes\n")
    assert ctl("check", str(file)).stderr.startswith(f"{file}:2:11: it is not TOML: ")


def test_what_has_no_effect_is_told_of_a_configuration_that_can_be_used(ctl: Ctl, tmp_path: Path) -> None:
    file = write_config(tmp_path / "etc", '[[gpu]]\naddress = "ffff:ff:1f.7"\n')
    (tmp_path / "etc/gpuswitch.toml").touch()
    checked = ctl("check", str(tmp_path / "etc"))
    assert checked.returncode == 0
    assert checked.stdout == f"the configuration in {tmp_path}/etc can be used: {file}\n"
    unread, misfit = checked.stderr.splitlines()
    assert unread.startswith(f"gpuswitchctl: warning: {tmp_path}/etc/gpuswitch.toml is not read: ")
    assert misfit.startswith("gpuswitchctl: warning: the [[gpu]] table of ffff:ff:1f.7 is about no GPU: ")
    assert ctl("check", str(file)).stderr.splitlines() == [misfit]


def test_what_is_not_there_is_not_said_to_be_good(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    checked = ctl("check", str(tmp_path / "etc"))
    nothing = f"there is no configuration in {tmp_path}/etc: everything is as by default\n"
    assert (checked.returncode, checked.stdout) == (0, nothing)
    file = write_config(tmp_path / "etc/conf.d", "")
    assert ctl("check", str(tmp_path / "etc")).stdout == (f"the configuration in {tmp_path}/etc can be used: {file}\n")


def test_a_certificate_that_cannot_be_used_is_told(ctl: Ctl, tmp_path: Path) -> None:
    with_tls = f'certificate = "{tmp_path}/a.pem"\nkey = "{tmp_path}/a.key"\n'
    file = write_config(tmp_path / "etc", f"[metrics]\n{with_tls}")
    fault = f"cannot use metrics.certificate: cannot read {tmp_path}/a.pem: No such file or directory"
    checked = ctl("check", str(file))
    assert (checked.returncode, checked.stderr) == (0, f"gpuswitchctl: warning: {fault}\n")
    write_config(tmp_path / "etc", QUIET + with_tls)
    assert ctl("check", str(file)).stderr == ""


def test_a_check_goes_by_the_files_and_not_by_the_callers_variables(ctl: Ctl, tmp_path: Path) -> None:
    write_config(tmp_path / "etc", QUIET)
    assert ctl("check", str(tmp_path / "etc"), GPUSWITCH_METRICS__PORT="x").returncode == 0


def test_the_service_program_itself_checks_with_its_variables(tmp_path: Path) -> None:
    file = write_config(tmp_path / "etc", GOOD + 'host_driver = "nvida"\n')
    command = [str(BIN / "gpuswitchd"), f"--check-config={tmp_path}/etc", "--simulate=reserved"]
    checked = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    assert checked.stderr.startswith(
        "gpuswitchd: warning: the [[gpu]] table of geforce (0000:01:00.0) "
        'has host_driver = "nvida", and nothing brings that: '
    )
    right = environment(GPUSWITCH_METRICS__PORT="9752")
    told = subprocess.run([*command, "--json"], env=right, capture_output=True, text=True, check=False)
    settings = {each["key"]: each for each in json.loads(told.stdout)["settings"]}
    port = settings["metrics.port"]
    assert (port["value"], port["origin"]) == ("9752", "the variable GPUSWITCH_METRICS__PORT")
    assert settings["gpu[0000:01:00.0].host_driver"]["origin"] == str(file)
    wrong = environment(GPUSWITCH_METRICS__PORT="x")
    checked = subprocess.run(command, env=wrong, capture_output=True, text=True, check=False)
    assert (checked.returncode, str(file) in checked.stderr) == (2, False)
    assert "cannot use the variable GPUSWITCH_METRICS__PORT: metrics.port: must be a whole number" in checked.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["check", "/none/such"], "cannot check /none/such: there is no such file or directory"),
        (["check", "/dev/null"], "cannot read /dev/null: it is not a regular file"),
        (["edit", "/etc/gpuswitch/gpuswitch.toml"], "cannot edit /etc/gpuswitch/gpuswitch.toml: nobody reads it; the"),
        (["edit", "/etc/gpuswitch/conf.d/.a.toml"], "cannot edit /etc/gpuswitch/conf.d/.a.toml: nobody reads it; the"),
        (["edit"], "cannot edit /etc/gpuswitch/config.toml: this is no terminal; write it in another way, then: gpu"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(ctl: Ctl, arguments: list[str], sentence: str) -> None:
    refused = ctl(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"gpuswitchctl: {sentence}")
    assert refused.stderr.count("\n") == 1


def test_what_cannot_be_looked_at_is_a_fault_in_one_sentence(ctl: Ctl, tmp_path: Path) -> None:
    """A name that no file can have stands for a place that we have no permission for: root has it everywhere."""
    for path in (tmp_path / LONG, tmp_path / LONG / "config.toml"):
        refused = ctl("check", str(path))
        fault = f"gpuswitchctl: cannot check {path}: File name too long\n"
        assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", fault)
    with pytest.raises(ConfigError, match=r"^cannot read .*: File name too long"):
        loading.load(tmp_path / LONG)


def test_a_link_that_cannot_be_followed_is_not_read_either(ctl: Ctl, tmp_path: Path) -> None:
    file = write_config(tmp_path / "etc", QUIET)
    (tmp_path / "etc/gpuswitch.conf").symlink_to(LONG)
    checked = ctl("check", str(file.parent))
    assert checked.returncode == 0
    assert f"gpuswitchctl: warning: {tmp_path}/etc/gpuswitch.conf is not read: the configuration is " in checked.stderr


def test_a_service_program_that_cannot_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gpuswitchd"
    program.touch(mode=0o644)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(CtlError, match=f"^cannot check /etc: cannot start {program}: Permission denied$"):
        judged(Path("/etc"))


def test_an_editor_is_for_people(ctl: Ctl) -> None:
    refused = ctl("edit", "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"]["text"] == "cannot edit with --json: an editor needs a terminal"


def test_the_command_and_the_service_mean_the_same_directory() -> None:
    assert DIRECTORY == settings.DIRECTORY


async def test_a_simulated_service_has_its_own_directory_checked(
    start: Start, ctl: Ctl, private_bus: PrivateBus, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what looks at this machine all the same says so."""
    tell_of_this_machine(private_bus.address)
    assert capsys.readouterr() == ("", "")
    service = await start("laptop", config=GOOD)
    checked = ctl("check")
    file = service.config / "config.toml"
    assert checked.stdout == f"the configuration in {service.config} can be used: {file}\n"
    assert checked.stderr == ""
    tell_of_this_machine(private_bus.address)
    assert "not at the simulated machine laptop, of which status tells" in capsys.readouterr().err
    tell_of_this_machine(None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", ["setup --yes", "setup undo", "setup boot --yes", "setup boot undo", "setup proxmox", "setup prometheus"]
)
async def test_nothing_of_this_machine_is_written_for_one_in_memory(
    start: Start, environ: dict[str, str], private_bus: PrivateBus, words: str
) -> None:
    await start("single")
    ended = ran(environ, *words.split())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(
        f"gpuswitchctl: cannot write to this machine: the service at {private_bus.address} has another, the simulated "
        "machine single, whose configuration is changed by gpuswitchctl config edit; to set up this machine, leave out "
        "--bus, and unset GPUSWITCH_BUS"
    )
    assert ("--dry-run" in ended.stderr) is (words != "setup boot undo")
    assert ended.stderr.count("\n") == 1


async def test_what_setup_would_write_for_one_in_memory_is_shown_where_its_service_reads_it(
    start: Start, environ: dict[str, str]
) -> None:
    service = await start("single")
    shown = ran(environ, "setup", "--dry-run")
    assert "the GPUs and their configuration are those of the simulated machine single" in shown.stderr
    assert f"+++ {service.config}/conf.d/50-setup.toml" in shown.stdout
    assert "/etc/gpuswitch" not in shown.stdout
    assert not (service.config / "conf.d").exists()


async def test_the_doctor_takes_no_gpu_in_memory_for_one_of_this_machine(
    start: Start, private_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same addresses."""
    await start("single")
    asked = []

    def examine(_machine: object, service: seen.Service, _gpus: object) -> NoReturn:
        asked.append(service)
        raise NoSuchGpu("there is no GPU on this host")

    monkeypatch.setattr("gpuswitch.cli.doctor.examine", examine)
    for machine in (None, Machine()):
        with pytest.raises(CtlError):
            doctor(parse(["doctor", "--bus", private_bus.address]), machine)
    assert [(each.running, list(each.gpus)) for each in asked] == [(True, []), (True, ["0000:01:00.0"])]


async def test_setup_writes_nothing_that_the_service_would_not_read(
    start: Start, private_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of this machine that reads another directory: what is in memory is not told here, as on the system bus."""
    service = await start("single")
    there = serving(private_bus.address)
    assert there == Serving("single", str(service.config))
    monkeypatch.setattr("gpuswitch.cli.setup.serving", lambda _address: there._replace(machine=""))
    with pytest.raises(CtlError) as refused:
        setup(parse(["setup", "--yes"]))
    assert refused.value.exit_code == 2
    assert str(refused.value).startswith(
        f"cannot write /etc/gpuswitch/conf.d/50-setup.toml: the service reads {service.config}; "
    )
    assert f"gpuswitchctl config edit {service.config}/conf.d/50-setup.toml" in str(refused.value)
