"""Recovery and drift as callers of the real service, people at the command line and a Prometheus see them."""

from __future__ import annotations

import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import PeerError
from tests.harness.service.services import ANY_PORT, GPU, ROOT, Service
from tests.real_bus.conftest import Start
from tests.real_bus.test_history import ctl, history
from tests.real_bus.test_metrics import samples, scrape, value

ADDRESS, SOUND = "0000:01:00.0", "0000:01:00.1"
DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
BOTH_WAYS_FAIL = tuple(f"probe@{SOUND}#{nth}=EINVAL" for nth in (1, 2, 3))
"""To vfio-pci, on the way back, and to vfio-pci once more; after that nothing is wrong with it."""
GENTLE = f"{ANY_PORT}[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n"
HOME_FAILS_TOO = (*BOTH_WAYS_FAIL, f"probe@{SOUND}#4=EINVAL")


async def failed(start: Start, *faults: str) -> Service:
    """A service whose GPU is `failed`, and that does nothing rough."""
    service = await start("laptop", *faults, config=GENTLE)
    switch = await service.move(DISCRETE, "vfio")
    assert (await service.wait(DISCRETE, switch))["result"] == "failed"
    assert (await service.properties(DISCRETE))["State"] == "failed"
    return service


async def recover(service: Service) -> str:
    return str(await service.call(DISCRETE, f"{GPU}.Recover", "a{sv}", {}))


async def test_a_failed_gpu_comes_home(start: Start) -> None:
    service = await failed(start, *BOTH_WAYS_FAIL)
    switch = await recover(service)
    record = await service.wait(DISCRETE, switch)
    assert (record["id"], record["target"], record["result"]) == (switch, "host", "done")
    after = await service.properties(DISCRETE)
    assert (after["State"], after["Reason"]) == ("host", "")
    assert {driver for _, _, driver in after["Functions"]} == {"nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu"}
    newest, _ = await history(service)
    assert (newest["id"], newest["result"]) == (switch, "done")
    assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"


async def test_one_that_cannot_come_home_goes_to_vfio_and_says_so(start: Start) -> None:
    service = await failed(start, *HOME_FAILS_TOO)
    record = await service.wait(DISCRETE, await recover(service))
    assert record["result"] == "reverted"
    assert record["reason"].endswith("it is on vfio-pci now")
    assert (await service.properties(DISCRETE))["State"] == "vfio"


async def test_one_that_needs_no_recovery_stays_where_it_is(start: Start) -> None:
    service = await start("laptop")
    for state in ("host", "vfio"):
        await service.wait(DISCRETE, await service.move(DISCRETE, state))
        before = await service.properties(DISCRETE)
        record = await service.wait(DISCRETE, await recover(service))
        assert (record["result"], record["target"], record["count"]) == ("done", state, 0)
        assert (await service.properties(DISCRETE)) | {"Switch": {}} == before | {"Switch": {}}


async def test_a_wedged_one_is_not_recovered(start: Start) -> None:
    service = await start("laptop", "unbind=hang", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    await service.move(DISCRETE, "vfio")
    await service.until_state(DISCRETE, "wedged")
    with pytest.raises(PeerError, match=r"org\.gpuswitch1\.Error\.Wedged: "):
        await recover(service)
    assert value(samples(await scrape(service)), "refusals_total", gpu=ADDRESS, reason="wedged") == 1


async def test_people_recover_and_see_each_step(start: Start, private_bus: PrivateBus) -> None:
    service = await failed(start, *BOTH_WAYS_FAIL)
    status, out, err = await ctl(private_bus, "recover", ADDRESS)
    assert (status, f"\n{ADDRESS} is on the host now, after " in out) == (0, True)
    assert f"unbind {SOUND} from vfio-pci" not in out
    assert f"bind {SOUND} to snd_hda_intel: done" in out
    assert err == ""
    assert await ctl(private_bus, "recover", ADDRESS) == (0, f"{ADDRESS} is on the host already\n", "")
    assert [each["result"] for each in await history(service)] == ["done", "failed"]


async def test_people_hear_that_it_is_elsewhere(start: Start, private_bus: PrivateBus) -> None:
    await failed(start, *HOME_FAILS_TOO)
    status, _, err = await ctl(private_bus, "recover", ADDRESS)
    assert status == 1
    assert err.startswith(f"gpuswitchctl: cannot recover {ADDRESS} (reverted): ")
    *_reason, end, hint, _kernel, _doctor, _report, again, allow, _table, _address, _line, reboot = err.splitlines()
    assert end == "  in the end it is on vfio-pci now"
    assert hint == f"  find out why 'bind {SOUND} to snd_hda_intel' did not work:"
    assert again == f"  then: gpuswitchctl recover {ADDRESS}"
    assert allow.startswith(
        f"  if that does not help: to have it reset on its way home by gpuswitchctl to-host {ADDRESS}, add "
    )
    assert reboot.startswith("  if that does not help: the last way is to restart the machine: ")


async def test_what_fails_once_more_is_told_with_what_failed_before(start: Start, private_bus: PrivateBus) -> None:
    """It is not `reverted`: as before is not well. And it is said what to do next."""
    service = await failed(start, *HOME_FAILS_TOO, *(f"probe@{SOUND}#{nth}=EINVAL" for nth in (5, 6)))
    story = (await service.properties(DISCRETE))["Reason"]
    again = f"  then: gpuswitchctl recover {ADDRESS}\n"
    alone = f"'bind {SOUND} to snd_hda_intel' has failed again, and this alone does not help: "
    for attempt in range(2):
        status, _, err = await ctl(private_bus, "to-host", ADDRESS)
        assert status == 1
        assert err.startswith(f"gpuswitchctl: cannot move {ADDRESS} to host (failed): ")
        assert (f"find out why 'bind {SOUND} to snd_hda_intel' did not work:" in err) is (attempt == 0)
        assert (again in err, alone in err) == (attempt == 0, attempt == 1)
        reason = (await service.properties(DISCRETE))["Reason"]
        assert reason.startswith(f"{story}\nand since then: cannot bind {SOUND} to snd_hda_intel: ")
        assert reason.count("and since then") == 1
        _, shown, _ = await ctl(private_bus, "status", ADDRESS)
        # One sentence says what failed; what came of that stands below it, and all of it once.
        first, *more = reason.splitlines()
        assert f"reason: {first}\n" in shown
        for each in more:
            lead = "" if each.startswith("and since then") else "  "
            assert shown.count(f"\n{' ' * len('stopped units: ')}{lead}{each}\n") == 1
        assert (again in shown, f"to do: {alone}" in shown) == (attempt == 0, attempt == 1)
        assert [each["result"] for each in await history(service, 1)] == ["failed"]


async def test_what_has_failed_twice_names_what_else_there_is(start: Start, private_bus: PrivateBus) -> None:
    """The file, the table and the line; and once that is written and read, to recover is worth it again."""
    service = await failed(start, f"probe@{SOUND}=EINVAL")
    await ctl(private_bus, "recover", ADDRESS)
    status, _out, told = await ctl(private_bus, "recover", ADDRESS)
    assert status == 1
    _, last, _ = await ctl(private_bus, "show")
    _, now, _ = await ctl(private_bus, "status", ADDRESS)
    config = service.config / "config.toml"
    write = f"by gpuswitchctl recover {ADDRESS}, add to {config}, by gpuswitchctl config edit: [[gpu]]"
    for shown in (told, last, now):
        assert f"and this alone does not help: gpuswitchctl recover {ADDRESS}\n" in shown
        assert f"  then: gpuswitchctl recover {ADDRESS}\n" not in shown
        bare = " ".join(shown.replace("`, `", " ").replace("`", "").split())
        assert f'{write} address = "{ADDRESS}"' in bare
        assert "rescan_on_failure = true" in bare
        assert "the last way is to restart the machine: systemctl reboot; " in shown
    config.write_text(f'{config.read_text()}[[gpu]]\naddress = "{ADDRESS}"\nrescan_on_failure = true\n')
    await service.ask("Reload")
    _, now, _ = await ctl(private_bus, "status", ADDRESS)
    assert f"  then: gpuswitchctl recover {ADDRESS}\n" in now
    assert "rescan_on_failure" not in now
    status, out, _ = await ctl(private_bus, "recover", ADDRESS)
    assert (status, " from the PCI bus: done" in out) == (0, True)
    assert (await service.properties(DISCRETE))["Remedies"] == []


async def test_recoveries_are_counted_by_where_they_ended(start: Start) -> None:
    service = await failed(start, *HOME_FAILS_TOO)
    await service.wait(DISCRETE, await recover(service))
    counted = samples(await scrape(service))
    assert value(counted, "recoveries_total", gpu=ADDRESS, state="failed") == 1
    assert value(counted, "recoveries_total", gpu=ADDRESS, state="vfio") == 1


async def test_one_that_its_driver_cannot_take_after_a_reset_stays_out(start: Start, private_bus: PrivateBus) -> None:
    faults = (f"probe@{SOUND}#{nth}=EINVAL" for nth in (2, 4))
    service = await start("laptop", *faults, config=f"{ANY_PORT}[defaults]\nrescan_on_failure = false\n")
    assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"
    status, out, err = await ctl(private_bus, "to-host", ADDRESS)
    assert status == 1
    assert f"reset {ADDRESS}: done" in out
    assert "cannot get it on the host after a reset" in err
    assert (await service.properties(DISCRETE))["StaysOut"] is True
    assert value(samples(await scrape(service)), "stays_out", gpu=ADDRESS) == 1
    _, shown, _ = await ctl(private_bus, "status", ADDRESS)
    assert "tried again: when a program that had it open is gone, " in shown
    assert (await ctl(private_bus, "to-host", ADDRESS))[0] == 0
    assert (await service.properties(DISCRETE))["StaysOut"] is False
    assert value(samples(await scrape(service)), "stays_out", gpu=ADDRESS) == 0
