"""The unit file: what the service may do there, and what would break it. tests/real_system runs it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

UNITS = Path(__file__).parents[2] / "units"
UNIT = UNITS / "gpuswitchd.service.in"
TEMPLATE = UNITS / "gpuswitch-vfio@.service.in"

CAPABILITIES = {
    "CAP_DAC_OVERRIDE": "/dev/vfio/GROUP of another user",
    "CAP_DAC_READ_SEARCH": "the scan for holders",
    "CAP_FOWNER": "/dev/vfio/GROUP of one user, handed to another",
    "CAP_KILL": "ending processes of other users",
    "CAP_SETGID": "systemctl --user",
    "CAP_SETUID": "systemctl --user",
    "CAP_SYS_ADMIN": "a driver's probe and remove",
    "CAP_SYS_MODULE": "modprobe",
    "CAP_SYS_PTRACE": "the scan for holders",
}
BREAKS_IT = (
    *("IPAddressDeny", "PrivateDevices", "PrivateNetwork", "PrivateUsers"),
    *("ProcSubset", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc"),
    # a service that is throttled misses its deadlines
    "MemoryHigh",
    # with it, a service that hangs would be left running beside its successor
    "SendSIGKILL",
)


def settings(unit: Path = UNIT) -> dict[str, list[str]]:
    """Each key with its values, in order."""
    found = defaultdict(list)
    for line in unit.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key].append(value)
    return found


def test_it_has_the_capabilities_that_it_needs_and_no_other() -> None:
    given = " ".join(settings()["CapabilityBoundingSet"]).split()
    assert sorted(given) == sorted(CAPABILITIES)
    text = UNIT.read_text()
    assert [name for name in CAPABILITIES if f"{name.removeprefix('CAP_')}" not in reasons(text)] == []


def reasons(text: str) -> str:
    """The comments of the file."""
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def test_nothing_in_it_breaks_the_service() -> None:
    assert [key for key in BREAKS_IT if key in settings()] == []


def test_homes_are_hidden_and_the_users_managers_are_not() -> None:
    assert settings()["ProtectHome"] == ["tmpfs"]
    assert settings()["BindReadOnlyPaths"] == ["-/run/user"]
    assert settings()["ProtectSystem"] == ["strict"]


def test_what_is_left_out_has_its_reason() -> None:
    assert [key for key in BREAKS_IT if f"{key}=" not in reasons(UNIT.read_text())] == []


def test_of_devices_it_opens_characters_alone() -> None:
    assert (settings()["DevicePolicy"], settings()["DeviceAllow"]) == (["closed"], ["char-* rwm"])


def test_it_has_room_for_what_was_measured_with_128_gpus() -> None:
    """62 MB for the service, and two workers of 5 MB for each GPU."""
    [memory], [tasks] = settings()["MemoryMax"], settings()["TasksMax"]
    assert int(memory.removesuffix("G")) << 10 >= 2 * (62 + 128 * 2 * 5)
    assert int(tasks) >= 2 * 400


def test_what_it_started_stays_when_it_stops() -> None:
    """Workers that are in the kernel, and the process that keeps the machine awake."""
    assert settings()["KillMode"] == ["process"]
    assert settings()["NoNewPrivileges"] == ["yes"]


def test_it_does_not_run_out_of_descriptors() -> None:
    """Each GPU has two workers, with a socket and a pidfd each; each client of the bus that waits has its own."""
    [limit] = settings()["LimitNOFILE"]
    assert int(limit) >= 8192


def test_a_unit_that_has_a_gpu_outlives_the_service_and_waits_for_none_that_the_way_home_starts() -> None:
    """Docs/adr/0058 has the reasons."""
    found = settings(TEMPLATE)
    assert (found["Wants"], "Requires" in found, "BindsTo" in found) == (["gpuswitchd.service"], False, False)
    assert (" ".join(found["After"]).split(), "Before" in found) == (
        ["dbus.socket", "dbus.service", "gpuswitchd.service"],
        False,
    )
    # It may end the child, and nothing else.
    assert found["KillMode"] == ["mixed"]
    assert found["CapabilityBoundingSet"] == [""]
