"""The command `doctor`: what it shows of a machine, in which language, and how it ends."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gpuswitch.cli import doctor
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.main import main
from gpuswitch.cli.translate import speak
from gpuswitch.doctor.examination import examine
from gpuswitch.doctor.seen import Service
from tests.harness.json_schemas import check
from tests.harness.made_machine import CARD, INTEGRATED, MadeMachine, here

Shown = Callable[..., tuple[int, str]]


@pytest.fixture
def made(tmp_path: Path) -> MadeMachine:
    return MadeMachine(tmp_path)


@pytest.fixture
def shown(made: MadeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """The verb on that machine, with the service that it has; its exit status, and what it prints."""
    monkeypatch.setattr(doctor, "examine", partial(examine, gather=here))
    monkeypatch.setattr(doctor, "service_seen", lambda _: made.service)

    def run(*gpus: str, **options: object) -> tuple[int, str]:
        made.examined()  # writes what stands in for systemctl
        given = {"gpus": list(gpus), "json": False, "short": False, "bus": None, **options}
        status = doctor.doctor(Namespace(**given), made.machine)
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def german() -> Iterator[None]:
    speak("de")
    yield
    speak("en")


def test_a_good_machine_is_shown_under_headings(shown: Shown) -> None:
    status, text = shown()
    assert status == 0
    headings = [line for line in text.splitlines() if line and not line.startswith((" ", "not ", "problems"))]
    assert headings == ["Machine", "gpuswitch", f"GPU {CARD}", "libvirt", "Other tools"]
    assert f"not judged, since they are not managed: {INTEGRATED}; to have one judged: gpuswitchctl doctor GPU" in text
    assert text.splitlines()[-1].startswith("problems: 0; warnings: 0; ok: ")


def test_what_is_bad_comes_first_and_commands_stand_whole(
    made: MadeMachine, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.command_line("intel_iommu=on modprobe.blacklist=nvidia")
    made.hook("etc/libvirt/hooks/qemu.d/vm/prepare/begin/x", "virsh nodedev-detach x\n", executable=True)
    made.remove("etc/libvirt/hooks/qemu.d/50-gpuswitch")
    status, text = shown(short=True)
    assert status == 2
    assert "  problem  the hook is missing: /etc/libvirt/hooks/qemu.d/50-gpuswitch; no virtual machine" in text
    assert "\n           to do: install gpuswitch again, in its sources\n             make install\n" in text
    assert "             chmod a-x /etc/libvirt/hooks/qemu.d/vm/prepare/begin/x\n" in text
    assert "  ok " not in text
    assert "Machine\n" not in text
    status, text = shown()
    libvirt = text.partition("\nlibvirt\n")[2].splitlines()
    assert libvirt[0].startswith("  problem  ")


def test_json_is_as_its_schema_says(made: MadeMachine, shown: Shown) -> None:
    made.tree.unbind(CARD)
    made.service = Service()
    made.as_root = False
    status, text = shown(json=True)
    said: dict[str, Any] = json.loads(text)
    check("doctor", said)
    assert (status, said["severity"], said["as_root"], said["gpus"]) == (1, "warning", False, [CARD])
    [driver] = [each for each in said["findings"] if each["kind"] == "driver"]
    assert (driver["gpu"], driver["severity"], driver["area"]) == (CARD, "warning", "gpu")
    assert said["unseen"][0]["what"] == "holders"


def test_a_host_that_cannot_be_looked_at_is_not_one_without_gpus(made: MadeMachine, shown: Shown) -> None:
    made.folder("sys/bus/pci/drivers_autoprobe")
    status, text = shown()
    assert status == 1
    assert "not seen: host: " in text
    assert "there is no GPU" not in text


def test_a_stranger_is_told_what_root_would_see(made: MadeMachine, shown: Shown) -> None:
    made.service, made.as_root = Service(), False
    _, text = shown()
    assert "not seen: holders: the service does not say it, and only root may look at what others have open" in text
    assert "to see all of it: sudo gpuswitchctl doctor" in text


@pytest.mark.usefixtures("german")
def test_it_speaks_the_language_of_whoever_reads_it(made: MadeMachine, shown: Shown) -> None:
    made.booted_on(CARD)
    _, text = shown()
    assert "Andere Werkzeuge" in text
    assert "Problem" in text
    assert "allow_boot_display = true" in text
    assert " is " not in text.partition(f"GPU {CARD}")[2].partition("libvirt")[0]


def test_a_name_that_is_none_ends_with_2_and_says_so(shown: Shown) -> None:
    with pytest.raises(CtlError, match="no GPU is named 'radeon'") as error:
        shown("radeon")
    assert error.value.exit_code == 2


def test_help_says_what_its_exit_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "doctor"]) == 0
    assert "The exit status is 0 where all is well, 1 with" in capsys.readouterr().out
    assert main(["help", "exit-status"]) == 0
    assert "Of doctor: 0 all is well, 1 there are warnings, 2 there are problems." in capsys.readouterr().out
