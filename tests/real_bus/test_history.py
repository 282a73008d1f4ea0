"""The history and cancelling, as callers of the real service and people at the command line see them."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jeepney
import pytest
from jeepney.io import blocking

from gpuswitch.cli.output import moment
from gpuswitch.history.archive import Archive
from gpuswitch.history.history import entry_of_drift
from gpuswitch.model.states import State
from gpuswitch.switch.record import Drift
from tests.harness.buses.private import PrivateBus
from tests.harness.json_schemas import check
from tests.harness.service.peers import PeerError
from tests.harness.service.services import (
    ANY_PORT,
    BIN,
    GPU,
    NAME,
    ROOT,
    Service,
    contents,
    environment,
    plain,
    write_config,
)
from tests.real_bus.conftest import Start
from tests.real_bus.test_cli import on_terminal

ADDRESS, SOUND = "0000:01:00.0", "0000:01:00.1"
DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
UNBIND_SOUND = f"unbind {SOUND} from snd_hda_intel"


async def history(service: Service, limit: int = 0) -> list[dict[str, Any]]:
    return [plain(entry) for entry in await service.ask("History", "u", limit)]


async def entry(service: Service, switch: str) -> dict[str, Any]:
    found = plain(await service.ask("HistoryEntry", "s", switch))
    return found | {"steps": [plain(step) for step in found["steps"]]}


async def cancel(service: Service, switch: str) -> None:
    await service.call(DISCRETE, f"{GPU}.Cancel", "s", switch)


async def refused(service: Service, switch: str) -> str:
    with pytest.raises(PeerError) as raised:
        await cancel(service, switch)
    return str(raised.value).removeprefix("org.gpuswitch1.Error.")


async def until_unbind(service: Service) -> None:
    """Until the sound card is being unbound."""
    while not ((step := await service.signal()).member == "StepChanged" and step.body[3] == "unbind"):
        pass


async def ctl(bus: PrivateBus, *arguments: str) -> tuple[int, str, str]:
    """Run gpuswitchctl to its end: its exit status, and what it said."""
    process = await asyncio.create_subprocess_exec(
        BIN / "gpuswitchctl", *arguments, env=environment(GPUSWITCH_BUS=bus.address),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip  # the command, then how it runs
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def my_command() -> str:
    return Path("/proc/self/comm").read_text().strip()


# History


async def test_every_finished_switch_is_in_the_history_newest_first(start: Start) -> None:
    service = await start("laptop")
    assert await history(service) == []
    there = await service.move(DISCRETE, "vfio")
    record = await service.wait(DISCRETE, there)
    back = await service.move(DISCRETE, "host")
    await service.wait(DISCRETE, back)
    found = await history(service)
    assert [(each["id"], each["target"], each["result"]) for each in found] == [
        (back, "host", "done"),
        (there, "vfio", "done"),
    ]
    assert await history(service, 1) == found[:1]
    known = {key: record[key] for key in ("id", "target", "count", "started", "finished", "result", "reason")}
    assert found[1] == known | {"gpu": ADDRESS, "options": {}, "asker": found[1]["asker"], "returned": {}}


async def test_it_knows_the_options_and_who_asked(start: Start) -> None:
    service = await start("laptop")
    options = {"busy": ("s", "wait"), "wait_seconds": ("u", 5), "stop_units": ("as", ["nvidia-persistenced.service"])}
    switch = await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", options)
    await service.wait(DISCRETE, switch)
    [found] = await history(service)
    assert found["options"] == {"busy": "wait", "wait_seconds": 5.0, "stop_units": ["nvidia-persistenced.service"]}
    requester = found["asker"]
    assert (requester["service"], requester["uid"], requester["pid"]) == (False, os.geteuid(), os.getpid())
    assert (requester["command"], requester["vm"]) == (my_command(), "")
    assert (await entry(service, switch))["asker"] == requester


async def test_who_asks_and_goes_is_known_all_the_same(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop")
    status, out, _ = await ctl(private_bus, "to-vfio", ADDRESS, "--no-wait")
    assert status == 0
    await service.signals_until("SwitchFinished")
    requester = (await entry(service, out.strip()))["asker"]
    assert requester["command"] == "gpuswitchctl"
    assert requester["pid"] not in (0, os.getpid())


async def test_an_entry_has_each_step_with_its_time(start: Start) -> None:
    service = await start("laptop", f"probe@{SOUND}#1=EINVAL")
    switch = await service.move(DISCRETE, "vfio")
    signals = await service.signals_until("SwitchFinished")
    told = [each.body[1:] for each in signals if each.member == "StepChanged"]
    ended = [each for each in told if each[4] not in {"running", "reverting"}]
    found = await entry(service, switch)
    steps = found["steps"]
    names = ("index", "kind", "title", "status")
    assert [[step[name] for name in names] for step in steps] == [[*each[:1], *each[2:5]] for each in ended]
    assert {each[1] for each in ended} == {found["count"]}
    assert [step["seconds"] for step in steps] == pytest.approx([each[5] for each in ended], abs=2e-6)
    times = [step["started"] for step in steps]
    assert times == sorted(times)
    assert found["started"] <= times[0] <= times[-1] + steps[-1]["seconds"] <= found["finished"] + 2e-6


async def test_one_without_steps_has_an_empty_list_of_the_same_type(start: Start, tmp_path: Path) -> None:
    drift = entry_of_drift(ADDRESS, Drift(State.VFIO, State.HOST, "vfio → host", time.time()))
    Archive(tmp_path / "service" / "state" / "history.db").add([drift], keep=1000, since=0)
    service = await start("laptop")
    assert (await service.ask("HistoryEntry", "s", drift.id))["steps"] == ("aa{sv}", [])


async def test_one_that_nobody_knows_is_named(start: Start) -> None:
    service = await start("laptop")
    with pytest.raises(PeerError, match=r"InvalidArgument: the history knows of no switch 'nope'$"):
        await service.ask("HistoryEntry", "s", "nope")


async def test_it_outlives_the_service(start: Start) -> None:
    service = await start("laptop", "unbind=1s")
    switch = await service.move(DISCRETE, "vfio")
    await until_unbind(service)
    assert await service.end(signal.SIGTERM) == 0
    (service.folder / "notify").unlink()
    again = await start("laptop")
    [found] = await history(again)
    assert (found["id"], found["result"], found["reason"]) == (switch, "cancelled", "the service is stopping")
    assert contents(service.folder / "state") == ["history.db"]


async def test_a_switch_that_the_service_was_killed_in_has_all_its_steps(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang")
    options = {"busy": ("s", "wait"), "wait_seconds": ("u", 5)}
    switch = await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", options)
    before = []
    while (told := await service.signal()).member != "StepChanged" or told.body[3] != "unbind":
        before += [told.body] if told.member == "StepChanged" and told.body[5] == "done" else []
    await service.end(signal.SIGKILL)
    (service.folder / "notify").unlink()
    again = await start("laptop")
    found = await entry(again, switch)
    assert (found["target"], found["result"], found["options"]) == (
        "vfio",
        "reverted",
        {"busy": "wait", "wait_seconds": 5.0},
    )
    assert (found["asker"]["pid"], found["asker"]["command"]) == (os.getpid(), my_command())
    earlier = [step for step in found["steps"] if step["before_restart"]]
    assert [(step["index"], step["title"], step["status"]) for step in earlier] == [
        *((body[1], body[4], "done") for body in before),
        (before[-1][1] + 1, UNBIND_SOUND, "interrupted"),
    ]
    assert [step["started"] for step in earlier] == sorted(step["started"] for step in earlier)
    assert len(found["steps"]) > len(earlier)
    status, out, err = await ctl(private_bus, "show", switch)
    assert (status, err) == (0, "")
    first, second = out.split("until the service ended in the midst of it:\n")[1].split("since it runs again:\n")
    assert re.search(rf"^{earlier[-1]['index']} .* interrupted +{UNBIND_SOUND}$", first, flags=re.MULTILINE)
    assert " done " in second
    record = json.loads((await ctl(private_bus, "show", switch, "--json"))[1])
    check("show", record)


async def test_a_broken_file_is_set_aside_with_one_warning_and_the_service_goes_on(
    start: Start, tmp_path: Path
) -> None:
    state = tmp_path / "service" / "state"
    state.mkdir(parents=True)
    write_garbage(state / "history.db")
    service = await start("laptop")
    switch = await service.move(DISCRETE, "vfio")
    assert (await service.wait(DISCRETE, switch))["result"] == "done"
    assert [each["id"] for each in await history(service)] == [switch]
    assert contents(state) == ["history.db", "history.db.bad"]
    assert service.log.count("history.db.bad") == 1


def write_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00" * 4096)


async def test_without_a_place_for_it_the_service_goes_on_and_says_so_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "state").touch()
    service = await start("laptop")
    for target in ("vfio", "host"):
        assert (await service.wait(DISCRETE, await service.move(DISCRETE, target)))["result"] == "done"
    with pytest.raises(PeerError, match=r"Failed: the history cannot be read: cannot use .*/state/history\.db: "):
        await history(service)
    assert service.log.count("the history is not kept for now") == 1


async def test_a_reload_turns_it_off_and_on(start: Start) -> None:
    service = await start("laptop")
    write_config(service.config, f"{ANY_PORT}[history]\nenabled = false\n")
    await service.ask("Reload")
    await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
    with pytest.raises(PeerError, match=r"Failed: no history is kept: the configuration says history\.enabled = false"):
        await history(service)
    write_config(service.config, ANY_PORT)
    await service.ask("Reload")
    assert await history(service) == []


async def test_people_see_the_list_and_one_switch_step_by_step(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop", f"probe@{SOUND}#1=EINVAL")
    await ctl(private_bus, "to-vfio", ADDRESS)
    await ctl(private_bus, "to-vfio", ADDRESS)
    newest, oldest = await history(service)
    status, out, err = await ctl(private_bus, "history")
    assert (status, err) == (0, "")
    heading, first, second = out.splitlines()
    assert heading.startswith("WHEN ")
    assert f"  {newest['id']}  {ADDRESS}  -     vfio    done " in first
    assert f"  {oldest['id']}  {ADDRESS}  -     vfio    reverted " in second
    assert second.endswith(f"  cannot bind {SOUND} to vfio-pci: Invalid argument")
    told = json.loads((await ctl(private_bus, "history", "--json"))[1])["switches"]
    assert [(each["id"], each["requester"]) for each in told] == [
        (each["id"], each["asker"]) for each in (newest, oldest)
    ]
    assert len((await ctl(private_bus, "history", "01:00.0", "--limit", "1"))[1].splitlines()) == 2
    assert (await ctl(private_bus, "history", "00:02.0"))[1] == "there is no finished switch\n"

    whole = await entry(service, oldest["id"])
    shown = json.loads((await ctl(private_bus, "show", oldest["id"], "--json"))[1])["switch"]
    assert (shown["id"], shown["result"], shown["reason"]) == (whole["id"], whole["result"], whole["reason"])
    assert [(each["title"], each["status"], each["seconds"]) for each in shown["steps"]] == [
        (each["title"], each["status"], each["seconds"]) for each in whole["steps"]
    ]
    status, out, err = await ctl(private_bus, "show", oldest["id"])
    assert (status, err) == (0, "")
    begins = next(length for length in range(1, 9) if oldest["id"][:length] != newest["id"][:length])
    assert await ctl(private_bus, "show", oldest["id"][:begins]) == (status, out, "")
    assert re.search(rf" failed +bind {SOUND} to vfio-pci$", out, flags=re.MULTILINE)
    assert re.search(rf" reverted +{UNBIND_SOUND}$", out, flags=re.MULTILINE)
    assert len(re.findall(r"^[0-9]+ +[0-9]", out, flags=re.MULTILINE)) == len(whole["steps"])
    assert re.search(r"^the way to vfio:$.*^the way back:$", out, flags=re.MULTILINE | re.DOTALL)
    status, out, err = await ctl(private_bus, "show", "nope")
    assert (status, out) == (2, "")
    assert err == (
        "gpuswitchctl: cannot show the steps of a finished switch: the history knows of no switch 'nope'; "
        "gpuswitchctl history lists them, and without an ID it is the last\n"
    )


async def test_on_a_terminal_each_step_is_a_bar_in_time(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop", f"probe@{SOUND}#1=EINVAL", "unbind=0.1s")
    switch = await service.move(DISCRETE, "vfio")
    await service.wait(DISCRETE, switch)
    environ = environment(GPUSWITCH_BUS=private_bus.address, TERM="xterm", COLUMNS="160")
    status, shown = await asyncio.to_thread(on_terminal, environ, "show", switch)
    assert status == 0
    coloured = {"32": "done", "31": "failed", "33": "reverted"}
    for colour, result in coloured.items():
        assert re.search(rf"\x1b\[{colour}[;m][^\n]*{result}", shown)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    [done, back] = [line for line in text.splitlines() if UNBIND_SOUND in line]
    assert bar(done) < bar(back)
    assert "done" in done
    assert "reverted" in back


def bar(line: str) -> int:
    """Where it begins."""
    found = re.search("[█▐▕▏▎▍▌▋▊▉]", line)
    assert found
    return found.start()


# Cancel and join


async def test_a_running_switch_is_cancelled_and_all_is_as_before(start: Start) -> None:
    service = await start("laptop", "unbind=0.5s")
    before = await service.properties(DISCRETE)
    switch = await service.move(DISCRETE, "vfio")
    await until_unbind(service)
    assert await service.move(DISCRETE, "vfio") == switch
    await cancel(service, switch)
    await cancel(service, switch)
    record = await service.wait(DISCRETE, switch)
    reason = f"cancelled by {my_command()} (pid {os.getpid()}, uid {os.geteuid()})"
    assert (record["result"], record["reason"]) == ("cancelled", reason)
    assert (await service.signals_until("SwitchFinished"))[-1].body == (switch, "cancelled", reason)
    after = await service.properties(DISCRETE)
    assert {name for name in after if after[name] != before[name]} == {"Reason", "Switch", "StateSince"}
    assert after["Reason"] == reason
    assert (await entry(service, switch))["result"] == "cancelled"
    assert await refused(service, switch) == f"Failed: cannot cancel switch {switch}: it is over already (cancelled)"
    assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"


async def test_what_cannot_be_cancelled_says_why(start: Start) -> None:
    service = await start("laptop", f"unbind@{SOUND}=hang", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    assert await refused(service, "5f") == "InvalidArgument: 0000:01:00.0 knows of no switch '5f'"
    switch = await service.move(DISCRETE, "vfio")
    await service.until_state(DISCRETE, "wedged")
    assert await refused(service, switch) == (
        f"Wedged: cannot cancel switch {switch}: 0000:01:00.0 is wedged, "
        "and nothing is written to it until the kernel returns; "
        "gpuswitchctl status 0000:01:00.0 says what may make it return"
    )


async def test_people_hear_that_a_kernel_has_returned(start: Start, private_bus: PrivateBus) -> None:
    """When, and where that left the GPU; not that it has not returned."""
    service = await start("laptop", f"unbind@{SOUND}#1=1s", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    switch = await service.move(DISCRETE, "vfio")
    await service.until_state(DISCRETE, "wedged")
    await service.until_state(DISCRETE, "host")
    returned = (await service.properties(DISCRETE))["Switch"]["returned"]
    assert (returned["state"], returned["reason"]) == ("host", "")
    assert (await entry(service, switch))["returned"] == returned
    when = re.escape(moment(returned["at"]))
    for arguments in (["status", ADDRESS], ["history"], ["show", switch]):
        _, out, _ = await ctl(private_bus, *arguments)
        assert f"{UNBIND_SOUND}' took longer than 0.2 s" in out
        assert re.search(rf"the kernel returned at {when} by itself; the state of the GPU after that: host", out)
        assert "has not returned" not in out
    for arguments in (["status"], ["history"], ["show"]):
        status, out, _ = await ctl(private_bus, *arguments, "--json")
        check(f"{arguments[0]}.schema.json", json.loads(out))
        assert (status, '"state": "host",\n' in out) == (0, True)


async def test_people_cancel_and_see_the_way_back(start: Start, private_bus: PrivateBus) -> None:
    service = await start("laptop", "unbind=1s")
    following = asyncio.create_task(ctl(private_bus, "to-vfio", ADDRESS))
    await until_unbind(service)
    status, out, err = await ctl(private_bus, "cancel", ADDRESS)
    switch = (await service.properties(DISCRETE))["Switch"]["id"]
    assert (status, err) == (0, "")
    *steps, last = out.splitlines()
    assert last == f"switch {switch} of {ADDRESS} to vfio is cancelled: the GPU is as it was before"
    assert [step for step in steps if f"{UNBIND_SOUND}: reverted" in step]
    status, _, err = await following
    assert status == 1
    me = re.escape(pwd.getpwuid(os.geteuid()).pw_name)
    cancelled = rf"\(cancelled\): cancelled by gpuswitchctl \(pid \d+\) of {me}\n"
    assert re.match(rf"gpuswitchctl: cannot move {ADDRESS} to vfio {cancelled}", err)
    status, _, err = await ctl(private_bus, "cancel", ADDRESS)
    assert status == 1
    last = f"the last was {switch} to vfio: cancelled at "
    assert err.startswith(f"gpuswitchctl: cannot cancel: no switch of {ADDRESS} is under way; {last}")


@pytest.mark.parametrize(
    ("word", "option"), [("yesterday", "--since yesterday"), ("2h", "--since 2h"), ("5", "--limit 5")]
)
async def test_a_time_in_the_place_of_a_gpu_is_told_from_a_name(
    word: str, option: str, start: Start, private_bus: PrivateBus
) -> None:
    await start("laptop")
    status, out, err = await ctl(private_bus, "history", word)
    assert (status, out) == (2, "")
    assert f"no GPU is named '{word}'; this host has " in err
    assert f"  {word} is what an option takes, and no GPU; did you mean {option}?\n" in err
    _status, _out, err = await ctl(private_bus, "history", "radeon")
    assert "did you mean" not in err


async def test_nothing_to_cancel_is_said(start: Start, private_bus: PrivateBus) -> None:
    await start("laptop")
    reason = f"nobody has switched {ADDRESS} since the service started"
    said = f"gpuswitchctl: cannot cancel the switch of {ADDRESS}: {reason}\n"
    assert await ctl(private_bus, "cancel", ADDRESS) == (1, "", said)


async def test_a_caller_that_hangs_up_at_once(start: Start, private_bus: PrivateBus) -> None:
    """The bus may not know it any more when it is asked: then nobody can say whether it may, and nothing is begun."""
    service = await start("laptop")
    address = jeepney.DBusAddress(DISCRETE, NAME, GPU)
    with blocking.open_dbus_connection(private_bus.address) as hasty:
        hasty.send(jeepney.new_method_call(address, "ToVfio", "a{sv}", ({},)))
    await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
    for found in await history(service):
        assert (found["result"], found["asker"]["uid"]) == ("done", os.geteuid())
