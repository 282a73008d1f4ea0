"""Remedies can be copied: the file, the table and the line, for what the configuration is and not for any."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.loading import load
from gpuswitch.config.settings import Config
from gpuswitch.fleet.fitting import fitted
from gpuswitch.model.gpu import Gpu
from gpuswitch.switch.planning.remedies import to_set, to_set_members, to_set_units
from tests.harness.facts import VGA, at, facts, function

GPU = Gpu(at("0000:01:00.0"), (at("0000:01:00.0"), at("0000:01:00.1")))
RELOAD = "then run: systemctl reload gpuswitchd"


def written(path: Path, **files: str) -> Config:
    """The configuration of these files, as the service has it."""
    path.chmod(0o755)
    (path / "conf.d").mkdir(mode=0o755)
    for name, text in files.items():
        file = path / ("config.toml" if name == "config" else f"conf.d/{name}.toml")
        file.write_text(text)
        file.chmod(0o644)
    return fitted(load(path, {}), [GPU], facts([function("0000:01:00.0", VGA)]))[0]


def test_a_gpu_without_a_table_gets_one() -> None:
    assert to_set(Config(), GPU, "allow_boot_display", "true") == (
        "add to /etc/gpuswitch/config.toml, by gpuswitchctl config edit: "
        '`[[gpu]]`, `address = "0000:01:00.0"`, `allow_boot_display = true`'
    )


def test_what_is_to_be_added_is_toml() -> None:
    data = to_set(Config(), GPU, "allow_boot_display", "true").data
    read = tomllib.loads("\n".join(data[name] for name in ("table", "address", "line")))
    assert read == {"gpu": [{"address": "0000:01:00.0", "allow_boot_display": True}]}


def test_a_table_is_called_what_it_is_known_by(tmp_path: Path) -> None:
    """Whoever looks for the address in the file does not find it there."""
    own = written(tmp_path, config='[[gpu]]\naddress = "01:00.1"\nname = "card"\n')
    assert "in the [[gpu]] table of card (0000:01:00.1) in " in to_set(own, GPU, "host_driver", '""')
    told = replace(own, gpus=tuple(replace(gpu, name="", written="vendor=10de") for gpu in own.gpus))
    assert "in the [[gpu]] table of vendor=10de in " in to_set(told, GPU, "host_driver", '""')


@pytest.mark.parametrize("address", ["0000:01:00.0", "0000:01:00.1"])
def test_a_table_is_found_where_it_is(tmp_path: Path, address: str) -> None:
    """Also by the address of another function; of several files, the last one with it holds."""
    table = f"[[gpu]]\naddress = {json.dumps(address)}\n"
    config = written(tmp_path, config=table, desk=table, other="[history]\nkeep = 1\n")
    assert to_set(config, GPU, "module_policy", '"never"') == (
        f'set `module_policy = "never"` in the [[gpu]] table of {address} in {tmp_path}/conf.d/desk.toml, {RELOAD}'
    )


def test_lists_are_written_whole(tmp_path: Path) -> None:
    lines = 'members = ["0000:02:00.0", "0000:03:00.0"]\nstop_units = ["a.service", "b.service"]\n'
    config = written(tmp_path, config=f'[[gpu]]\naddress = "01:00.0"\n{lines}')
    more = to_set_members(config, GPU, more=[at("0000:02:00.0"), at("0000:04:00.0")])
    assert more.data["line"] == 'members = ["0000:02:00.0", "0000:03:00.0", "0000:04:00.0"]'
    assert to_set_members(config, GPU, less=[at("0000:02:00.0")]).data["line"] == 'members = ["0000:03:00.0"]'
    assert to_set_units(config, GPU, less="a.service").data["line"] == 'stop_units = ["b.service"]'


def test_units_of_all_gpus_are_set_where_they_stand(tmp_path: Path) -> None:
    config = written(tmp_path, desk='[defaults]\nstop_units = ["a.service"]\n')
    assert to_set_units(config, GPU, less="a.service") == (
        f"set `stop_units = []` in the [defaults] table in {tmp_path}/conf.d/desk.toml, {RELOAD}"
    )


def test_what_is_added_is_added_where_the_service_reads(tmp_path: Path) -> None:
    told = to_set(written(tmp_path, other="[history]\nkeep = 1\n"), GPU, "allow_boot_display", "true")
    assert told.startswith(f"add to {tmp_path}/config.toml, by gpuswitchctl config edit: ")
