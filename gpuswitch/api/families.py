"""Every metric of the service by name, type, labels and meaning. docs/metrics.md is made from this."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from gpuswitch.config.schema import LONGEST_DEADLINE, LONGEST_WAIT


class Type(StrEnum):
    """As Prometheus has it; `info` is a gauge of 1 whose labels are what is told."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


class Family(NamedTuple):
    """One metric; `name` is that of its series, of a histogram without `_bucket`, `_sum` and `_count`."""

    name: str
    type: Type
    labels: tuple[str, ...]
    help: str


BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, LONGEST_DEADLINE, 3600, LONGEST_WAIT)
"""Upper limits in seconds: up to the longest deadline of a step, and to the longest that holders are waited for."""

LABELS = {
    "gpu": "the address of the GPU, as `Address` on D-Bus: `0000:01:00.0`",
    "state": "one of the nine words of [states.md](states.md), as `State` on D-Bus",
    "target": "`host` or `vfio`, as `target` of a switch on D-Bus",
    "result": "`done`, `reverted`, `failed`, `cancelled` or `wedged`, as `SwitchFinished` on D-Bus has it",
    "action": "what was asked for, as polkit has it: `switch` is `org.gpuswitch1.switch`",
    "reason": "the name of the error on D-Bus, written as JSON has it: `not_viable` for `NotViable`",
    "step": "the kind of the step, as `kind` in `Plan` on D-Bus: a key of `[deadlines]`",
    "owner": "the name of the virtual machine",
    "uuid": "its UUID",
    "name": "`Name` on D-Bus: from the configuration, or empty",
    "model": "`Model` on D-Bus: maker and model from the hardware database",
    "vendor": "`Vendor` on D-Bus: `nvidia`, `amd`, `intel`, or the id",
    "managed": "`true` where the configuration has a table for it, else `false`",
    "at_boot": "where it is wanted when the machine has started: `host`, `vfio`, or `keep`",
    "on_release": "where it goes when its virtual machine is over: `host` or `stay`",
    "host_driver": "`HostDriver` on D-Bus: the driver of the display function at home, or empty",
    "version": "the version of gpuswitch",
}
"""What each label says."""

GPU_STATE = Family(
    "gpuswitch_gpu_state", Type.GAUGE, ("gpu", "state"), "1 for the state that a GPU is in, 0 for the eight others."
)
STATE_SINCE = Family(
    "gpuswitch_state_since_timestamp_seconds",
    Type.GAUGE,
    ("gpu",),
    "When a GPU entered its state, in seconds since the epoch.",
)
GPU_INFO = Family(
    "gpuswitch_gpu_info",
    Type.INFO,
    ("gpu", "name", "model", "vendor", "managed", "at_boot", "on_release", "host_driver"),
    "What is known of a GPU.",
)
GPU_OWNER = Family(
    "gpuswitch_gpu_owner",
    Type.GAUGE,
    ("gpu", "owner", "uuid"),
    "1 for the virtual machine, or the process, that owns a GPU; no series where none does.",
)
TRIAL_ENDS = Family(
    "gpuswitch_trial_ends_timestamp_seconds",
    Type.GAUGE,
    ("gpu",),
    "When a GPU goes home by itself, since its trial is over then, in seconds since the epoch; no series without one.",
)
HOLDERS = Family(
    "gpuswitch_holders",
    Type.GAUGE,
    ("gpu",),
    "How many had a GPU open when it was last looked for them; no series before the first time. No scrape looks.",
)
STAYS_OUT = Family(
    "gpuswitch_stays_out",
    Type.GAUGE,
    ("gpu",),
    "1 for a GPU whose last way home ended elsewhere and that nobody owns, else 0.",
)
AT_BOOT_MISSED = Family(
    "gpuswitch_at_boot_missed",
    Type.GAUGE,
    ("gpu",),
    "1 for a GPU that could not be brought where it is wanted at boot, and is not there, until it is moved; else 0.",
)
WAITING = Family(
    "gpuswitch_switch_waiting",
    Type.GAUGE,
    ("gpu",),
    "1 while a switch waits for something that it names (`waiting_for` on D-Bus), such as programs to end, else 0.",
)
WORKERS_STUCK = Family(
    "gpuswitch_workers_stuck", Type.GAUGE, (), "Worker processes that the kernel has not returned to."
)
STALLED = Family(
    "gpuswitch_actors_stalled",
    Type.GAUGE,
    (),
    "GPUs whose part of the program stands still: a fault of gpuswitch, after which systemd starts it anew.",
)
BUILD_INFO = Family("gpuswitch_build_info", Type.INFO, ("version",), "The version that runs.")

SWITCHES = Family(
    "gpuswitch_switches_total",
    Type.COUNTER,
    ("gpu", "target", "result"),
    "Switches that are over, by result. What had nothing to do is none.",
)
SWITCH_SECONDS = Family(
    "gpuswitch_switch_duration_seconds",
    Type.HISTOGRAM,
    ("gpu", "target"),
    "How long switches took that were done, in seconds; what they waited for counts.",
)
STEP_SECONDS = Family(
    "gpuswitch_step_duration_seconds", Type.HISTOGRAM, ("step",), "How long steps took that were done, in seconds."
)
REFUSALS = Family(
    "gpuswitch_refusals_total", Type.COUNTER, ("gpu", "reason"), "Requests that were refused, by the error."
)
DENIALS = Family(
    "gpuswitch_denials_total",
    Type.COUNTER,
    ("action", "reason"),
    "Calls that their caller was not allowed, by action and by the error.",
)
DRIFTS = Family("gpuswitch_drifts_total", Type.COUNTER, ("gpu",), "Times that somebody else moved a GPU.")
RECOVERIES = Family(
    "gpuswitch_recoveries_total",
    Type.COUNTER,
    ("gpu", "state"),
    "Recoveries that are over, by the state that they ended in: `host`, `vfio` or `failed`.",
)

FAMILIES = (
    *(GPU_STATE, STATE_SINCE, GPU_INFO, GPU_OWNER, TRIAL_ENDS, HOLDERS, STAYS_OUT),
    *(AT_BOOT_MISSED, WAITING, WORKERS_STUCK, STALLED, BUILD_INFO),
    *(SWITCHES, SWITCH_SECONDS, STEP_SECONDS, REFUSALS, DENIALS, DRIFTS, RECOVERIES),
)
"""What is told of the GPUs: over HTTP, and in the file for node_exporter."""

PROCESSES = Family(
    "gpuswitch_processes", Type.GAUGE, (), "The process of the service and those below it: workers, scanners, tools."
)
PROCESSES_MEMORY = Family(
    "gpuswitch_processes_resident_memory_bytes",
    Type.GAUGE,
    (),
    "Resident memory of all of these together; what they share counts once for each.",
)
PROCESS_FAMILIES = (PROCESSES, PROCESSES_MEMORY)
"""What is told of the service's own processes: over HTTP alone, beside what the client library has."""
