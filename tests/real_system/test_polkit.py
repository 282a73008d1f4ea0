"""Who may do what: real polkit, each action, root and people of every kind, with and without somebody to ask.

A method that is new is missing in these tables until it is named.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest

from tests.harness.containers.container import Container
from tests.harness.containers.people import (
    ADA,
    INA,
    KIM,
    MAX,
    NOBODY,
    Call,
    as_user,
    errors,
    move_in,
    on_terminal,
    sit_down,
)
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    AS_NOBODY,
    GPU,
    INSIDE,
    NAME,
    PYTHON,
    ROOT,
    call,
    path_of,
    prop,
    simulated,
    start_switch,
    until,
    until_state,
)
from tests.real_system.conftest import Boot

FREEDESKTOP = "org.freedesktop.DBus"
NO = f"{NAME}.Error.NotAuthorized"
PROVE = f"{FREEDESKTOP}.Error.InteractiveAuthorizationRequired"

MANAGER, GPU_INTERFACE = f"{NAME}.Manager", f"{NAME}.Gpu"
STANDARD = ("Introspectable.Introspect", "ObjectManager.GetManagedObjects", "Peer.GetMachineId", "Peer.Ping")
ACTIONS = {
    "": {
        *(f"{FREEDESKTOP}.{member}" for member in (*STANDARD, "Properties.Get", "Properties.GetAll", "Properties.Set")),
        f"{MANAGER}.GetGpu",
        f"{GPU_INTERFACE}.Wait",
    },
    "inspect": {
        *(f"{MANAGER}.{member}" for member in ("Config", "Groups", "History", "HistoryEntry", "Warnings")),
        *(f"{GPU_INTERFACE}.{member}" for member in ("Blockers", "Holders", "Plan")),
    },
    "switch": {
        *(f"{GPU_INTERFACE}.{member}" for member in ("Cancel", "ToHost", "ToVfio", "Trial")),
        f"{MANAGER}.AcquireForProcess",
    },
    "recover": {f"{GPU_INTERFACE}.Recover"},
    "manage": {f"{MANAGER}.Reload"},
    "vm": {f"{MANAGER}.{member}" for member in ("AcquireForVm", "AdoptVm", "ReleaseFromVm")},
}
"""What each method needs."""
OF_THE_DRIVER = "nvidia-persistenced.service, nvidia-powerd.service"
"""Units that a switch stops by itself."""

KILL = Call(path_of(), GPU_INTERFACE, "ToHost", "a{sv}", [{"busy": ("s", "kill")}])
STOP = Call(path_of(), GPU_INTERFACE, "ToHost", "a{sv}", [{"stop_units": ("as", ["cron.service"])}])
EXAMPLES = {
    "inspect": Call(ROOT, MANAGER, "Groups"),
    "switch": Call(path_of(), GPU_INTERFACE, "ToHost", "a{sv}", [{}]),
    "force": KILL,
    "recover": Call(path_of(), GPU_INTERFACE, "Recover", "a{sv}", [{}]),
    "manage": Call(ROOT, MANAGER, "Reload"),
    "vm": Call(ROOT, MANAGER, "ReleaseFromVm", "sss", ["win11", "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "shutdown"]),
}
"""A call for each action; where it is let through, nothing changes."""
OF_EVERYBODY = {"inspect": "", "switch": PROVE, "force": PROVE, "recover": PROVE, "manage": PROVE, "vm": NO}
ALLOWED = {
    "root": dict.fromkeys(EXAMPLES, ""),
    ADA: OF_EVERYBODY,
    MAX: OF_EVERYBODY | {"switch": ""},
    KIM: OF_EVERYBODY,
    INA: OF_EVERYBODY,
    NOBODY: OF_EVERYBODY,
}
"""What each call is answered with, where nobody is there to be asked."""


@pytest.fixture
def machine(boot: Boot, system: System) -> Container:
    """With all these people; two of them sit at it, one in front."""
    machine = boot(system.installed, simulated())
    move_in(machine)
    sit_down(machine, KIM, INA)
    return machine


def arguments(signature: str) -> Iterator[object]:
    """The emptiest there are, of a GPU."""
    empty: dict[str, object] = {"s": "", "u": 0, "x": 0, "d": 0.0, "as": [GPU], "a{sv}": {}, "v": ("s", "")}
    while signature:
        first = next(each for each in sorted(empty, key=len, reverse=True) if signature.startswith(each))
        yield empty[first]
        signature = signature.removeprefix(first)


def methods(machine: Container) -> dict[str, Call]:
    """A call of every method that the service shows."""
    found = {}
    for path in (ROOT, path_of()):
        [text] = call(machine, path, f"{FREEDESKTOP}.Introspectable.Introspect")
        for interface in ET.fromstring(text).iterfind("interface"):  # noqa: S314 -- our own service wrote it
            for method in interface.iterfind("method"):
                name = interface.attrib["name"], method.attrib["name"]
                signature = "".join(arg.attrib["type"] for arg in method.iterfind("arg[@direction='in']"))
                found[".".join(name)] = Call(path, *name, signature, [*arguments(signature)])
    return found


def refused(machine: Container, calls: dict[str, Call], name: str) -> set[str]:
    said = errors(machine, name, [*calls.values()])
    return {method for method, error in zip(calls, said, strict=True) if error in {NO, PROVE}}


def test_each_method_is_open_or_needs_an_action(machine: Container) -> None:
    """Also where a call leaves it to the service which interface is meant."""
    calls = methods(machine)
    assert calls.keys() == set().union(*ACTIONS.values())
    closed = calls.keys() - ACTIONS[""] - ACTIONS["inspect"]
    assert refused(machine, calls, NOBODY) == closed
    unnamed = {name: each._replace(interface="") for name, each in calls.items()}
    assert refused(machine, unnamed, NOBODY) == closed
    assert refused(machine, calls, MAX) == closed - ACTIONS["switch"]
    assert refused(machine, calls, "root") == set()


def test_what_each_may_do_where_nobody_is_asked(machine: Container) -> None:
    for name, allowed in ALLOWED.items():
        said = errors(machine, name, [*EXAMPLES.values()])
        assert (name, dict(zip(EXAMPLES, said, strict=True))) == (name, allowed)
    assert prop(machine, "State") == "host"


def test_a_caller_that_allows_questions_where_there_is_no_agent(machine: Container) -> None:
    asking = EXAMPLES["switch"]._replace(interactive=True)
    assert errors(machine, KIM, [asking]) == [PROVE]
    assert errors(machine, MAX, [asking]) == [""]


def test_what_ends_more_than_the_configuration_is_for_administrators(machine: Container) -> None:
    """However it is spelled; what the configuration does anyway is a switch like others."""
    wait = Call(path_of(), GPU_INTERFACE, "ToHost", "a{sv}", [{"busy": ("s", "wait"), "wait_seconds": ("u", 5)}])
    end = Call(path_of(), GPU_INTERFACE, "ToHost", "a{sv}", [{"busy": ("s", "terminate")}])
    assert errors(machine, MAX, [wait, end, KILL, STOP]) == ["", PROVE, PROVE, PROVE]
    settings = '[defaults]\nbusy = "terminate"\nstop_units = ["cron.service"]\n'
    machine.push(settings, "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    assert errors(machine, MAX, [wait, end, KILL, STOP]) == ["", "", PROVE, ""]
    wrong = Call(path_of(), GPU_INTERFACE, "ToHost", "a{sv}", [{"stop_units": ("as", ["../cron.service"])}])
    assert errors(machine, MAX, [wrong]) == [f"{NAME}.Error.InvalidArgument"]


def test_an_administrator_may_change_it_by_a_rule(machine: Container) -> None:
    rule = 'polkit.addRule(function (action) { if (action.id == "org.gpuswitch1.inspect") return "no"; });'
    machine.push(rule, "/etc/polkit-1/rules.d/10-closed.rules", mode=0o644)
    machine.sh("systemctl restart polkit")
    assert errors(machine, KIM, [EXAMPLES["inspect"], Call(ROOT, MANAGER, "GetGpu", "s", ["01:00.0"])]) == [NO, ""]
    assert errors(machine, "root", [EXAMPLES["inspect"]]) == [""]


def test_an_administrator_proves_it_on_a_terminal(machine: Container) -> None:
    shown = on_terminal(machine, ADA, f"gpuswitchctl to-vfio {GPU}", word="assword:")
    assert shown.status == 0, shown.stdout
    assert re.search(rf"Authentication is required to switch the GPU {GPU} .*-> vfio\.", shown.stdout)
    assert f"This may stop: {OF_THE_DRIVER}" in shown.stdout
    assert prop(machine, "State") == "vfio"


def test_the_question_is_in_the_language_of_who_is_asked(machine: Container) -> None:
    """That of the agent's LANG; LC_CTYPE is for the characters, as the system has no such locale."""
    for target, language, question in (
        ("vfio", "de_DE", r"Zum Umschalten der GPU .* ist eine Anmeldung nötig\. Dabei kann beendet werden: nvidia"),
        ("host", "fr_FR", r"Une authentification est requise pour basculer le GPU .*\. Peuvent être arrêtés : -"),
        ("vfio", "zh_CN", r"切换 GPU .* 需要身份验证。可能会停止：nvidia"),  # noqa: RUF001 -- Chinese
    ):
        settings = f"env -u LC_ALL LC_CTYPE=C.UTF-8 LANG={language}.UTF-8"
        shown = on_terminal(machine, ADA, f"{settings} gpuswitchctl to-{target} {GPU}", word="assword:")
        assert shown.status == 0, shown.stdout
        assert re.search(question, shown.stdout)


def test_a_user_has_an_administrator_prove_it_or_not(machine: Container) -> None:
    wrong = on_terminal(
        machine, KIM, f"gpuswitchctl to-vfio {GPU} --stop-unit cron.service", word="assword:", answer="x"
    )
    assert wrong.status == 4, wrong.stdout
    assert "cron.service" in wrong.stdout
    assert prop(machine, "State") == "host"
    right = on_terminal(machine, KIM, f"gpuswitchctl to-vfio {GPU}", word="assword:")
    assert right.status == 0, right.stdout
    assert prop(machine, "State") == "vfio"


def test_a_password_is_for_one_command(machine: Container) -> None:
    """Also of who sits at the machine: what polkit keeps for some minutes is for one connection."""
    for name in (KIM, INA):
        shown = on_terminal(machine, name, f"gpuswitchctl to-host {GPU}", word="assword:")
        assert shown.status == 0, shown.stdout
        assert errors(machine, name, [EXAMPLES["switch"]]) == [PROVE]


def test_a_member_of_the_group_is_not_asked(machine: Container) -> None:
    shown = on_terminal(machine, MAX, f"gpuswitchctl to-vfio {GPU}")
    assert shown.status == 0, shown.stdout
    assert "assword" not in shown.stdout
    assert prop(machine, "State") == "vfio"


def test_without_a_terminal_it_says_what_to_do(machine: Container) -> None:
    told = machine.sh(f"{as_user(KIM)} gpuswitchctl to-vfio {GPU}", check=False)
    assert told.status == 4
    assert told.stderr == (
        f"gpuswitchctl: cannot move {GPU} to vfio: to switch GPUs, prove to polkit that you may "
        "(org.gpuswitch1.switch), or become a member of the group gpuswitch; on a terminal you are asked, and root is "
        "not\n"
    )


class Question:
    """A user at a terminal who is asked for a password, and gives none."""

    def __init__(self, machine: Container) -> None:
        self.machine = machine
        machine.push((INSIDE / "terminal.py").read_text(), "/run/harness/terminal.py")
        program = f"{PYTHON} /run/harness/terminal.py '' ''"
        self.job = machine.start(f"{as_user(KIM)} {program} gpuswitchctl to-vfio {GPU} >/run/shown")
        until(machine, "grep -qs assword: /run/shown")

    def over(self) -> None:
        """Wait until nobody is asked any more, and the command is gone."""
        assert self.job.wait(check=False).status != 0
        until(self.machine, "! pgrep -x pkttyagent")


def test_whoever_is_asked_may_leave_and_nothing_is_begun(machine: Container) -> None:
    question = Question(machine)
    machine.sh("pkill -INT -x gpuswitchctl")
    question.over()
    shown = machine.read("/run/shown").replace("\r", "")
    assert "\ngpuswitchctl: interrupted before it was answered; gpuswitchctl status shows whether it was begun" in shown
    assert json.loads(machine.sh("gpuswitchctl history --json").stdout)["switches"] == []


def test_a_question_that_nobody_answers_blocks_nobody(machine: Container) -> None:
    """Others look and switch meanwhile; when its caller goes, it is withdrawn, and nothing was started."""
    question = Question(machine)
    assert prop(machine, "State") == "host"
    assert errors(machine, MAX, [EXAMPLES["switch"]]) == [""]
    machine.sh(f"gpuswitchctl to-vfio {GPU}; gpuswitchctl to-host {GPU}")
    machine.sh("pkill -INT -x gpuswitchctl")
    question.over()
    assert prop(machine, "State") == "host"
    assert len(json.loads(machine.sh("gpuswitchctl history --json").stdout)["switches"]) == 2


def test_the_service_ends_while_a_question_is_open(machine: Container) -> None:
    question = Question(machine)
    machine.sh("systemctl restart gpuswitchd")
    question.over()
    assert prop(machine, "State") == "host"


def test_polkit_ends_while_its_question_is_open(machine: Container) -> None:
    question = Question(machine)
    machine.sh("systemctl restart polkit")
    question.over()
    assert "cannot ask polkit whether you may switch GPUs" in machine.sh("cat /run/shown").stdout
    assert prop(machine, "State") == "host"


def test_the_configuration_changes_while_a_question_is_open(machine: Container) -> None:
    """What is asked for then ends more than the configuration does, and that is another question."""
    machine.push('[defaults]\nstop_units = ["cron.service"]\n', "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    assert errors(machine, MAX, [STOP]) == [""]
    machine.push("[defaults]\nstop_units = []\n", "/etc/gpuswitch/config.toml")
    machine.sh("systemctl reload gpuswitchd")
    assert errors(machine, MAX, [STOP]) == [PROVE]


def test_without_polkit_root_alone_may_act(machine: Container) -> None:
    machine.sh("systemctl mask --runtime --now polkit")
    everybody = dict.fromkeys(EXAMPLES, NO) | {"inspect": ""}
    for name in (KIM, MAX, NOBODY):
        assert dict(zip(EXAMPLES, errors(machine, name, [*EXAMPLES.values()]), strict=True)) == everybody
    assert errors(machine, "root", [*EXAMPLES.values()]) == [""] * len(EXAMPLES)
    log = machine.sh("journalctl -u gpuswitchd --output=cat").stdout
    assert log.count("polkit is not there") == 1


def test_who_looks_hears_of_what_happens(machine: Container) -> None:
    machine.push((INSIDE / "listen.py").read_text(), "/run/harness/listen.py")
    listening = machine.start(f"{AS_NOBODY} {PYTHON} /run/harness/listen.py SwitchFinished | tee /run/heard")
    machine.sh("until grep -qs ready /run/heard; do :; done")
    start_switch(machine, "ToVfio")
    heard = listening.wait().stdout.split()
    assert {"ready", "PropertiesChanged", "StepChanged", "SwitchFinished"} == set(heard)
    until_state(machine, "vfio")


def test_nobody_else_can_be_the_service(machine: Container) -> None:
    machine.sh("systemctl mask --runtime --now gpuswitchd")
    request = f"busctl call {FREEDESKTOP} /org/freedesktop/DBus {FREEDESKTOP} RequestName su {NAME} 4"
    said = machine.sh(f"{AS_NOBODY} {request}", check=False)
    assert said.status != 0
    assert "denied" in said.stderr or "not allowed" in said.stderr
    machine.sh(request)
