"""gpuswitchctl in other languages, against the real service: what that says in English is worded anew."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.service.services import ANY_PORT, BIN, environment
from tests.real_bus.conftest import Start

DISCRETE = "0000:01:00.0"
TABLE = f'{ANY_PORT}[[gpu]]\naddress = "{DISCRETE}"\n'
Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ctl(private_bus: PrivateBus) -> Ctl:
    """Run gpuswitchctl in this language, to its end."""

    def run(language: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = environment(GPUSWITCH_BUS=private_bus.address, LC_ALL=f"{language}.UTF-8", PYTHONUTF8="1")
        return subprocess.run(
            [BIN / "gpuswitchctl", *arguments], env=environ, capture_output=True, encoding="utf-8", check=False
        )

    return run


@pytest.mark.parametrize(
    ("language", "display", "holder"),
    [
        (
            "de_DE",
            "wenn das gewollt ist, `allow_boot_display = true` setzen in der Tabelle [[gpu]] von ",
            " hat /dev/dri/card0 geöffnet; ",
        ),
        (
            "fr_FR",
            "si c'est voulu, mettre `allow_boot_display = true` dans la table [[gpu]] de ",
            " a ouvert /dev/dri/card0 ; ",
        ),
        ("zh_CN", f"{DISCRETE} 是本机启动时使用的显示设备", " 打开了 /dev/dri/card0"),
        ("en_US", f"{DISCRETE} is the display that this machine booted on", " has /dev/dri/card0"),
    ],
)
@pytest.mark.parametrize("arguments", [("to-vfio", DISCRETE), ("plan", DISCRETE, "vfio")], ids=["to-vfio", "plan"])
async def test_a_refusal_is_worded_anew(
    start: Start, ctl: Ctl, language: str, display: str, holder: str, arguments: tuple[str, ...]
) -> None:
    await start("single", config=TABLE)
    refused = ctl(language, *arguments)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert display in refused.stderr
    assert holder in refused.stderr
    english = "booted on" in refused.stderr or " open; " in refused.stderr
    assert english is (language == "en_US")


async def test_json_is_english_in_every_language(start: Start, ctl: Ctl) -> None:
    await start("single", config=TABLE)
    told = [ctl(language, "plan", DISCRETE, "vfio", "--json") for language in ("de_DE", "en_US")]
    refusal, english = ({**json.loads(each.stdout), "at": ""} for each in told)
    assert refusal == english
    assert told[0].stderr == told[1].stderr
    assert "booted on" in refusal["error"]["text"]


async def test_a_remedy_is_worded_anew(start: Start, ctl: Ctl) -> None:
    await start("single", config=TABLE)
    heading, *rows = ctl("de_DE", "holders", DISCRETE).stdout.splitlines()
    assert "UM SIE FREIZUGEBEN" in heading
    assert any("ihn stoppen: systemctl stop " in row or "es schließen, oder: kill " in row for row in rows)
    shown = json.loads(ctl("de_DE", "holders", DISCRETE, "--json").stdout)["holders"]
    assert all("words" not in holder for holder in shown)
    assert any("stop it: systemctl stop " in h["remedy"] or "close it, or: kill " in h["remedy"] for h in shown)


async def test_a_switch_is_told_in_the_language(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=TABLE)
    there = ctl("de_DE", "to-vfio", DISCRETE)
    assert (there.returncode, there.stderr) == (0, "")
    *steps, last, stopped = there.stdout.splitlines()
    assert stopped == "  gestoppt, bis sie zurück ist: nvidia-persistenced.service"
    assert last.startswith(f"{DISCRETE} ist jetzt an vfio-pci, nach ")
    assert [line for line in steps if ": erledigt (" not in line and "warten bis " not in line] == []
    assert f"binden: {DISCRETE}" not in there.stdout
    assert f"] {DISCRETE} an vfio-pci binden: erledigt (" in there.stdout
    assert "wach halten: alle 4 Funktionen: erledigt (" in there.stdout
    assert ctl("fr_FR", "to-vfio", DISCRETE).stdout == f"{DISCRETE} est déjà sur vfio-pci\n"
    assert f"GPU: {DISCRETE}" in ctl("de_DE", "status", DISCRETE).stdout
    assert "Zustand: vfio seit " in ctl("de_DE", "status", DISCRETE).stdout
    assert "ZUSTAND" in ctl("de_DE", "list").stdout.splitlines()[0]
    assert ctl("de_DE", "to-host", DISCRETE).returncode == 0


@pytest.mark.parametrize(
    ("faults", "result", "command"),
    [
        (("unload@nvidia=EIO",), "zurückgenommen", "to-vfio"),
        # It is on its drivers, and a module that was loaded is not.
        (("unload@nvidia=EIO", "load@nvidia=EIO"), "fehlgeschlagen", "to-host"),
    ],
)
async def test_after_a_failure_stands_what_to_type(
    start: Start, ctl: Ctl, faults: tuple[str, ...], result: str, command: str
) -> None:
    await start("laptop", *faults, config=TABLE)
    failed = ctl("de_DE", "to-vfio", DISCRETE)
    assert failed.returncode == 1
    first, *more, last = failed.stderr.splitlines()
    assert first.startswith(f"gpuswitchctl: nicht möglich ({DISCRETE} auf vfio umschalten), {result}: ")
    [what] = [each for each in more if each.startswith("  herausfinden, warum '")]
    assert what.endswith(" entladen' nicht ging:")
    assert last == f"  dann: gpuswitchctl {command} {DISCRETE}"
    assert f"  {result}  " in ctl("de_DE", "history").stdout
    assert "nvidia entladen" in ctl("de_DE", "show").stdout
    assert "nicht möglich (nvidia entladen): " in ctl("de_DE", "show").stdout


async def test_an_error_without_data_is_told_in_the_language(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=TABLE)
    refused = ctl("de_DE", "status", "radeon")
    assert refused.returncode == 2
    assert "keine GPU heißt 'radeon'; dieser Host hat 0000:00:02.0, 0000:01:00.0" in refused.stderr


def test_faults_of_the_configuration_are_told_in_the_language(ctl: Ctl, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[deadlines]\nunbnid = 3\nunbind = "5s"\n[[gpu]]\naddress = "01:00.0"\nname = "a b"\n')
    assert ctl("de_DE", "config", "check", str(tmp_path)).stderr.splitlines() == [
        f"{file}:2: deadlines.unbnid: diesen Schlüssel gibt es nicht; gemeint war unbind?",
        (
            f"{file}:3: deadlines.unbind: muss sein: eine Zahl von Sekunden über 0 und höchstens 600, ohne "
            "Anführungszeichen, nicht '5s'; schreiben: 5"
        ),
        (
            f"{file}:6: gpu[0000:01:00.0].name: 'a b' ist kein Name; höchstens 32 davon: Buchstaben, Ziffern, '.', "
            "'_', '-', und zuerst ein Buchstabe oder eine Ziffer"
        ),
    ]
    file.write_text('[[gpu]]\naddress = "01:00.0\n')
    said = ctl("fr_FR", "config", "check", str(tmp_path)).stderr
    assert said.startswith(f"{file}:2:19: ce n'est pas du TOML : ")
    assert said.endswith("un guillemet ouvert ici n'est pas fermé : en manque-t-il un ?\n")


async def test_what_a_function_is_and_what_was_asked_for_is_told_in_the_language(start: Start, ctl: Ctl) -> None:
    await start("laptop", config=TABLE)
    assert f"{DISCRETE} Anzeige an nvidia" in ctl("de_DE", "status", DISCRETE).stdout
    assert "affichage [0300]" in ctl("fr_FR", "groups").stdout
    assert ctl("de_DE", "to-vfio", DISCRETE, "--wait", "60").returncode == 0
    assert "Warten in Sekunden: 60" in ctl("de_DE", "show").stdout
    assert "es gibt: 1 erledigt (--result done)" in ctl("de_DE", "history", "--result", "failed").stdout


def test_a_service_that_is_not_there_is_told_in_the_language(ctl: Ctl) -> None:
    assert "start" in ctl("en_US", "list").stderr
    refused = ctl("de_DE", "list")
    assert refused.returncode == 5
    assert refused.stderr.startswith(
        "gpuswitchctl: nicht möglich (die GPUs auflisten): der Dienst gpuswitch ist nicht "
    )
