"""The metrics as a Prometheus scrapes them from the real service, and what other clients cannot do to it."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from asyncinotify import Inotify, Mask
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from gpuswitch import __version__, errors
from gpuswitch.api import metrics, process_metrics
from gpuswitch.api.authority import Action
from gpuswitch.api.families import FAMILIES, PROCESS_FAMILIES, Type
from gpuswitch.config.schema import Deadlines, names_of
from gpuswitch.gpu.gpu_record import GpuRecord
from gpuswitch.model.address import PciAddress
from gpuswitch.model.states import State
from gpuswitch.switch.record import Drift
from tests.harness.certificates import Authority, Signed
from tests.harness.service.peers import PeerError
from tests.harness.service.services import ANY_PORT, GPU, ROOT, Service, told_properties, write_config
from tests.real_bus.conftest import Start

DISCRETE = f"{ROOT}/gpu/0000_01_00_0"
ADDRESS = "0000:01:00.0"
NAMED = f'{ANY_PORT}[[gpu]]\naddress = "{ADDRESS}"\nname = "geforce"\n'

WIN11 = "5b0f6c9a-1c43-4d8c-9d4e-1d2f3a4b5c6d"
GEFORCE = {
    "name": "geforce",
    "model": "NVIDIA Corporation GA104 [GeForce RTX 3070]",
    "vendor": "nvidia",
    "managed": "true",
    "at_boot": "keep",
    "on_release": "host",
    "host_driver": "nvidia",
}

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def port_of(service: Service) -> int:
    """Where it listens, as its log says it."""
    ports: list[str] = re.findall(r"^metrics on 127\.0\.0\.1 port (\d+)$", service.log, re.MULTILINE)
    return int(ports[-1])


async def ask(port: int, request: bytes) -> str:
    """All that the answer to these bytes holds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return (await reader.read()).decode()
    except ConnectionResetError:
        return ""
    finally:
        writer.close()


async def scrape(service: Service) -> str:
    head, _, body = (await ask(port_of(service), b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    return body


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(all_samples: Samples, name: str, /, **labels: str) -> float:
    return all_samples[f"gpuswitch_{name}", frozenset(labels.items())]


def states(all_samples: Samples, gpu: str) -> set[str]:
    """The states that a GPU is in: one, one hopes."""
    return {
        dict(labels)["state"]
        for (name, labels), value in all_samples.items()
        if name == "gpuswitch_gpu_state" and ("gpu", gpu) in labels and value == 1
    }


async def test_a_scrape_tells_of_every_gpu_and_switch(start: Start) -> None:
    service = await start("laptop", "unbind@0000:01:00.1#3=EIO", config=NAMED)
    before = samples(await scrape(service))
    assert states(before, ADDRESS) == states(before, "0000:00:02.0") == {"host"}
    assert value(before, "build_info", version=__version__) == 1
    assert value(before, "gpu_info", gpu=ADDRESS, **GEFORCE) == 1

    for target in ("vfio", "host", "vfio"):
        await service.wait(DISCRETE, await service.move(DISCRETE, target))
    after = samples(await scrape(service))
    assert states(after, ADDRESS) == {"host"}
    assert value(after, "switches_total", gpu=ADDRESS, target="vfio", result="done") == 1
    assert value(after, "switches_total", gpu=ADDRESS, target="host", result="done") == 1
    assert value(after, "switches_total", gpu=ADDRESS, target="vfio", result="reverted") == 1
    for target in ("vfio", "host"):
        assert value(after, "switch_duration_seconds_count", gpu=ADDRESS, target=target) == 1
        assert value(after, "switch_duration_seconds_bucket", gpu=ADDRESS, target=target, le="+Inf") == 1
    assert value(after, "step_duration_seconds_count", step="unbind") == 7
    shown = await service.properties(DISCRETE)
    assert value(after, "state_since_timestamp_seconds", gpu=ADDRESS) == pytest.approx(shown["StateSince"], abs=1e-3)


async def test_what_is_missed_at_boot_is_told_until_it_is_moved(start: Start) -> None:
    service = await start("plain", "unbind@0000:01:00.1#1=EIO", config=f'{NAMED}at_boot = "vfio"\n')
    before = samples(await scrape(service))
    assert states(before, ADDRESS) == {"host"}
    assert value(before, "at_boot_missed", gpu=ADDRESS) == 1
    assert value(before, "switches_total", gpu=ADDRESS, target="vfio", result="reverted") == 1
    await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
    after = samples(await scrape(service))
    assert (states(after, ADDRESS), value(after, "at_boot_missed", gpu=ADDRESS)) == ({"vfio"}, 0)


async def test_all_that_can_happen_is_counted_from_0_on(start: Start) -> None:
    """A counter that begins with its first event is at 1 when it is seen first, and has not risen since."""
    counted = samples(await scrape(await start("laptop")))
    for gpu in ADDRESS, "0000:00:02.0":
        for target, result in itertools.product(
            ("host", "vfio"), ("done", "reverted", "failed", "cancelled", "wedged")
        ):
            assert value(counted, "switches_total", gpu=gpu, target=target, result=result) == 0
        for target in ("host", "vfio"):
            assert value(counted, "switch_duration_seconds_count", gpu=gpu, target=target) == 0
        for error in errors.EXIT_CODES.keys() - {errors.AUTHENTICATION_REQUIRED}:
            reason = errors.snake_case(error.rpartition(".")[2])
            assert value(counted, "refusals_total", gpu=gpu, reason=reason) == 0
        for state in ("host", "vfio", "failed"):
            assert value(counted, "recoveries_total", gpu=gpu, state=state) == 0
        assert value(counted, "drifts_total", gpu=gpu) == value(counted, "switch_waiting", gpu=gpu) == 0
    for action, reason in itertools.product(Action, ("not_authorized", "interactive_authorization_required")):
        assert value(counted, "denials_total", action=str(action), reason=reason) == 0
    for step in names_of(Deadlines):
        assert value(counted, "step_duration_seconds_count", step=step) == 0


async def test_nothing_that_happens_adds_a_series(start: Start) -> None:
    """But for holders, and who owns what: these are not always known."""
    service = await start("laptop", "unbind@0000:01:00.1#3=EIO", config=NAMED)
    before = samples(await scrape(service))
    for target in ("vfio", "host", "vfio"):
        await service.wait(DISCRETE, await service.move(DISCRETE, target))
    with pytest.raises(PeerError):
        await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"busy": ("s", "sometimes")})
    new = samples(await scrape(service)).keys() - before.keys()
    assert {name for name, _ in new} == {"gpuswitch_holders"}


async def test_what_is_told_is_what_is_documented(start: Start) -> None:
    service = await start("plain", config=NAMED)
    await service.ask("AcquireForVm", "ssas", "win11", WIN11, [ADDRESS])
    await service.call(DISCRETE, f"{GPU}.Holders")
    told = {family.name: family for family in text_string_to_metric_families(await scrape(service))}
    others = {name for name in told if name.startswith(("process_", "python_"))}
    documented = {family.name.removesuffix("_total"): family for family in (*FAMILIES, *PROCESS_FAMILIES)}
    assert told.keys() - others == documented.keys()
    for name, family in documented.items():
        kind = "gauge" if family.type is Type.INFO else str(family.type)  # the text format has no other word
        assert (told[name].type, told[name].documentation) == (kind, family.help)
        for sample in told[name].samples:
            assert set(sample.labels) - {"le"} == set(family.labels)
    assert {
        "process_cpu_seconds",
        "process_open_fds",
        "process_max_fds",
        "python_gc_collections",
        "python_info",
    } <= others
    assert value(samples(await scrape(service)), "processes") >= 1


async def test_the_owner_is_told_for_as_long_as_there_is_one(start: Start) -> None:
    service = await start("plain", config=NAMED)
    owned = {"gpu": ADDRESS, "owner": "win11", "uuid": WIN11}
    assert "gpuswitch_gpu_owner" not in {name for name, _ in samples(await scrape(service))}
    await service.ask("AcquireForVm", "ssas", "win11", WIN11, [ADDRESS])
    assert value(samples(await scrape(service)), "gpu_owner", **owned) == 1
    await service.ask("ReleaseFromVm", "sss", "win11", WIN11, "shutdown")
    await service.until_state(DISCRETE, "host")
    assert "gpuswitch_gpu_owner" not in {name for name, _ in samples(await scrape(service))}


async def test_a_switch_that_waits_says_so(start: Start) -> None:
    """For what nobody ends: the display manager's program has the GPU open."""
    service = await start("single", config=f"{ANY_PORT}[defaults]\nallow_boot_display = true\n")
    await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"wait_seconds": ("d", 60.0)})
    while not told_properties([await service.signal()]).get("Switch", {}).get("waiting_for"):
        pass
    assert value(samples(await scrape(service)), "switch_waiting", gpu=ADDRESS) == 1


async def test_a_switch_under_way_is_seen_and_stops_no_scrape(start: Start) -> None:
    service = await start("laptop", "unbind=hang", config=f"{ANY_PORT}[deadlines]\nunbind = 0.2\n")
    await service.move(DISCRETE, "vfio")
    assert states(samples(await scrape(service)), ADDRESS) <= {"detaching", "wedged"}
    await service.until_state(DISCRETE, "wedged")
    assert states(samples(await scrape(service)), ADDRESS) == {"wedged"}


async def test_what_is_refused_is_counted_by_reason(start: Start) -> None:
    service = await start("single", config=ANY_PORT)
    for options in ({}, {}, {"busy": ("s", "sometimes")}):
        with pytest.raises(PeerError):
            await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", options)
    counted = samples(await scrape(service))
    assert value(counted, "refusals_total", gpu=ADDRESS, reason="busy") == 2
    assert value(counted, "refusals_total", gpu=ADDRESS, reason="invalid_argument") == 1


async def test_what_is_refused_to_a_virtual_machine_is_counted_too(start: Start) -> None:
    service = await start("single", config=NAMED)
    with pytest.raises(PeerError):
        await service.ask("AcquireForVm", "ssas", "win11", WIN11, [ADDRESS])
    assert value(samples(await scrape(service)), "refusals_total", gpu=ADDRESS, reason="busy") == 1


async def test_holders_are_those_of_the_last_look_and_no_scrape_looks(start: Start) -> None:
    service = await start("laptop", f"scan@{ADDRESS}#2=hang")
    unknown = samples(await scrape(service))
    assert not [name for name, _ in unknown if name == "gpuswitch_holders"]
    holders = await service.call(DISCRETE, f"{GPU}.Holders")
    seen = samples(await scrape(service))
    assert value(seen, "holders", gpu=ADDRESS) == len(holders) > 0
    assert ("gpuswitch_holders", frozenset({("gpu", "0000:00:02.0")})) not in seen


async def test_what_somebody_else_moved_is_counted() -> None:
    """A simulated machine has nobody else, so the observer is told by itself."""
    observer = metrics.MetricsObserver()
    record = record_in(State.UNKNOWN)
    observer.drifted(record, Drift(State.HOST, State.UNKNOWN, "one function is on vfio-pci", 0.0))
    assert observer.registry.get_sample_value("gpuswitch_drifts_total", {"gpu": ADDRESS}) == 1


async def test_recoveries_are_counted_by_the_state_that_they_ended_in() -> None:
    observer = metrics.MetricsObserver()
    for state in (State.HOST, State.FAILED, State.HOST):
        observer.recovered(record_in(state))
    for state, count in ((State.HOST, 2), (State.FAILED, 1)):
        labels = {"gpu": ADDRESS, "state": str(state)}
        assert observer.registry.get_sample_value("gpuswitch_recoveries_total", labels) == count


def record_in(state: State) -> GpuRecord:
    return cast("GpuRecord", SimpleNamespace(gpu=SimpleNamespace(address=PciAddress.parse(ADDRESS)), state=state))


def test_the_processes_below_ours_are_counted() -> None:
    registry = process_metrics.with_processes(CollectorRegistry())
    before, memory = (registry.get_sample_value(f"gpuswitch_processes{of}") for of in ("", "_resident_memory_bytes"))
    assert before is not None
    assert memory is not None
    with subprocess.Popen(["sh", "-c", "sleep infinity & echo there; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        [child] = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        counted, resident = (
            registry.get_sample_value(f"gpuswitch_processes{of}") for of in ("", "_resident_memory_bytes")
        )
        os.kill(int(child), signal.SIGKILL)
    assert counted == before + 2
    assert resident is not None
    assert resident > memory
    assert registry.get_sample_value("gpuswitch_processes") == before


async def test_promtool_finds_nothing_wrong(start: Start) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing; install it: apt-get install --no-install-recommends prometheus")
    service = await start("laptop")
    for target in ("vfio", "host"):
        await service.wait(DISCRETE, await service.move(DISCRETE, target))
    with pytest.raises(PeerError):
        await service.call(DISCRETE, f"{GPU}.ToVfio", "a{sv}", {"busy": ("s", "sometimes")})
    check = await asyncio.create_subprocess_exec(
        promtool, "check", "metrics",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip  # the command, then its channels
    said, _ = await check.communicate((await scrape(service)).encode())
    assert (check.returncode, said.decode()) == (0, "")


async def test_openmetrics_is_spoken_to_those_who_ask_for_it(start: Start) -> None:
    service = await start("laptop")
    accept = b"Accept: application/openmetrics-text;version=1.0.0\r\n"
    answer = await ask(port_of(service), b"GET /metrics HTTP/1.1\r\n" + accept + b"\r\n")
    assert "\r\nContent-Type: application/openmetrics-text; version=1.0.0" in answer
    assert answer.endswith("# EOF\n")


async def test_a_port_that_is_taken_stops_nothing_but_the_metrics(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = await start("laptop", config=f"[metrics]\nport = {port}\n")
        assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"
    assert f"no metrics: cannot listen on 127.0.0.1 port {port}: Address already in use" in service.log


async def test_a_reload_turns_the_metrics_off_and_on(start: Start) -> None:
    service = await start("laptop")
    port = port_of(service)
    write_config(service.config, "[metrics]\nenabled = false\n")
    await service.ask("Reload")
    with pytest.raises(ConnectionRefusedError):
        await ask(port, b"")
    write_config(service.config, f"[metrics]\nport = {port}\n")
    await service.ask("Reload")
    assert states(samples(await scrape(service)), ADDRESS) == {"host"}


async def test_idle_scrapers_and_a_large_request_hurt_nobody(start: Start) -> None:
    service = await start("laptop", config=NAMED)
    port = port_of(service)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
    assert await ask(port, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 1_000_000) == ""
    assert states(samples(await scrape(service)), ADDRESS) == {"host"}
    assert (await service.wait(DISCRETE, await service.move(DISCRETE, "vfio")))["result"] == "done"
    assert states(samples(await scrape(service)), ADDRESS) == {"vfio"}
    for _, writer in idle:
        writer.close()


# Over HTTPS, and in a file


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def with_tls(signed: Signed, more: str = "") -> str:
    return f'{ANY_PORT}certificate = "{signed.certificate}"\nkey = "{signed.key}"\n{more}'


async def over_tls(service: Service, tls: ssl.SSLContext) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(service), ssl=tls)
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()


async def test_metrics_over_https(start: Start, authority: Authority) -> None:
    service = await start("laptop", config=with_tls(authority.signs("server")))
    assert 'gpuswitch_gpu_state{gpu="0000:01:00.0",state="host"} 1.0' in await over_tls(service, authority.client())


async def test_a_reload_reads_the_certificate_again(start: Start, tmp_path: Path, authority: Authority) -> None:
    signed = authority.signs("server")
    service = await start("laptop", config=with_tls(signed))
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    for mine, theirs in zip(signed, other.signs("server"), strict=True):
        theirs.replace(mine)
    await service.ask("Reload")
    assert await over_tls(service, other.client())
    with pytest.raises(ssl.SSLCertVerificationError):
        await over_tls(service, authority.client())


async def test_a_reload_with_a_certificate_that_cannot_be_used_changes_nothing(
    start: Start, authority: Authority
) -> None:
    service = await start("laptop")
    signed = authority.signs("server")
    signed.key.chmod(0o644)
    write_config(service.config, NAMED.replace(ANY_PORT, with_tls(signed)))
    with pytest.raises(PeerError) as refused:
        await service.ask("Reload")
    assert refused.value.text == f"cannot use metrics.key: everybody may read {signed.key}; run: chmod o-r {signed.key}"
    assert states(samples(await scrape(service)), ADDRESS) == {"host"}
    assert (await service.properties(DISCRETE))["Name"] == ""


async def test_a_service_whose_certificate_cannot_be_used_starts_without_metrics_until_it_can(
    start: Start, authority: Authority
) -> None:
    """Never over plain HTTP."""
    signed = authority.signs("server")
    key = signed.key.read_bytes()
    signed.key.unlink()
    service = await start("laptop", config=with_tls(signed))
    assert "no metrics over HTTPS: cannot use metrics.key: cannot read" in service.log
    assert "metrics on" not in service.log
    signed.key.touch(mode=0o600)
    signed.key.write_bytes(key)
    await service.ask("Reload")
    assert await over_tls(service, authority.client())


def in_folder(folder: Path, more: str = "") -> str:
    return f'[metrics]\naddress = ""\ntextfile_directory = "{folder}"\n{more}'


async def until_written(folder: Path, words: str) -> str:
    """Wait for the file that says so; its text."""
    with Inotify() as changes:
        changes.add_watch(folder, Mask.MOVED_TO)
        while words not in (text := read(folder)):
            await changes.get()
    return text


def read(folder: Path) -> str:
    file = folder / "gpuswitch.prom"
    return file.read_text() if file.exists() else ""


async def test_metrics_in_a_file_alone(start: Start, tmp_path: Path) -> None:
    service = await start("laptop", config=in_folder(tmp_path))
    first = await until_written(tmp_path, f'gpuswitch_gpu_state{{gpu="{ADDRESS}",state="host"}} 1.0')
    assert "metrics on" not in service.log
    assert not re.findall(r"^(?:process|python)_", first, re.MULTILINE)
    await service.wait(DISCRETE, await service.move(DISCRETE, "vfio"))
    await until_written(tmp_path, f'gpuswitch_switches_total{{gpu="{ADDRESS}",result="done",target="vfio"}} 1.0')
    assert await service.end(signal.SIGTERM) == 0
    assert read(tmp_path) == ""


async def test_a_reload_moves_the_file(start: Start, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    service = await start("laptop", config=in_folder(one))
    await until_written(one, "gpuswitch_build_info")
    write_config(service.config, in_folder(other))
    await service.ask("Reload")
    await until_written(other, "gpuswitch_build_info")
    assert read(one) == ""
    write_config(service.config, in_folder(other, "enabled = false\n"))
    await service.ask("Reload")
    assert await service.end(signal.SIGTERM) == 0
    assert read(other) == ""


async def test_a_folder_that_is_not_there_is_said_once_and_stops_nothing(start: Start, tmp_path: Path) -> None:
    service = await start("laptop", config=in_folder(tmp_path / "gone"))
    for target in ("vfio", "host"):
        assert (await service.wait(DISCRETE, await service.move(DISCRETE, target)))["result"] == "done"
    assert await service.end(signal.SIGTERM) == 0
    sentence = f"the metrics are not kept in {tmp_path}/gone for now: No such file or directory"
    assert service.log.count(sentence) == 1
