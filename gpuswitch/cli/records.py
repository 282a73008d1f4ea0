"""What `--json` shows of a GPU, a switch, a holder: docs/json.md has each form. Also the words for a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpuswitch.cli.failures import with_error_kind
from gpuswitch.cli.output import moment, rfc3339
from gpuswitch.cli.translate import _, recognized, state_word
from gpuswitch.errors import snake_case

if TYPE_CHECKING:
    from gpuswitch.cli.client import Gpu
    from gpuswitch.cli.follow import StepChange, Waiting

Values = Mapping[str, Any]

_TIMES = ("step_started", "waiting_until", "started", "finished")


def state_label(gpu: Values) -> str:
    """`host-nvidia`, `host-none`: what people call `host`; every other state by its own word, in their language."""
    return f"host-{gpu['Driver'] or 'none'}" if gpu["State"] == "host" else state_word(str(gpu["State"]))


def reasons(gpu: Values) -> tuple[str, str]:
    """Why it is where it is, as far as that is so now; and why its last switch, which is over, left it there.

    A sentence a line.
    """
    reason, switch = str(gpu["Reason"]), gpu["Switch"]
    past = str(switch["reason"]) if switch and switch["result"] else ""
    # Where it is not to stay, the reason is what keeps it there.
    if not past or gpu["State"] not in {"host", "vfio"} or gpu["StaysOut"] or not reason.startswith(past):
        return reason, ""
    return reason.removeprefix(past).removeprefix("; "), past


def came_back(switch: Values) -> list[str]:
    """Of one that was wedged: that the kernel has returned since, when, and where that left the GPU; in sentences."""
    # A service that is older does not say.
    if not (returned := switch.get("returned")):
        return []
    at, state = moment(returned["at"]) if returned["at"] else "", state_word(returned["state"])
    if returned["state"] == "recovering":
        said = _("the kernel has returned at {moment}, and what was begun is taken back", moment=at)
    elif at:
        said = _(
            "the kernel returned at {moment} by itself; the state of the GPU after that: {state}",
            moment=at,
            state=state,
        )
    else:
        said = _(
            "the kernel returned while the service was away; the state of the GPU after that: {state}", state=state
        )
    return [said, *recognized(returned["reason"]).splitlines()]


def _returned_record(switch: Values) -> dict[str, Any] | None:
    returned = switch.get("returned")
    return {**returned, "at": rfc3339(returned["at"])} if returned else None


def naming(gpu: Gpu) -> dict[str, str]:
    """Which GPU it is about: its address, and its name, "" where it has none."""
    return {"gpu": gpu.address, "name": gpu.name}


def remedies_of(gpu: Values) -> list[Values]:
    """What the service says that may help, by the properties of a GPU; none where it is older, and says nothing."""
    return list(gpu.get("Remedies", ()))


def gpu_record(gpu: Values) -> dict[str, Any]:
    """The properties of a GPU."""
    # A service that is older does not say which.
    record = {"stopped_units": [], **{snake_case(name): value for name, value in gpu.items()}}
    record["state_label"] = state_label(gpu)
    record["state_since"] = rfc3339(gpu["StateSince"])
    record["trial_ends"] = rfc3339(gpu["TrialEnds"])
    record["functions"] = [
        {"address": address, "kind": kind, "driver": driver} for address, kind, driver in gpu["Functions"]
    ]
    name, uuid = gpu["Owner"]
    record["owner"] = {"name": name, "uuid": uuid} if name or uuid else None
    record["remedies"] = [{"kind": each["kind"], "text": each["text"]} for each in remedies_of(gpu)]
    record["switch"] = switch_record(gpu["Switch"]) if gpu["Switch"] else None
    return record


def switch_record(switch: Values) -> dict[str, Any]:
    """A switch that is under way or was the last of its GPU."""
    record = {**with_error_kind(switch), **{key: rfc3339(switch[key]) for key in _TIMES}}
    # A service that is older does not say.
    record["requester"] = record.pop("asker", None)
    record["returned"] = _returned_record(switch)
    record["deadline_seconds"] = record.pop("deadline", 0.0) or None
    return {**record, "result": switch["result"] or None, "seconds": seconds_of(switch)}


def change_record(change: StepChange) -> dict[str, Any]:
    """What has become of a step."""
    return {**change._asdict(), "seconds": round(change.seconds, 6)}


def waiting_record(waiting: Waiting) -> dict[str, Any]:
    """What a step waits for."""
    return {"for": waiting.what, "since": rfc3339(waiting.since), "until": rfc3339(waiting.until)}


def seconds_of(switch: Values) -> float | None:
    """How long it took; None: it is not over."""
    return round(switch["finished"] - switch["started"], 6) if switch["finished"] else None


def planned_record(step: Values) -> dict[str, Any]:
    """A step of a plan."""
    record = {"starts": [], **{key: value for key, value in step.items() if key != "deadline"}}
    return {**record, "deadline_seconds": step["deadline"]}


def entry_record(entry: Values, name: str = "") -> dict[str, Any]:
    """A finished switch as the history has it; `name` is what its GPU is called now."""
    record = {key: value for key, value in entry.items() if key not in {"asker", "steps"}}
    record |= {"started": rfc3339(entry["started"]), "finished": rfc3339(entry["finished"])}
    record |= {"name": name, "seconds": seconds_of(entry), "requester": entry["asker"]}
    record["returned"] = _returned_record(entry)
    if "steps" in entry:
        record["steps"] = list(map(_step_record, entry["steps"]))
    return record


def _step_record(step: Values) -> dict[str, Any]:
    seconds = None if step["status"] == "interrupted" else step["seconds"]
    return {**step, "started": rfc3339(step["started"]), "seconds": seconds}
