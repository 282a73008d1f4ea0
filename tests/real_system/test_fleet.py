"""The collection for Ansible, with the release's own: hosts that are reached by ssh, each with simulated GPUs."""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.fleet import FOLDER, NO_SSH_BY_ITSELF, Fleet, find_below, require_inotify
from tests.harness.containers.network import Network, address_of
from tests.harness.containers.packaged import NEXT, THIS, find_packaged
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, ctl, history, prop, show, simulated
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.package import NEWER_VERSION
from tests.harness.debian.progress import progress
from tests.harness.debian.project import PIP_SETTINGS
from tests.harness.debian.releases import find_release
from tests.harness.machines.errors import Result
from tests.real_system.conftest import BUS, RELEASE, Boot

pytestmark = pytest.mark.beside

WEDGED = ("unbind=hang",)
WIN11 = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
CONFIG = f'[[gpu]]\naddress = "{GPU}"\nname = "spare"\nallow_boot_display = true\n[deadlines]\nunbind = 0.2\n'

THERE_AND_BACK = """\
- name: There and back
  hosts: gpu_hosts
  gather_facts: false
  tasks:
    - name: To vfio
      gpuswitch.gpuswitch.gpu: {state: vfio, gpu: all}
    - name: To the host
      gpuswitch.gpuswitch.gpu: {state: host, gpu: spare}
"""

MAINTENANCE = """\
- name: Look where the GPU is meanwhile
  ansible.builtin.shell: gpuswitchctl list | grep -o vfio | head -n1 | tr -d '\\n' >/srv/maintained
- name: Fail where it is to
  ansible.builtin.command: test ! -e /srv/fails
"""

CARDS = ("0000:01:00.0", "0000:41:00.0")
TWO_CARDS = "".join(f'[[gpu]]\naddress = "{card}"\n' for card in CARDS) + "[deadlines]\nunbind = 0.2\n"
"""Of the simulated host `workstation`."""

LIBVIRT = """\
[Service]
ExecStart=/bin/sleep infinity
ExecReload=/bin/touch /srv/reloaded
"""
"""A libvirt that says when it was to look for its hooks."""

Host = Callable[..., Container]
"""`host(*faults, scenario=...)`: a machine with the service and ssh, on a simulated host."""


@pytest.fixture(scope="session")
def below(request: pytest.FixtureRequest) -> Path:
    return find_below(Cache(default_folder(), progress(request.config)), find_release(RELEASE))


@pytest.fixture
def host(boot: Boot, system: System, below: Path) -> Host:
    def host(*faults: str, scenario: str = "laptop", config: str = CONFIG) -> Container:
        files = simulated(*faults, scenario=scenario) | NO_SSH_BY_ITSELF | {"/etc/gpuswitch/config.toml": config}
        return boot((*system.installed, below), files)

    return host


@pytest.fixture
def fleet(boot: Boot, system: System, below: Path) -> Iterator[Fleet]:
    with Network() as network:
        yield Fleet(boot((system.root, below), NO_SSH_BY_ITSELF), network)


def report(said: str) -> dict[str, str]:
    """What the callback says of each host."""
    return dict(re.findall(r"^(\w+) *: (.*)$", said.partition("GPUS **")[2], re.MULTILINE))


def told(said: str) -> dict[str, Any]:
    """What a module returned that `ansible` ran."""
    return dict(json.loads(said[said.index("=> {") + 3 :]))


def plain(told: Any) -> str:
    """A text that ansible-inventory shows: from 2.22 on it says beside it that it is no template."""
    return str(told["__ansible_unsafe"] if isinstance(told, dict) else told)


def test_maintenance_stops_at_the_first_host_where_something_goes_wrong(fleet: Fleet, host: Host) -> None:
    """Hosts that cannot be reached or have nothing to move are left out; cards go back where it failed, too."""
    good = host()
    two = host("unbind@0000:41:00.1#2=hang", scenario="workstation", config=TWO_CARDS)
    for name, machine in {"away": None, "bare": host(config=""), "good": good, "two": two, "last": None}.items():
        fleet.add(name, machine)
    fleet.controller.push(MAINTENANCE, f"{FOLDER}/maintenance.yml")

    def roll(*names: str) -> dict[str, str]:
        words = f"gpuswitch.gpuswitch.rolling -e maintenance={FOLDER}/maintenance.yml --limit {','.join(names)}"
        done = fleet.run(f"ansible-playbook {words}", check=False)
        assert done.status != 0
        return report(done.stdout)

    # One card does not come back: the other one does.
    two.sh("touch /srv/fails")
    said = roll("away", "bare", "good", "two", "last")
    assert said.pop("away").startswith("unreachable: ")
    wedged = said.pop("two")
    assert wedged.startswith(
        "wedged: 0000:41:00.0: the kernel has not returned from 'unbind 0000:41:00.1 from vfio-pci'"
    )
    assert wedged.endswith("; before that: 0000:01:00.0 to vfio, 0000:41:00.0 to vfio, 0000:01:00.0 to host")
    assert said == {"bare": "as it was", "good": "moved: spare to vfio, spare to host", "last": "not begun"}
    assert [prop(two, "State", card) for card in CARDS] == ["host", "wedged"]
    assert good.read("/srv/maintained") == "vfio"

    # A maintenance that fails is enough to stop.
    good.sh("touch /srv/fails")
    said = roll("good", "last")
    failed = said.pop("good")
    assert failed.startswith("failed: ")
    assert "non-zero return code" in failed  # in words of Ansible's release
    assert failed.endswith("; before that: spare to vfio, spare to host")
    assert said == {"last": "not begun"}
    assert prop(good, "State") == "host"

    # A GPU that a virtual machine has is where a drain would have it, and in use.
    ctl(good, f"acquire --name win11 --uuid {WIN11} {GPU}")
    before = history(good)
    owned = f"failed: {GPU} is owned by win11; shut that down before maintenance begins"
    assert roll("good", "last") == {"good": owned, "last": "not begun"}
    assert history(good) == before


@pytest.mark.campaign
@pytest.mark.parametrize("count", [4, 20])
def test_one_play_moves_all_gpus_there_and_back_and_says_what_became_of_each(
    fleet: Fleet, host: Host, count: int
) -> None:
    """One of the hosts is wedged: maintenance stops there. One cannot be reached: that leaves it out."""
    require_inotify(count)
    first, *others = good = [f"good{number}" for number in range(count - 2)]
    machines = {name: host(*(WEDGED if name == "wedged" else ())) for name in (*good, "wedged")}
    for name in (first, "away", "wedged", *others):
        fleet.add(name, machines.get(name))

    # What would be done is the service's own plan.
    planned = fleet.ask("good0", "gpu", "state=vfio gpu=all", "--check --diff")
    assert planned.status == 0
    assert "CHANGED" in planned.stdout
    for number, driver in enumerate(("nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu")):
        assert f'-        "0000:01:00.{number}": "{driver}"' in planned.stdout
        assert f'+        "0000:01:00.{number}": "vfio-pci"' in planned.stdout
    assert prop(machines["good0"], "State") == "host"

    done = fleet.play(THERE_AND_BACK, check=False, timeout=600)
    said = report(done.stdout)
    assert said.keys() == {*machines, "away"}
    assert {said[name] for name in good} == {"moved: spare to vfio, spare to host"}
    assert said["wedged"].startswith(f"wedged: spare ({GPU}): the kernel has not returned from 'unbind")
    assert said["away"].startswith("unreachable: ")
    assert done.status != 0
    for name in good:
        assert history(machines[name]) == [("host", "done"), ("vfio", "done")]
        assert prop(machines[name], "State") == "host"
    assert prop(machines["wedged"], "State") == "wedged"

    # What is there already is left alone.
    again = fleet.ask("good0", "gpu", "state=host gpu='RTX 3070'", "--diff")
    assert "SUCCESS" in again.stdout
    assert len(history(machines["good0"])) == 2

    fleet.controller.push(MAINTENANCE, f"{FOLDER}/maintenance.yml")
    rolling = f"gpuswitch.gpuswitch.rolling -e maintenance={FOLDER}/maintenance.yml"
    checked = report(fleet.run(f"ansible-playbook {rolling} --check --limit {first}").stdout)
    assert checked == {first: "would move: spare to vfio"}
    assert len(history(machines[first])) == 2
    stopped = fleet.run(f"ansible-playbook {rolling}", check=False)
    assert stopped.status != 0
    said = report(stopped.stdout)
    assert said.pop("away").startswith("unreachable: ")
    assert said.pop(first) == "moved: spare to vfio, spare to host"
    assert said.pop("wedged").endswith(f"{GPU}: wedged; it is to be in a known-good state before maintenance begins")
    assert said == dict.fromkeys(others, "not begun")
    assert machines[first].read("/srv/maintained") == "vfio"
    assert [len(history(machines[name])) for name in good] == [4, *[2 for _ in others]]

    # Going on behind the host that it stopped at, as docs/fleet.md says; two of them will do.
    fleet.run(
        f"ansible gpu_hosts --list-hosts | sed 1d | tr -d ' ' | sed '1,/^wedged$/d' | head -n 2 >{FOLDER}/rest.txt"
    )
    rest = report(fleet.run(f"ansible-playbook {rolling} --limit @{FOLDER}/rest.txt").stdout)
    assert rest == dict.fromkeys(others[:2], "moved: spare to vfio, spare to host")


@pytest.mark.campaign
def test_what_is_asked_wrongly_is_one_sentence_and_changes_nothing(fleet: Fleet, host: Host) -> None:
    machine = host(scenario="workstation", config="")
    fleet.add("node", machine)
    first, second = "0000:01:00.0", "0000:41:00.0"
    cards = (
        f"{first}, NVIDIA Corporation GA102 [GeForce RTX 3090], {second}, NVIDIA Corporation GA102 [GeForce RTX 3090]"
    )
    machine.push('#!/bin/sh\necho \'{"version": 2, "gpus": []}\'\n', "/srv/newer", mode=0o755)
    machine.push("#!/bin/sh\necho 'Illegal instruction' >&2\nexit 132\n", "/srv/broken", mode=0o755)
    asked: Mapping[str, Mapping[str, object]] = {
        "'09:00.0' is no GPU of this host: this host has 0000:01:00.0, NVIDIA": {"gpu": "09:00.0"},
        f"the model 'rtx 3090' is that of 2 GPUs of this host; name one by its address: {cards}": {"gpu": "rtx 3090"},
        "this host has 3 GPUs: say which, by `gpu`: ": {},
        "`all` is no GPU of this host: none has a [[gpu]] table in its configuration": {"gpu": "all"},
        "value of busy must be one of: refuse, wait, terminate, kill, got: please": {"gpu": first, "busy": "please"},
        "wait takes seconds, not -3": {"gpu": first, "wait": -3},
        "leave out busy": {"state": "recovered", "gpu": first, "busy": "kill"},
        "cannot find /nowhere/gpuswitchctl on this host": {"gpu": first, "executable": "/nowhere/gpuswitchctl"},
        "its JSON has version 2, and this collection reads version 1": {"gpu": first, "executable": "/srv/newer"},
        "ended with status 132 and printed no JSON that this collection knows: Illegal instruction": {
            "gpu": first,
            "executable": "/srv/broken",
        },
    }
    tasks = [
        {"gpuswitch.gpuswitch.gpu": {"state": "vfio", **arguments}, "register": f"told{number}", "ignore_errors": True}
        for number, arguments in enumerate(asked.values())
    ]
    answers = "{{ [" + ", ".join(f"told{number}" for number in range(len(asked))) + "] | to_json }}"
    keep = {"ansible.builtin.copy": {"content": answers, "dest": "/srv/answers"}}
    fleet.play(json.dumps([{"hosts": "node", "gather_facts": False, "tasks": [*tasks, keep]}]))
    for sentence, answer in zip(asked, json.loads(machine.read("/srv/answers")), strict=True):
        assert answer["failed"]
        assert sentence in answer["msg"]
    blocked = told(fleet.ask("node", "gpu", "state=vfio gpu=62:00.0", "--check").stdout)
    [blocker] = blocked["blockers"]
    assert (blocker["gpu"], blocker["kind"]) == ("0000:62:00.0", "boot_display")
    assert blocker["text"] in blocked["msg"]
    machine.sh("systemctl mask --now --runtime gpuswitchd")
    assert "gpuswitchctl list: " in told(fleet.ask("node", "gpu_info").stdout)["msg"]
    machine.sh("systemctl unmask --runtime gpuswitchd; systemctl start gpuswitchd")
    assert history(machine) == []
    assert [gpu["state"] for gpu in told(fleet.ask("node", "gpu_info").stdout)["gpus"]] == ["host"] * 3


@pytest.mark.campaign
def test_hosts_are_grouped_by_what_their_gpus_are(fleet: Fleet, host: Host) -> None:
    machine = host()
    fleet.add("node", machine)
    fleet.add("bare", bare := host())
    fleet.add("away", None)
    # which can be reached by what a file of variables says, and is `node`
    fleet.add("told", None)
    fleet.controller.push(f"ansible_host: {address_of(2)}\n", f"{FOLDER}/host_vars/told.yml")
    bare.sh("rm /usr/local/bin/gpuswitchctl")
    ctl(machine, f"acquire --name win11 --uuid {WIN11} {GPU}")
    fleet.controller.push(
        "plugin: gpuswitch.gpuswitch.gpus\ngroup: gpu_hosts\ntimeout: 5\n", f"{FOLDER}/lab.gpuswitch.yml"
    )
    ask = f"ansible-inventory -i {FOLDER}/hosts.yml -i {FOLDER}/lab.gpuswitch.yml"
    groups = json.loads(fleet.run(f"{ask} --list").stdout)
    assert {name: group["hosts"] for name, group in groups.items() if name.startswith("gpu") and "hosts" in group} == {
        "gpu_hosts": ["node", "bare", "away", "told"],
        "gpu_model_geforce_rtx_3070": ["node", "told"],
        "gpu_model_iris_xe_graphics": ["node", "told"],
        "gpu_owned": ["node", "told"],
        "gpu_owner_win11": ["node", "told"],
        "gpu_state_host": ["node", "told"],
        "gpu_state_vfio": ["node", "told"],
        "gpuswitch_unavailable": ["bare"],
        "gpuswitch_unreachable": ["away"],
    }
    variables = groups["_meta"]["hostvars"]
    assert [plain(gpu["state"]) for gpu in variables["node"]["gpuswitch_gpus"]] == ["host", "vfio"]
    assert "gpuswitchctl" in plain(variables["bare"]["gpuswitch_reason"])
    assert plain(variables["away"]["gpuswitch_reason"])
    # what ssh is told is what Ansible's own connections would tell it
    misled = fleet.run(f"{ask} --host node", ANSIBLE_SSH_ARGS="-F /nowhere")
    assert "/nowhere" in plain(json.loads(misled.stdout)["gpuswitch_reason"])


@pytest.mark.campaign
def test_a_host_is_made_from_nothing_and_nothing_is_done_twice(
    fleet: Fleet, boot: Boot, system: System, below: Path
) -> None:
    machine = boot((*system.bare, below), simulated() | NO_SSH_BY_ITSELF)
    fleet.add("node", machine)
    sources, copy = "/usr/src/gpuswitch", f"{FOLDER}/checkout"
    machine.sh(f"useradd kim; mv {sources}/wheels /srv/wheels; mkdir -p /etc/libvirt/hooks")
    machine.push(LIBVIRT, "/etc/systemd/system/libvirtd.service")
    machine.sh("systemctl daemon-reload; systemctl start libvirtd")
    # as a checkout on the machine with Ansible
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "checkout.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(system.sources / sources[1:], ".", filter=lambda entry: None if "wheels" in entry.name else entry)
        fleet.controller.push(archive.read_bytes(), f"{copy}.tar")
    fleet.controller.sh(f"mkdir {copy}; tar -xf {copy}.tar -C {copy}")

    variables: dict[str, Any] = {
        "gpuswitch_install": "checkout",
        "gpuswitch_checkout": copy,
        "gpuswitch_install_environment": {**PIP_SETTINGS, "PIP_FIND_LINKS": "/srv/wheels"},
        "gpuswitch_gpus": [{"address": GPU, "name": "spare", "at_boot": "keep", "match": {"vendor": "10de"}}],
        "gpuswitch_settings": {"metrics": {"port": 9753}, "deadlines": {"unbind": 7}},
        "gpuswitch_users": ["kim"],
        "gpuswitch_prometheus_host": "node",
        "gpuswitch_prometheus_labels": {"rack": "1"},
    }

    def play(options: str = "", **others: Any) -> Result:
        role = {"role": "gpuswitch.gpuswitch.host"}
        text = json.dumps([{"hosts": "gpu_hosts", "gather_facts": False, "roles": [role], "vars": variables | others}])
        return fleet.play(text, options, check=False, timeout=600)

    checked = play("--check")
    assert checked.status == 0, checked.stdout
    assert machine.sh("ls /usr/local/bin /usr/local/src /etc/gpuswitch 2>/dev/null", check=False).stdout.split() == [
        "/usr/local/bin:",
        "/usr/local/src:",
    ]

    # libvirt hears of its hook also where the role ends before the service runs
    refused = play(gpuswitch_gpus=[{"address": GPU, "busy": "please"}])
    assert refused.status != 0
    assert machine.sh("test -e /srv/reloaded", check=False).status == 0, refused.stdout

    made = play()
    assert made.status == 0, made.stdout
    assert show(machine, "ActiveState") == "active"
    assert prop(machine, "Name") == "spare"
    assert "kim" in machine.sh("getent group gpuswitch").stdout
    assert machine.sh("test -x /etc/libvirt/hooks/qemu.d/50-gpuswitch").status == 0
    [target] = json.loads(machine.read("/etc/prometheus/gpuswitch/node.json"))
    assert (target["targets"], target["labels"]) == ([f"{address_of(2)}:9753"], {"rack": "1"})
    assert re.search(r"node .*changed=0 .*failed=0", play().stdout)

    # A configuration that the service would refuse does not come in, and the sentence names the key.
    before = machine.read("/etc/gpuswitch/config.toml")
    refused = play(gpuswitch_gpus=[{"address": GPU, "busy": "please"}])
    assert refused.status != 0
    assert "busy" in refused.stdout
    assert machine.read("/etc/gpuswitch/config.toml") == before
    # The service reads a new configuration though the role fails after it.
    renamed = [{"address": GPU, "name": "renamed"}]
    nobody = play(gpuswitch_users=["nobody-here"], gpuswitch_gpus=renamed)
    assert prop(machine, "Name") == "renamed"
    assert "nobody-here of gpuswitch_users is no user of this host" in nobody.stdout
    assert machine.sh("getent passwd nobody-here", check=False).status != 0


@pytest.mark.campaign
def test_a_package_is_installed_once_and_upgraded_where_there_is_a_newer_one(
    fleet: Fleet, boot: Boot, below: Path, request: pytest.FixtureRequest
) -> None:
    """A file on the machine with Ansible; then, on a host with nothing but Python, its own archive."""
    cache, release = Cache(default_folder(), progress(request.config)), find_release(RELEASE)
    systems = find_packaged(cache, release, BUS)
    settings = simulated(program="/usr/bin/gpuswitchd") | NO_SSH_BY_ITSELF
    by_file = boot((systems.root, below), settings)
    fleet.add("by_file", by_file)
    this, newer = (f"{FOLDER}/{package.rpartition('/')[2]}" for package in (THIS, NEXT))
    for package, place in ((THIS, this), (NEXT, newer)):
        fleet.controller.push((systems.packages / package[1:]).read_bytes(), place)

    def play(package: str, options: str = "", **others: Any) -> tuple[int, str]:
        """How many tasks changed something, and what was said; -1: it failed."""
        role = {"role": "gpuswitch.gpuswitch.host"}
        gpus = [{"address": GPU, "name": "spare"}]
        variables = {"gpuswitch_package": package, "gpuswitch_gpus": gpus, **others}
        text = json.dumps([{"hosts": "gpu_hosts", "gather_facts": False, "roles": [role], "vars": variables}])
        done = fleet.play(text, options, check=False, timeout=600)
        [changed] = re.findall(r"^by_\w+ .* changed=(\d+) ", done.stdout, re.MULTILINE)
        return (-1 if done.status else int(changed)), done.stdout

    def version(machine: Container) -> str:
        return machine.sh("dpkg-query -W -f '${Version}' gpuswitch", check=False).stdout

    assert play(this, "--check")[0] > 0
    assert version(by_file) == ""
    changed, said = play(this)
    assert changed > 0, said
    assert (show(by_file, "ActiveState"), prop(by_file, "Name")) == ("active", "spare")
    first = version(by_file)
    assert play(this)[0] == 0
    # what somebody else removed meanwhile
    by_file.sh("DEBIAN_FRONTEND=noninteractive apt-get --yes remove gpuswitch")
    assert play(this)[0] > 0
    assert show(by_file, "ActiveState") == "active"

    assert play(newer, "--check")[0] > 0
    assert version(by_file) == first
    assert play(newer)[0] > 0
    assert (version(by_file), prop(by_file, "Name")) == (NEWER_VERSION, "spare")
    assert play(newer)[0] == 0
    changed, said = play(this)
    assert changed == -1
    refused = f"this host has {NEWER_VERSION}, which is newer than {first}; to go back, set gpuswitch_downgrade to true"
    assert refused in said
    assert version(by_file) == NEWER_VERSION
    assert play(this, gpuswitch_downgrade=True)[0] > 0
    assert version(by_file) == first
    assert show(by_file, "ActiveState") == "active"
