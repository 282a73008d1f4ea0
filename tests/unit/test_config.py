"""The configuration: what the layers say together, and one sentence for each thing that is wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gpuswitch.cli.editing import TEMPLATE
from gpuswitch.config.loading import load
from gpuswitch.config.schema import Deadlines, Defaults, History, Metrics
from gpuswitch.config.settings import Config
from gpuswitch.errors import ConfigError
from gpuswitch.model.address import PciAddress
from gpuswitch.model.match import Match
from gpuswitch.model.policy import Busy, Release
from tests.harness.facts import at

EXAMPLE = TEMPLATE
FIRST = PciAddress.parse("0000:01:00.0")
SECONDS = "a number of seconds above 0 and at most 600"
WITHOUT_QUOTES = "must be true or false, without quotes, not "
SECOND = PciAddress.parse("0000:02:00.0")

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write one file below a configuration directory, for nobody else to change."""
    (tmp_path / "conf.d").mkdir()
    for directory in (tmp_path, tmp_path / "conf.d"):
        directory.chmod(0o755)

    def write_file(name: str, text: str) -> Path:
        file = tmp_path / name
        file.write_text(text)
        file.chmod(0o644)
        return file

    return write_file


def faults(path: Path, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(path, environ or {})
    return str(error.value).splitlines()


def test_without_a_directory_everything_is_default(tmp_path: Path) -> None:
    config = load(tmp_path / "missing", {})
    assert config.gpus == ()
    assert config.deadlines == Deadlines()
    assert config.metrics == Metrics(enabled=True, address="127.0.0.1", port=9752)
    assert config.gpu(FIRST).managed is False
    assert config.gpu(FIRST).rules.allow_boot_display is False


def test_a_gpu_with_a_table_is_managed(tmp_path: Path, write: Write) -> None:
    write(
        "config.toml",
        """
        [[gpu]]
        address = "01:00.0"
        name = "rtx3070"
        members = ["pci_0000_05_00_0"]
        host_driver = "nvidia"
        """,
    )
    config = load(tmp_path, {})
    gpu = config.gpu(FIRST)
    assert (gpu.managed, gpu.name, gpu.host_driver) == (True, "rtx3070", "nvidia")
    assert config.members == {FIRST: (PciAddress.parse("0000:05:00.0"),)}
    assert config.gpu(SECOND).managed is False


def test_a_gpus_own_key_beats_the_defaults(tmp_path: Path, write: Write) -> None:
    write(
        "config.toml",
        """
        [defaults]
        allow_boot_display = true
        [[gpu]]
        address = "0000:01:00.0"
        allow_boot_display = false
        [[gpu]]
        address = "0000:02:00.0"
        """,
    )
    config = load(tmp_path, {})
    assert config.gpu(FIRST).rules.allow_boot_display is False
    assert config.gpu(SECOND).rules.allow_boot_display is True
    assert config.gpu(PciAddress.parse("0000:03:00.0")).rules.allow_boot_display is True


def test_drop_ins_override_single_keys_in_the_order_of_their_names(tmp_path: Path, write: Write) -> None:
    write("config.toml", '[deadlines]\nunbind = 10\nprobe = 11\n[[gpu]]\naddress = "0000:01:00.0"\nname = "one"\n')
    write("conf.d/20-late.toml", "[deadlines]\nunbind = 30\n")
    write("conf.d/10-early.toml", '[deadlines]\nunbind = 20\n[[gpu]]\naddress = "01:00.0"\nhost_driver = "nouveau"\n')
    write("conf.d/.hidden.toml", "[deadlines]\nunbind = 40\n")
    write("conf.d/notes.txt", "not TOML")
    config = load(tmp_path, {})
    assert (config.deadlines.unbind, config.deadlines.probe) == (30, 11)
    assert [(gpu.name, gpu.host_driver) for gpu in config.gpus] == [("one", "nouveau")]


def test_the_environment_comes_last(tmp_path: Path, write: Write) -> None:
    write("config.toml", '[metrics]\nport = 1\naddress = "::1"\n[[gpu]]\naddress = "0000:01:00.0"\nname = "one"\n')
    environ = {
        "GPUSWITCH_METRICS__PORT": "2",
        "GPUSWITCH_GPU": '[{"address": "0000:01:00.0", "host_driver": "amdgpu"}]',
        "GPUSWITCH_DEADLINES": '{"power": 3.5}',
        "GPUSWITCH_DEFAULTS__ALLOW_BOOT_DISPLAY": "yes",
        "GPUSWITCH_BUS": "unix:path=/run/bus",
        "HOME": "/",
    }
    config = load(tmp_path, environ)
    assert (config.metrics.address, config.metrics.port) == ("::1", 2)
    assert (config.gpu(FIRST).name, config.gpu(FIRST).host_driver) == ("one", "amdgpu")
    assert config.deadlines.power == 3.5
    assert config.defaults.allow_boot_display is True


def test_settings_say_what_they_are_by_default(tmp_path: Path, write: Write) -> None:
    write("config.toml", '[metrics]\nport = 1\n[[gpu]]\naddress = "01:00.0"\nbusy = "wait"\n')
    settings = {s.key: (s.value, s.default) for s in load(tmp_path, {}).settings}
    assert settings["metrics.port"] == ("1", "9752")
    assert settings["gpu[0000:01:00.0].busy"] == ('"wait"', '"refuse"')
    assert settings["gpu[0000:01:00.0].address"] == ('"0000:01:00.0"', '""')
    assert {s.value == s.default for s in load(tmp_path / "missing", {}).settings} == {True}


def test_settings_say_which_layer_set_them(tmp_path: Path, write: Write) -> None:
    main = write("config.toml", '[defaults]\nallow_boot_display = true\n[[gpu]]\naddress = "0000:01:00.0"\n')
    drop_in = write("conf.d/a.toml", '[[gpu]]\naddress = "01:00.0"\nname = "one"\n')
    settings = {s.key: (s.value, s.origin) for s in load(tmp_path, {"GPUSWITCH_DEADLINES__UNBIND": "7"}).settings}
    assert settings["gpu[0000:01:00.0].name"] == ('"one"', str(drop_in))
    assert settings["gpu[0000:01:00.0].allow_boot_display"] == ("true", str(main))
    assert settings["gpu[0000:01:00.0].host_driver"] == ('""', "default")
    assert settings["deadlines.unbind"] == ("7.0", "the variable GPUSWITCH_DEADLINES__UNBIND")
    assert settings["metrics.port"] == ("9752", "default")


def test_where_a_gpu_goes_after_its_virtual_machine_is_as_on_release_unless_said(tmp_path: Path, write: Write) -> None:
    write(
        "config.toml",
        """
        [defaults]
        on_release = "stay"
        on_saved = "host"
        [[gpu]]
        address = "0000:01:00.0"
        on_saved = ""
        start_grace = 600.5
        """,
    )
    config = load(tmp_path, {"GPUSWITCH_DEFAULTS__ON_MIGRATED": "host"})
    rules = config.gpu(FIRST).rules
    assert (rules.on_release, rules.on_saved, rules.on_migrated) == (Release.STAY, None, Release.HOST)
    assert (rules.start_grace, rules.release_grace, rules.acquire_seconds) == (600.5, 10.0, 120.0)
    assert config.gpu(SECOND).rules.on_saved is Release.HOST
    settings = {s.key: s.value for s in config.settings}
    assert (settings["defaults.on_saved"], settings["gpu[0000:01:00.0].on_saved"]) == ('"host"', '""')


def test_whether_a_device_is_reset_or_removed(tmp_path: Path, write: Write) -> None:
    write("config.toml", '[[gpu]]\naddress = "01:00.0"\nreset_on_failure = true\n')
    config = load(tmp_path, {})
    assert (config.gpu(FIRST).rules.reset_on_failure, config.gpu(FIRST).rules.rescan_on_failure) == (True, "auto")
    assert (config.defaults.reset_on_failure, config.defaults.rescan_on_failure) == ("auto", "auto")


def test_whether_a_device_is_removed_by_a_variable(tmp_path: Path) -> None:
    values = {"auto": "auto", "true": True, "false": False}
    for text, value in values.items():
        config = load(tmp_path, {"GPUSWITCH_DEFAULTS__RESCAN_ON_FAILURE": text})
        assert config.defaults.rescan_on_failure == value
    with pytest.raises(ConfigError, match="must be true, false or \"auto\", not 'yes'"):
        load(tmp_path, {"GPUSWITCH_DEFAULTS__RESCAN_ON_FAILURE": "yes"})


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[metrics]\nprot = 1", "metrics.prot", "no such key; did you mean port?"),
        ("[metric]\nport = 1", "metric", "no such key; did you mean metrics?"),
        ("[deadlines]\nxyz = 1", "deadlines.xyz", "no such key; known are module, power, override"),
        ('[[gpu]]\naddress = "01:00.0"\nnmae = "x"', "gpu[0000:01:00.0].nmae", "did you mean name?"),
        ('[[gpu]]\nname = "x"', "gpu[1]", 'it does not say which GPU it is about: add address = "0000:01:00.0"'),
        ("[[gpu]]\nmatch = {}", "gpu[1]", "it does not say which GPU it is about"),
        ('[[gpu]]\nmatch = "10de:2484"', "gpu[1].match", 'write match = { vendor = "10de", device = "2484" }'),
        (
            "[[gpu]]\nmatch = { vendor = 0x10de }",
            "gpu[1].match",
            'four hex digits, such as "10de", in quotes, not 4318',
        ),
        ('[[gpu]]\nmatch = { vendor = "nvidia" }', "gpu[1].match", "vendor must be four hex digits"),
        ('[[gpu]]\nmatch = { device = "2484" }', "gpu[1].match", "of no use without vendor"),
        ('[[gpu]]\nmatch = { subsystem = "1043" }', "gpu[1].match", "such as \"1043:87c1\", in quotes, not '1043'"),
        ('[[gpu]]\nmatch = { serial = "42" }', "gpu[1].match", 'such as "00-80-ee-00-00-00-41-80"'),
        (
            "[[gpu]]\nmatch = { slot = 2 }",
            "gpu[1].match",
            'a name in /sys/bus/pci/slots, such as "2", in quotes, not 2',
        ),
        ('[[gpu]]\nmatch = { port = "01" }', "gpu[1].match", "the PCI address of a bridge above the GPU"),
        ('[[gpu]]\nmatch = { bus = "1" }', "gpu[1].match", "known are vendor, device, subsystem, serial, slot, port"),
        ('[[gpu]]\naddress = "01:00"', "gpu['01:00'].address", "'01:00' is not a PCI address"),
        ('[gpu]\naddress = "01:00.0"', "gpu", "write [[gpu]] with two brackets on each side"),
        ("metrics = 5", "metrics", "must be a table: write [metrics] on a line of its own"),
        ("gpu = [5]", "gpu[1]", "must be a table: write [[gpu]] on a line of its own"),
        ("[deadlines]\nunbind = 0", "deadlines.unbind", f"must be {SECONDS}, not 0"),
        ("[deadlines]\nunbind = 601", "deadlines.unbind", f"must be {SECONDS}, not 601"),
        ("[deadlines]\nunbind = nan", "deadlines.unbind", f"must be {SECONDS}, not nan"),
        ("[deadlines]\nunbind = true", "deadlines.unbind", f"must be {SECONDS}, not true"),
        ('[defaults]\non_release = ""', "defaults.on_release", 'must be "host" or "stay", not \'\''),
        ('[defaults]\non_saved = "off"', "defaults.on_saved", 'must be "host", "stay" or "", not \'off\''),
        ("[defaults]\nacquire_seconds = 601", "defaults.acquire_seconds", f"must be {SECONDS}, not 601"),
        ("[history]\nkeep = 0", "history.keep", "must be a whole number of switches from 1 to 10000, not 0"),
        (
            "[history]\nkeep_days = true",
            "history.keep_days",
            "must be a number of days above 0 and at most 36500, not true",
        ),
        ("[metrics]\nport = 65536", "metrics.port", "must be a whole number from 0 to 65535, not 65536"),
        ('[metrics]\ncertificate = "/a.pem"', "metrics", "certificate is of no use without key: set both, or none"),
        ('[metrics]\nkey = "/a.key"', "metrics", "key is of no use without certificate: set both, or none"),
        ('[metrics]\nclient_ca = "/ca.pem"', "metrics", "client_ca is of no use without certificate and key"),
        ('[metrics]\ntextfile_directory = "here"', "metrics.textfile_directory", "'here' is not an absolute path"),
        (
            '[metrics]\naddress = "localhost"',
            "metrics.address",
            "'localhost' is no IP address: write one, such as 127.0.0.1",
        ),
        ('[[gpu]]\naddress = "01:00.0"\nname = "a b"', "gpu[0000:01:00.0].name", "'a b' is not a name"),
        ('[defaults]\nallow_boot_display = "yes"', "defaults.allow_boot_display", WITHOUT_QUOTES + "'yes'; write true"),
        ('[defaults]\nend_sessions = "Off"', "defaults.end_sessions", WITHOUT_QUOTES + "'Off'; write false"),
        ('[defaults]\nend_sessions = "never"', "defaults.end_sessions", WITHOUT_QUOTES + "'never'"),
        ("[defaults]\nend_sessions = 1", "defaults.end_sessions", "must be true or false, not 1"),
        ("[metrics]\nenabled = {}", "metrics.enabled", "must be true or false, not a table"),
        ('[defaults]\nreset_on_failure = "true"', "defaults.reset_on_failure", """or "auto", not 'true'; write true"""),
        ("[defaults]\nreset_on_failure = 1", "defaults.reset_on_failure", 'must be true, false or "auto", not 1'),
        ('[metrics]\nport = "19761"', "metrics.port", "from 0 to 65535, without quotes, not '19761'; write 19761"),
        ("[metrics]\nport = 9752.0", "metrics.port", "must be a whole number from 0 to 65535, not 9752.0"),
        ('[deadlines]\nunbind = "5m"', "deadlines.unbind", f"must be {SECONDS}, without quotes, not '5m'; write 300"),
        ('[deadlines]\nunbind = "250 ms"', "deadlines.unbind", "not '250 ms'; write 0.25"),
        ('[deadlines]\nunbind = "soon"', "deadlines.unbind", "without quotes, not 'soon'"),
        ('[history]\nkeep_days = "5m"', "history.keep_days", "without quotes, not '5m'"),
        ("[defaults]\nafter_host = 5", "defaults.after_host", "must be text in quotes, not 5"),
        ('[defaults]\nstop_units = "a.service"', "defaults.stop_units", 'must be a list: write ["a.service"]'),
        ("[defaults]\nstop_units = 5", "defaults.stop_units", "must be a list: write [...]"),
        ("gpu = 5", "gpu", "must be tables: write [[gpu]] on a line of its own"),
        (
            "busy = 'wait'",
            "busy",
            "no such key outside of a table; it belongs in [defaults], for all GPUs, or in [[gpu]]",
        ),
        ("unbind = 5", "unbind", "no such key outside of a table; it belongs in [deadlines]"),
        ("[metrics]\nunbind = 5", "metrics.unbind", "no such key in [metrics]; it belongs in [deadlines]"),
        ('[[gpu]]\naddress = "01:00.0"\nname = "--all"', "gpu[0000:01:00.0].name", "'--all' is not a name"),
        ("[defaults]\nname = 'x'", "defaults.name", "no such key in [defaults]; it belongs in [[gpu]]"),
        (
            '[[gpu]]\naddress = "01:00.0"\nname = "pci_0000_01_00_0"',
            "gpu[0000:01:00.0].name",
            "looks like a PCI address",
        ),
        (
            '[[gpu]]\naddress = "01:00.0"\nhost_driver = "vfio-pci"',
            "gpu[0000:01:00.0].host_driver",
            "vfio-pci is no host driver",
        ),
        (
            '[[gpu]]\naddress = "01:00.0"\nmembers = ["05:00.0", "x"]',
            "gpu[0000:01:00.0].members[2]",
            "'x' is not a PCI address",
        ),
    ],
)
def test_a_wrong_key_is_refused_with_file_line_key_and_reason(
    tmp_path: Path, write: Write, text: str, key: str, reason: str
) -> None:
    file = write("config.toml", text)
    (fault,) = faults(tmp_path)
    assert re.match(rf"cannot use {re.escape(f'{file}')}:\d: {re.escape(key)}: ", fault)
    assert reason in fault


def test_the_fault_names_the_file_that_set_the_key(tmp_path: Path, write: Write) -> None:
    write("config.toml", '[[gpu]]\naddress = "01:00.0"\nname = "fine"\n')
    drop_in = write("conf.d/x.toml", '[[gpu]]\naddress = "01:00.0"\nname = "not fine"\n')
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"cannot use {drop_in}:3: gpu[0000:01:00.0].name: ")


def test_what_a_gpu_is_told_by_has_one_spelling(tmp_path: Path, write: Write) -> None:
    """Tables that say the same of it are one, and known by that."""
    main = write("config.toml", '[[gpu]]\nmatch = { vendor = "0x10DE", device = "2484" }\nname = "one"\n')
    write("conf.d/a.toml", '[[gpu]]\nmatch = { device = "0x2484", vendor = "10de" }\nbusy = "wait"\n')
    config = load(tmp_path, {})
    [sought] = config.sought
    assert (config.gpus, sought.match, sought.address) == ((), Match("10de", "2484"), None)
    assert (sought.table.name, sought.rules.busy) == ("one", Busy.WAIT)
    settings = {each.key: (each.value, each.origin) for each in config.settings}
    assert settings["gpu[vendor=10de,device=2484].name"] == ('"one"', str(main))
    assert settings["gpu[vendor=10de,device=2484].match"][0] == '{ vendor = "10de", device = "2484" }'


def test_a_table_may_have_both_and_is_known_by_its_address(tmp_path: Path, write: Write) -> None:
    write("config.toml", '[[gpu]]\naddress = "01:00.0"\nmatch = { slot = "2" }\nmembers = ["05:00.0"]\n')
    [sought] = load(tmp_path, {}).sought
    assert (sought.address, sought.table.label) == (at("0000:01:00.0"), "0000:01:00.0")
    assert sought.at(at("0000:07:00.0")).members == (at("0000:05:00.0"),)


def test_two_tables_for_one_match_in_one_file_are_refused(tmp_path: Path, write: Write) -> None:
    file = write("config.toml", '[[gpu]]\nmatch = { slot = "2" }\n[[gpu]]\nmatch = { slot = "2" }\n')
    assert faults(tmp_path) == [
        f"cannot use {file}:3: gpu[slot=2]: this match has two tables, the first of them in line 1: make one of both"
    ]


def test_a_member_is_claimed_once_whatever_tells_the_gpus(tmp_path: Path, write: Write) -> None:
    tables = ('match = { slot = "2" }', 'match = { slot = "3" }')
    file = write("config.toml", "".join(f'[[gpu]]\n{table}\nmembers = ["05:00.0"]\n' for table in tables))
    assert faults(tmp_path) == [
        f"cannot use {file}:6: gpu[slot=3].members[1]: 0000:05:00.0 is a member of slot=2 already"
    ]


def test_two_tables_for_one_address_in_one_file_are_refused(tmp_path: Path, write: Write) -> None:
    file = write("config.toml", '[[gpu]]\naddress = "01:00.0"\n[[gpu]]\naddress = "0000:01:00.0"\n')
    twice = "this address has two tables, the first of them in line 1: make one of both"
    assert faults(tmp_path) == [f"cannot use {file}:3: gpu[0000:01:00.0]: {twice}"]


OTHER = "0000:02:00.0"


def test_contradictions_between_gpus_are_refused_with_their_names(tmp_path: Path, write: Write) -> None:
    main = write("config.toml", '[[gpu]]\naddress = "01:00.0"\nname = "big"\nmembers = ["05:00.0", "02:00.0"]\n')
    other = write("conf.d/b.toml", '[[gpu]]\naddress = "02:00.0"\nname = "BIG"\nmembers = ["05:00.0"]\n')
    assert faults(tmp_path) == [
        f"cannot use {main}:4: gpu[0000:01:00.0].members[2]: {OTHER} has a [[gpu]] table, so it cannot be a member",
        f"cannot use {other}:3: gpu[0000:02:00.0].name: 'BIG' is the name of 0000:01:00.0 already",
        f"cannot use {other}:4: gpu[0000:02:00.0].members[1]: 0000:05:00.0 is a member of 0000:01:00.0 already",
    ]


def test_every_fault_is_reported_at_once(tmp_path: Path, write: Write) -> None:
    first = write("config.toml", "[metrics]\nport = -1\n")
    second = write("conf.d/b.toml", "[deadlines]\nunbind = 'soon'\n")
    assert [fault.split(": ")[0] for fault in faults(tmp_path)] == [f"cannot use {first}:2", f"cannot use {second}:2"]


def test_a_file_that_is_not_toml_is_named_with_the_place(tmp_path: Path, write: Write) -> None:
    good = write("config.toml", "[metrics]\nport = 1\n")
    bad = write("conf.d/bad.toml", "[metrics\n")
    binary = write("conf.d/binary.toml", "")
    binary.write_bytes(b"[metrics]\n# caf\xe9\n")
    first, second = faults(tmp_path)
    what = "Expected ']' at the end of a table declaration"
    hint = "a heading ends with as many ] as it has [ before it"
    assert first == f"cannot use {bad}:1:9: it is not TOML: {what}: '[metrics'; {hint}"
    assert second == f"cannot use {binary}:2: it is not UTF-8, the encoding of TOML: save the file as that"
    assert str(good) not in first + second


@pytest.mark.parametrize(
    ("text", "place", "shown", "hint"),
    [
        ('name = "rtx\naddress = "x"\n', "2:12", "'name = \"rtx'", "is there a quote missing?"),
        ("name = 'rtx\n\n[metrics]\n", "2", '"name = \'rtx"', "is there a quote missing?"),
        ('stop_units = ["a.service, "b"]\n', "2:28", "", "is there a quote, a comma or ] missing before this?"),
        ('name = "a\n', "2:10", "", "is there a quote missing?"),
        ("[metrics]\n[metrics]\n", "3:9", "'[metrics]'", "what belongs to this table goes where it stands first"),
        ("name: 'a'\n", "2:5", "\"name: 'a'\"", "write key = value"),
        (
            "name = \u201crtx\u201d\n",
            "2:8",
            "'name = \u201crtx\u201d'",
            "these are typographic quotes: write straight ones",
        ),
    ],
)
def test_a_quote_that_is_missing_is_told_with_its_line(
    tmp_path: Path, write: Write, text: str, place: str, shown: str, hint: str
) -> None:
    file = write("config.toml", f"[[gpu]]\n{text}")
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"cannot use {file}:{place}: it is not TOML: ")
    assert f": {shown}" in fault
    assert fault.endswith(hint)


@pytest.mark.parametrize(("value", "column"), [("yes", 13), ("True", 13), ("nvidia", 13), ("5m", 14)])
def test_text_without_quotes_is_shown_with_what_to_write(tmp_path: Path, write: Write, value: str, column: int) -> None:
    file = write("config.toml", f"[metrics]\n  enabled = {value}\n")
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"cannot use {file}:2:{column}: it is not TOML: ")
    assert fault.endswith(f": 'enabled = {value}'; text stands in double quotes, numbers, true and false without any")


def test_a_key_is_written_as_toml_has_it(tmp_path: Path, write: Write) -> None:
    write("config.toml", "[defaults]\n[defaults]\n")
    (fault,) = faults(tmp_path)
    assert ": it is not TOML: Cannot declare defaults twice: '[defaults]'; " in fault


def test_one_gpu_in_single_brackets_is_refused_whatever_comes_after(tmp_path: Path, write: Write) -> None:
    file = write("config.toml", '[gpu]\naddress = "01:00.0"\n')
    write("conf.d/b.toml", '[[gpu]]\naddress = "02:00.0"\n')
    sentence = "write [[gpu]] with two brackets on each side: there is such a table for each GPU"
    assert faults(tmp_path) == [f"cannot use {file}:1: gpu: {sentence}"]


def test_files_that_nobody_reads_are_told(tmp_path: Path, write: Write) -> None:
    for name in ("config.toml", "conf.d/10-a.toml", "conf.d/README", "conf.d/.10-a.toml.swp", "config.toml~"):
        write(name, "")
    for other in ("log", "history.db"):
        write(other, "")
    for aside in ("config.toml.bak", "config.toml.dpkg-old", "conf.d/10-a.toml.disabled"):
        write(aside, "")
    assert load(tmp_path, {}).warnings == ()
    (tmp_path / "empty.d").mkdir()
    (tmp_path / "config.d").mkdir()
    for unread in ("gpuswitch.toml", "config.conf", "conf.d/20-b.conf", "conf.d/30-c", "config.d/10-a.toml"):
        write(unread, "")
    read = f"is not read: the configuration is {tmp_path}/config.toml and {tmp_path}/conf.d/*.toml"
    unread_names = ("config.conf", "config.d", "gpuswitch.toml", "conf.d/20-b.conf", "conf.d/30-c")
    assert load(tmp_path, {}).warnings == tuple(f"{tmp_path / name} {read}" for name in unread_names)


def test_one_file_alone(tmp_path: Path, write: Write) -> None:
    file = write("other.toml", "[metrics]\nport = 7\n")
    write("config.toml", "[metrics]\nport = 8\n")
    config = load(file, {})
    assert (config.metrics.port, config.warnings) == (7, ())


@pytest.mark.parametrize("name", ["config.toml", "conf.d/50-b.toml"])
def test_a_copy_is_read_instead_of_a_file_and_called_as_that(tmp_path: Path, write: Write, name: str) -> None:
    write("conf.d/10-a.toml", "[metrics]\nport = 8\n")
    write("conf.d/90-c.toml", "[deadlines]\nunbind = 9\n")
    copy = write(".copy", "[metrics]\nport = 7\n[deadlines]\nunbind = 7\n")
    instead = {tmp_path / name: copy}
    config = load(tmp_path, {}, instead=instead)
    assert (config.metrics.port, config.deadlines.unbind) == (8 if name == "config.toml" else 7, 9)
    write(".copy", "[metrics]\nprot = 7\n")
    with pytest.raises(ConfigError, match=f"^cannot use {tmp_path / name}:2: metrics.prot: no such key"):
        load(tmp_path, {}, instead=instead)


@pytest.mark.parametrize("text", [f"a = {'[' * 5000}", f"{'a.' * 5000}b = 1"])
def test_a_file_that_is_nested_too_deeply_is_named(tmp_path: Path, write: Write, text: str) -> None:
    file = write("config.toml", text)
    assert faults(tmp_path) == [f"cannot use {file}: it is nested too deeply"]


def test_a_number_that_is_too_long_to_be_written_is_refused_like_any_other(tmp_path: Path, write: Write) -> None:
    """Python does not write numbers of more than 4300 digits, and reads those in hex."""
    huge = f"0x{'f' * 5000}"
    file = write(
        "config.toml",
        f"[metrics]\nport = {huge}\n[deadlines]\nprobe = {huge}\n[[gpu]]\naddress = {huge}\nmatch = {huge}\n",
    )
    found = faults(tmp_path)
    assert [fault.split(": ")[0] for fault in found] == [f"cannot use {file}:{line}" for line in (2, 4, 6, 7)]


def test_each_fault_is_one_line_whatever_a_key_is_called(tmp_path: Path, write: Write) -> None:
    file = write("config.toml", '"a\\nb" = 1\n[defaults]\n"c\u2028" = 2\n')
    assert [fault.partition(": no such key")[0] for fault in faults(tmp_path)] == [
        f'cannot use {file}:1: "a\\nb"',
        f'cannot use {file}:3: defaults."c\\u2028"',
    ]


def test_a_pipe_among_the_files_is_refused_without_waiting_for_its_writer(tmp_path: Path, write: Write) -> None:
    pipe = tmp_path / "conf.d" / "pipe.toml"
    os.mkfifo(pipe)
    pipe.chmod(0o644)
    assert faults(tmp_path) == [f"cannot read {pipe}: it is not a regular file"]


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("GPUSWITCH_METRIC", "1", "no such setting; did you mean GPUSWITCH_METRICS?"),
        ("GPUSWITCH_METRICS__PROT", "1", "metrics.prot: no such key; did you mean port?"),
        ("GPUSWITCH_METRICS__PORT", "x", "metrics.port: must be a whole number from 0 to 65535, not 'x'"),
        ("GPUSWITCH_METRICS_PORT", "1", "no such setting; write GPUSWITCH_METRICS__PORT"),
        ("gpuswitch_unbind", "1", "no such setting; write GPUSWITCH_DEADLINES__UNBIND"),
        ("GPUSWITCH_DEADLINES__UNBND", "1", "deadlines.unbnd: no such key; did you mean unbind?"),
        ("GPUSWITCH_METRICS", '{"port": "2"}', "metrics.port: must be a whole number from 0 to 65535, without quotes"),
        ("GPUSWITCH_DEFAULTS__END_SESSIONS", "5", "defaults.end_sessions: must be true or false, not '5'"),
        ("GPUSWITCH_GPU", "0000:01:00.0", "its value is not JSON"),
        ("GPUSWITCH_GPU", '{"address": "01:00.0"}', 'write a list of tables, [{"address": "01:00.0"}]'),
        ("GPUSWITCH_GPU__NAME", "x", 'write a list of tables, [{"address": "01:00.0"}]'),
        ("GPUSWITCH_GPU", "[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(tmp_path: Path, variable: str, value: str, reason: str) -> None:
    (fault,) = faults(tmp_path, {variable: value, "GPUSWITCH_DEADLINES__UNBIND": "7"})
    assert fault.startswith(f"cannot use the variable {variable}: ")
    assert reason in fault


def test_root_does_not_trust_what_others_may_write(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("config.toml", "[metrics]\nport = 1\n")
    file.chmod(0o664)
    (tmp_path / "conf.d").chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    text = "\n".join(faults(tmp_path))
    assert f"cannot trust {file}: others than root may write it; run: chown root {file} && chmod go-w {file}" in text
    assert f"cannot trust {tmp_path / 'conf.d'}: " in text
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load(tmp_path, {}).metrics.port == 1
    with pytest.raises(ConfigError, match=f"cannot trust {file}: others than root may write it"):
        load(tmp_path, {}, as_root=True)


def uncommented() -> str:
    """The example with every key in force."""
    return re.sub(r"^#(\[|\w+ = )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_the_example_as_shipped_changes_nothing(tmp_path: Path, write: Write) -> None:
    write("config.toml", EXAMPLE.read_text())
    assert load(tmp_path, {}) == Config(settings=load(tmp_path / "missing", {}).settings)


def test_the_example_has_every_key_with_its_default(tmp_path: Path, write: Write) -> None:
    file = write("config.toml", uncommented())
    config = load(tmp_path, {})
    assert {setting.origin for setting in config.settings} == {str(file)}
    assert (config.defaults, config.deadlines) == (Defaults(), Deadlines())
    assert (config.metrics, config.history) == (Metrics(), History())
