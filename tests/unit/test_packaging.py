"""What the ways of installing say alike: files, versions, requirements. tests/real_system/test_packages.py installs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gpuswitch import __version__
from tests.unit.test_house import ROOT

CONTRIB = ROOT / "contrib"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {
    "requirements.lock": PROJECT["project"]["dependencies"],
    "build.lock": PROJECT["build-system"]["requires"],
}
MACROS = {
    "_bindir": "/usr/bin",
    "_datadir": "/usr/share",
    "_exec_prefix": "/usr",
    "_journalcatalogdir": "/usr/lib/systemd/catalog",
    "_mandir": "/usr/share/man",
    "_sysusersdir": "/usr/lib/sysusers.d",
    "_unitdir": "/usr/lib/systemd/system",
    "_userunitdir": "/usr/lib/systemd/user",
}
"""Of RPM, on Fedora."""


def install_sh(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CONTRIB / "install.sh", *arguments],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    done = install_sh("stage", DESTDIR=str(tmp_path), PREFIX="/usr", HOOK="/usr/lib/python/gpuswitch/hook.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return tmp_path


def test_a_stage_has_no_place_left_open_and_none_of_an_administrator(staged: Path) -> None:
    files = [path for path in staged.rglob("*") if path.is_file()]
    # in a catalog, @GPU@ is a field of the journal
    documents = staged / "usr/share/doc"
    texts = {
        path: path.read_text() for path in files if path.suffix != ".catalog" and not path.is_relative_to(documents)
    }
    assert [path for path, text in texts.items() if re.search(r"@\w+@|/usr/local", text)] == []
    assert "ExecStart=/usr/bin/gpuswitchd\n" in (staged / "usr/lib/systemd/system/gpuswitchd.service").read_text()
    assert "hook='/usr/lib/python/gpuswitch/hook.py'\n" in (staged / "usr/lib/gpuswitch/libvirt-hook").read_text()
    script = (staged / "usr/share/gpuswitch/proxmox/gpuswitch-hookscript").read_text()
    assert "\nhook='/usr/lib/python/gpuswitch/proxmox_hook.py'\n" in script
    programs = {path.name for path in files if path.stat().st_mode & 0o111}
    assert programs == {"maintain", "libvirt-hook", "gpuswitch-hookscript", "features", "health", "prolog"}
    for name in ("features", "health", "prolog"):
        script = (staged / "usr/share/gpuswitch/slurm" / name).read_text()
        assert f"/usr/lib/python/gpuswitch/slurm_hook.py {name}" in script


def test_what_an_alert_and_a_document_lead_to_is_there(staged: Path) -> None:
    documents = staged / "usr/share/doc/gpuswitch"
    rules = (staged / "usr/share/gpuswitch/prometheus/gpuswitch.rules.yml").read_text()
    runbooks = re.findall(r"runbook: ([^#\n]+)#", rules)
    assert {(documents / each).is_file() for each in runbooks} == {True}
    pages = [path for path in documents.rglob("*.md") if path.parent.name != "adr"]
    links = {
        (path.parent / link).resolve()
        for path in pages
        for link in re.findall(r"\]\(([^)#:]+\.(?:md|svg|webp|json|xml))", path.read_text())
    }
    assert [str(each) for each in links if not each.is_file()] == []
    assert {path.stat().st_mode & 0o777 for path in documents.rglob("*") if path.is_file()} == {0o644}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"HOOK": "/hook.py"}, "cannot stage: DESTDIR is the folder to put the files in\n"),
        (
            {"DESTDIR": "/nowhere", "HOOK": "/hook.py", "COCKPIT": "/nowhere"},
            "cannot stage: '/nowhere' has no page for Cockpit; 'make cockpit' builds it\n",
        ),
        ({"DESTDIR": "/nowhere"}, "cannot stage: HOOK is the path that gpuswitch/hook.py will have\n"),
    ],
)
def test_a_stage_that_lacks_a_place_is_refused(env: dict[str, str], said: str) -> None:
    done = install_sh("stage", PREFIX="/usr", **env)
    assert (done.returncode, done.stderr) == (1, said)


def test_a_stage_has_the_page_for_cockpit_where_it_is_told_of_one(tmp_path: Path) -> None:
    """Byte by byte: compressed files have no places to fill in."""
    page, stage = tmp_path / "page", tmp_path / "stage"
    page.mkdir()
    files = {"manifest.json": b"{}", "index.js.gz": bytes(range(256)) + b"@bindir@"}
    for name, content in files.items():
        (page / name).write_bytes(content)
    done = install_sh("stage", DESTDIR=str(stage), PREFIX="/usr", HOOK="/hook.py", COCKPIT=str(page))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (stage / "usr/share/applications/gpuswitch.desktop").is_file()
    there = stage / "usr/share/cockpit/gpuswitch"
    assert {path.name: path.read_bytes() for path in there.iterdir()} == files
    assert {path.stat().st_mode & 0o777 for path in there.iterdir()} == {0o644}


def test_npm_fetches_by_hash_and_from_wherever_the_machine_does() -> None:
    text = (CONTRIB / "cockpit/package-lock.json").read_text()
    packages = {name: each for name, each in json.loads(text)["packages"].items() if name}
    assert packages
    assert [name for name, each in packages.items() if "resolved" in each or "integrity" not in each] == []


def test_the_desktop_entry_is_one() -> None:
    """It is shown where Cockpit is, and opens the page there."""
    entry = CONTRIB / "desktop/gpuswitch.desktop"
    done = subprocess.run(["desktop-file-validate", entry], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines = entry.read_text().splitlines()
    assert {"TryExec=cockpit-bridge", "Exec=xdg-open https://localhost:9090/gpuswitch"} <= set(lines)


@pytest.mark.parametrize("with_page", [False, True])
def test_the_rpm_has_what_is_staged(staged: Path, tmp_path: Path, *, with_page: bool) -> None:
    """The spec names each file; the other recipes take all that is there."""
    listed = (CONTRIB / "rpm/gpuswitch.spec").read_text().partition("%files")[2].partition("%changelog")[0]
    if with_page:
        staged = tmp_path / "stage"
        page = tmp_path / "page"
        page.mkdir()
        (page / "manifest.json").write_text("{}")
        places = {"DESTDIR": str(staged), "HOOK": "/usr/lib/python/gpuswitch/hook.py", "COCKPIT": str(page)}
        assert install_sh("stage", PREFIX="/usr", **places).returncode == 0
    else:
        listed = re.sub(r"^%if %\{with cockpit\}\n.*?^%endif\n", "", listed, flags=re.M | re.S)
    paths = {
        re.sub(r"%\{(\w+)\}", lambda macro: MACROS[macro[1]], line) for line in re.findall(r"^[%/]\S+/.*", listed, re.M)
    }
    # its programs are made of pyproject.toml; manual pages are compressed
    named = {path.rstrip("*") for path in paths if not path.startswith("/usr/bin/")}
    there = {f"/{path.relative_to(staged)}" for path in staged.rglob("*") if path.is_file()}
    folders = ("/usr/lib/gpuswitch/", "/usr/share/cockpit/gpuswitch/", "/usr/share/doc/gpuswitch/")
    whole = {next((folder for folder in folders if path.startswith(folder)), path) for path in there}
    assert whole == named


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("arch/PKGBUILD", "pkgver={}"),
        ("rpm/gpuswitch.spec", "Version:        {}"),
        ("nix/module.nix", '    version = "{}";'),
    ],
)
def test_recipes_are_of_this_version(recipe: str, line: str) -> None:
    assert line.format(__version__) in (CONTRIB / recipe).read_text().splitlines()


def test_what_nix_takes_of_a_checkout_is_enough_to_stage(tmp_path: Path) -> None:
    """`src` of the module; what hatchling reads besides stands in pyproject.toml."""
    recipe = (CONTRIB / "nix/module.nix").read_text()
    taken = [CONTRIB / "nix" / path for path in re.findall(r"^        (\.\./\.\./\S+)$", recipe, re.M)]
    source = tmp_path / "source"
    for path in taken:
        target = source / path.resolve().relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        run = shutil.copytree if path.is_dir() else shutil.copy2
        run(path, target)
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= {path.name for path in taken}
    done = subprocess.run(
        [source / "contrib/install.sh", "stage"],
        env={"PATH": os.environ["PATH"], "DESTDIR": str(tmp_path / "stage"), "PREFIX": "/usr", "HOOK": "/hook.py"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def names(requirements: list[str]) -> set[str]:
    return {Requirement(each).name for each in requirements}


@pytest.mark.parametrize(
    ("recipe", "pattern"),
    [
        ("arch/PKGBUILD", r"'python-([\w-]+)'"),
        ("nix/module.nix", r"^      ([\w-]+)$"),
    ],
)
def test_recipes_ask_for_all_libraries(recipe: str, pattern: str) -> None:
    found = {name.replace("_", "-") for name in re.findall(pattern, (CONTRIB / recipe).read_text(), re.M)}
    assert names(LOCKS["requirements.lock"]) - found == set()


def pinned(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (CONTRIB / lock).read_text(), re.M))


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_has_a_version_that_will_do_of_all_that_is_asked_for(lock: str) -> None:
    """`make lock` writes it anew."""
    versions = pinned(lock)
    asked = [Requirement(each) for each in LOCKS[lock]]
    assert [str(each) for each in asked if not each.specifier.contains(versions.get(each.name, "0"))] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_has_hashes_and_names_no_index(lock: str) -> None:
    text = (CONTRIB / lock).read_text()
    parts = text.replace("\\\n", "").splitlines()
    assert parts != []
    assert [
        part for part in parts if not re.fullmatch(r"[\w.-]+==\S+( ; [^:]+)?(\s+--hash=sha256:[0-9a-f]{64})+", part)
    ] == []


def test_the_prometheus_client_of_debian_14_will_do() -> None:
    [asked] = [Requirement(each) for each in LOCKS["requirements.lock"] if each.startswith("prometheus-client")]
    assert asked.specifier.contains("0.21.1")


def maintain_functions(commands: str) -> str:
    """What these say with the functions of maintain.sh, with other places than those of the system."""
    functions = (CONTRIB / "maintain.sh").read_text().partition("\ncase ")[0]
    done = subprocess.run(["sh", "-c", f"{functions}\n{commands}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_gpus_that_are_away_are_those_that_have_a_page(tmp_path: Path) -> None:
    """The journal's folder has more: the note of the boot, pages that are set aside, room that is kept."""
    names = ("0000_01_00_0.json", "10000_e1_1f_7.json", "at_boot.json", "0000_02_00_0.bad", "0000_01_00_0.spare")
    for name in names:
        (tmp_path / name).touch()
    assert maintain_functions(f"journal='{tmp_path}'; away") == "0000:01:00.0\n10000:e1:1f.7\n"


@pytest.mark.parametrize("others", [[], ["10-mine"]])
def test_our_hook_goes_with_its_folder_where_that_has_nothing_else(tmp_path: Path, others: list[str]) -> None:
    hooks, template = tmp_path / "hooks", tmp_path / "libvirt-hook"
    template.write_text("hook='/usr/lib/python/gpuswitch/hook.py'\n")
    places = f"hooks='{hooks}'; hook='{hooks}/qemu.d/50-gpuswitch'; template='{template}'"
    assert maintain_functions(f"{places}; put_hook") == ""
    for name in others:
        (hooks / "qemu.d" / name).touch()
    assert [path.name for path in hooks.glob("qemu.d/50-*")] == ["50-gpuswitch"]

    assert maintain_functions(f"{places}; take_hook") == ""
    left = ["qemu.d", *others] if others else []
    assert [path.name for path in sorted(hooks.rglob("*"))] == left


def test_nobody_asks_maintain_for_what_it_does_not_do() -> None:
    maintain = CONTRIB / "maintain.sh"
    done = subprocess.run([maintain, "tidy"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"cannot do 'tidy': what can be done stands at the head of {maintain}\n",
    )
    told = re.findall(r"^#   maintain (\S+)", maintain.read_text(), re.M)
    assert told == re.findall(r"^([a-z-]+)\)", maintain.read_text(), re.M)


def test_pacman_which_may_go_back_after_our_hook_says_how(tmp_path: Path) -> None:
    """It runs nothing of ours then (libalpm/trans.c, alpm_trans_commit)."""
    hook = (CONTRIB / "arch/gpuswitch-remove.hook").read_text()
    [asked] = re.findall("^Exec = /usr/lib/gpuswitch/maintain (.+)$", hook, re.M)
    # what it does before that is seen on a whole system (tests/real_system/test_packages.py)
    script = (CONTRIB / "maintain.sh").read_text().replace("\ncase ", "\nbefore_removal() { :; }\ncase ")
    (maintain := tmp_path / "maintain").write_text(script)
    done = subprocess.run(["sh", maintain, asked], capture_output=True, text=True, check=False)
    back = f"{maintain} after-installation; systemctl start gpuswitchd.service"
    assert (done.returncode, done.stdout) == (0, f"gpuswitch: should it stay after all: {back}\n")
