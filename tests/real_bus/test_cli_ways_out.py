"""A switch that is refused since somebody has the GPU open names what there is to type, and that is not refused."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from tests.harness.service.services import ANY_PORT
from tests.real_bus.conftest import Ctl, Start

TABLE = '[[gpu]]\naddress = "0000:01:00.0"\nname = "geforce"\n'
MAY = f"{ANY_PORT}[defaults]\nallow_boot_display = true\n{TABLE}"
WAIT = "or have it wait for them: "
STOP = "or have display-manager.service stopped first, and started again when the GPU is home: "
END = "or have them ended, and lose what they have not saved: "
SEE_WAIT = "or see the plan that waits for them: "
SEE_STOP = "or see the plan that stops display-manager.service first, which is started again when the GPU is home: "
SEE_END = "or see the plan that ends them, with all that they have not saved: "


def offered(refusal: subprocess.CompletedProcess[str]) -> list[str]:
    assert refusal.returncode == 3
    return [line.strip() for line in refusal.stderr.splitlines() if line.startswith("  or ")]


async def test_each_way_out_is_named(start: Start, ctl: Ctl) -> None:
    await start("single", config=MAY)
    assert offered(ctl("to-vfio", "geforce")) == [
        f"{WAIT}gpuswitchctl to-vfio geforce --wait 60",
        f"{STOP}gpuswitchctl to-vfio geforce --stop-unit display-manager.service",
        f"{END}gpuswitchctl to-vfio geforce --busy terminate",
    ]
    first, *_ = offered(ctl("trial", "geforce", "--seconds", "60"))
    assert first == f"{WAIT}gpuswitchctl trial geforce --seconds 60 --wait 60"


async def test_a_plan_and_a_command_that_is_to_run_have_the_same_ways_out(start: Start, ctl: Ctl) -> None:
    """What only looks is answered by what only looks, and is called so; the command stands behind the options."""
    await start("single", config=MAY)
    for typed in (["plan", "geforce", "vfio"], ["to-vfio", "geforce", "--dry-run"]):
        ways = offered(ctl(*typed))
        first = shlex.join(["gpuswitchctl", *typed])
        assert ways == [
            f"{SEE_WAIT}{first} --wait 60",
            f"{SEE_STOP}{first} --stop-unit display-manager.service",
            f"{SEE_END}{first} --busy terminate",
        ]
        assert ctl(*shlex.split(ways[1].removeprefix(SEE_STOP))[1:]).returncode == 0
    _wait, stop, end = offered(ctl("run", "--gpu", "geforce", "--", "echo", "{0}", "a b"))
    assert end == f"{END}gpuswitchctl run --gpu geforce --busy terminate -- echo '{{0}}' 'a b'"
    done = ctl(*shlex.split(stop.removeprefix(STOP))[1:])
    assert (done.returncode, done.stdout, done.stderr) == (0, "0000:01:00.0 a b\n", "")
    *_, end = offered(ctl("run", "--name", "win 11", "--", "/bin/echo", *["-device"] * 30))
    assert end == f"{END}gpuswitchctl run --gpu geforce --name 'win 11' --busy terminate -- /bin/echo ..."


async def test_who_goes_by_itself_is_told_from_who_is_in_the_way(start: Start, ctl: Ctl) -> None:
    """As `to-vfio` has it: PipeWire is told that the sound goes, and a unit that the configuration names is stopped."""
    by_itself = {"wireplumber"}
    for stops, there in (
        ("", by_itself),
        ('stop_units = ["display-manager.service"]\n', {*by_itself, "Xorg", "kwin_x11"}),
    ):
        await (service := await start("single", config=f"{MAY}{stops}")).ask("Warnings")
        found = json.loads(ctl("holders", "geforce", "--json").stdout)["holders"]
        assert {each["command"] for each in found if each["goes_by_itself"]} == there
        shown = ctl("holders", "geforce").stdout.splitlines()[1:]
        assert {line.split()[1] for line in shown if line.endswith("nothing to do: a switch to vfio does it")} == there
        service.process.terminate()
        await service.process.wait()


@pytest.mark.parametrize("lead", [STOP, END])
async def test_each_way_out_leads_there(lead: str, start: Start, ctl: Ctl) -> None:
    await start("single", config=MAY)
    [way] = [way for way in offered(ctl("to-vfio", "geforce")) if way.startswith(lead)]
    program, *typed = shlex.split(way.removeprefix(lead))
    done = ctl(*typed)
    assert (program, done.returncode, done.stderr) == ("gpuswitchctl", 0, "")


async def test_nothing_is_offered_that_something_else_is_in_the_way_of(start: Start, ctl: Ctl) -> None:
    """No wait makes another display of the one that the machine booted on."""
    await start("single", config=f"{ANY_PORT}{TABLE}")
    refusal = ctl("to-vfio", "geforce")
    assert "the display that this machine booted on" in refusal.stderr
    assert "Xorg (pid " in refusal.stderr
    assert offered(refusal) == []


async def test_a_plan_names_who_is_waited_for_or_ended(start: Start, ctl: Ctl) -> None:
    await start("single", config=MAY)
    card, vfio = "geforce (0000:01:00.0)", "to vfio"
    verdict, *held = ctl("plan", "geforce", "vfio", "--wait", "60").stdout.splitlines()
    assert verdict == f"{card} goes {vfio} once nobody has it open any more"
    assert [line.split()[0] for line in held if line.startswith("  ")][:2] == ["Xorg", "kwin_x11"]
    ends = ctl("to-vfio", "geforce", "--busy", "terminate", "--dry-run").stdout.splitlines()
    ending = f"{card} can go {vfio}, which ends who has it open"
    what = ["  ended: session 2 of alice (kwin_x11)", "  stopped until it is home: display-manager.service (Xorg)"]
    assert ends[:5] == [ending, *held[:2], *what]
    stops = ctl("plan", "geforce", "vfio", "--stop-unit", "display-manager.service").stdout.splitlines()
    assert stops[:3] == [f"nothing keeps {card} from going {vfio}", *what]
    [told] = json.loads(ctl("plan", "geforce", "vfio", "--wait", "60", "--json").stdout)["plans"]
    assert [f"  {each['text']}" for each in told["in_the_way"]] == held[:2]


async def test_a_plan_ends_with_the_line_that_does_it(start: Start, ctl: Ctl) -> None:
    await start("single", config=MAY)
    stops = ["--stop-unit", "display-manager.service"]
    does = f"to do it: gpuswitchctl to-vfio geforce {shlex.join(stops)}"
    for typed in (["plan", "geforce"], ["plan", "--all"], ["to-vfio", "geforce", "--dry-run"]):
        shown = ctl(*typed, *stops).stdout
        assert [line for line in shown.splitlines() if "to do it" in line] == [does]
        assert shown.endswith(f"{does}\n")
        assert "to-vfio" not in ctl(*typed, *stops, "--json").stdout
    assert "to do it" not in ctl("plan", "geforce", "host").stdout
    [verb, *more] = shlex.split(does.removeprefix("to do it: gpuswitchctl "))
    assert ctl(verb, *more).returncode == 0
    assert ctl("plan", "geforce").stdout.endswith("to do it: gpuswitchctl to-host geforce\n")


async def test_who_has_waited_in_vain_is_told_what_they_typed_and_what_else_there_is(start: Start, ctl: Ctl) -> None:
    await start("single", config=MAY)
    failed = ctl("trial", "geforce", "--seconds", "60", "--wait", "1")
    assert failed.returncode == 3
    again = "gpuswitchctl trial geforce --seconds 60"
    assert f"  put right what is named here, then: {again} --wait 1\n" in failed.stderr
    assert f"{END}{again} --busy terminate" in offered(failed)
