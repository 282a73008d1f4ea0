"""The verbs that look and change nothing: `list`, `status`, `holders`, `groups`, `config`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpuswitch.cli.client import Service
from gpuswitch.cli.output import aligned, as_json, clean, duration, line, moment, pairs, table, warning
from gpuswitch.errors import snake_case

Values = Mapping[str, Any]


def list_gpus(service: Service, args: Namespace) -> int:
    gpus = service.gpus()
    if args.json:
        as_json([gpu_record(gpu) for gpu in gpus])
    elif gpus:
        owned, adding = any(any(gpu["Owner"]) for gpu in gpus), any(gpu["Adds"] for gpu in gpus)
        optional = ("OWNER",) if owned else (), ("WITH",) if adding else ()
        headings = ("GPU", "NAME", "STATE", "DRIVER", *optional[0], "IOMMU GROUP", *optional[1], "MODEL")
        table(headings, (_gpu_cells(gpu, owned=owned, adding=adding) for gpu in gpus))
    else:
        line("there is no GPU on this host")
    _warn(service)
    return 0


def _warn(service: Service) -> None:
    """Beside the answer, so that programs which read that do not meet it."""
    for sentence in service.warnings():
        warning(sentence)


def _gpu_cells(gpu: Values, *, owned: bool, adding: bool) -> tuple[str, ...]:
    return (
        gpu["Address"],
        gpu["Name"],
        gpu["State"],
        gpu["Driver"],
        *((_owner_words(gpu["Owner"]),) if owned else ()),
        " ".join(map(str, gpu["IommuGroups"])),
        *((", ".join(gpu["Adds"]),) if adding else ()),
        gpu["Model"],
    )


def _owner_words(owner: Sequence[str]) -> str:
    """The virtual machine by its name; by its uuid where it has none."""
    name, uuid = owner
    return name or uuid


def status(service: Service, args: Namespace) -> int:
    gpu = service.gpu(args.gpu).properties()
    if args.json:
        as_json(gpu_record(gpu))
    else:
        pairs(_status_lines(gpu))
    return 0


def holders(service: Service, args: Namespace) -> int:
    found = service.gpu(args.gpu).holders()
    if args.json:
        as_json(found)
    elif found:
        table(("PID", "COMMAND", "USER", "UNIT", "SESSION", "HAS OPEN", "TO FREE IT"), map(_holder_cells, found))
    else:
        line("nobody has it open")
    return 0


def _holder_cells(holder: Values) -> tuple[str, ...]:
    return (
        str(holder["pid"] or "kernel"),
        holder["command"],
        holder["user"],
        holder["unit"],
        holder["session"],
        " ".join(holder["nodes"]) or holder["doubt"],
        holder["remedy"],
    )


def groups(service: Service, args: Namespace) -> int:
    found = grouped(service.groups())
    if args.json:
        as_json(found)
    elif found:
        _print_groups(found)
    else:
        line("there are no IOMMU groups: the IOMMU is off")
    return 0


def config(service: Service, args: Namespace) -> int:
    settings = service.config()
    if args.json:
        as_json(settings)
    else:
        table(("KEY", "VALUE", "SET BY"), ((each["key"], each["value"], each["origin"]) for each in settings))
    _warn(service)
    return 0


def gpu_record(gpu: Values) -> dict[str, Any]:
    """The properties of a GPU as one JSON object. Times are seconds since the epoch, as on the bus."""
    record = {snake_case(name): value for name, value in gpu.items()}
    record["functions"] = [
        {"address": address, "kind": kind, "driver": driver} for address, kind, driver in gpu["Functions"]
    ]
    name, uuid = gpu["Owner"]
    record["owner"] = {"name": name, "uuid": uuid} if name or uuid else None
    record["switch"] = gpu["Switch"] or None
    return record


def grouped(functions: Iterable[Values]) -> list[dict[str, Any]]:
    """One record for each IOMMU group. `alone`: it has functions of one GPU, and beside them bridges, and pieces of
    the chipset without a driver, at most.
    """
    groups: dict[int, list[Values]] = {}
    for function in functions:
        groups.setdefault(int(function["group"]), []).append(function)
    records = []
    for number, members in sorted(groups.items()):
        members.sort(key=lambda function: str(function["address"]))
        endpoints = [function for function in members if _counts(function)]
        gpus = sorted({str(function["gpu"]) for function in endpoints if function["gpu"]})
        alone = len(gpus) == 1 and all(function["gpu"] for function in endpoints)
        records.append({"group": number, "gpus": gpus, "alone": alone, "functions": [_ids(each) for each in members]})
    return records


def _counts(function: Values) -> bool:
    """Whether it is more than a piece of the board: host and ISA bridges are, where a driver has them."""
    return function["kind"] != "bridge" and not (function["kind"] == "chipset" and not function["driver"])


def _ids(function: Values) -> dict[str, Any]:
    """A function with its numbers as people know them: class 030000, vendor 10de, device 2484."""
    return {
        **{key: value for key, value in function.items() if key != "group"},
        "class": f"{function['class']:06x}",
        "vendor": f"{function['vendor']:04x}",
        "device": f"{function['device']:04x}",
    }


def _print_groups(groups: Iterable[Values]) -> None:
    groups = list(groups)
    rows = [_function_cells(function) for group in groups for function in group["functions"]]
    lines = iter(aligned(rows))
    for group in groups:
        line(_group_heading(group))
        for _ in group["functions"]:
            line(f"  {next(lines)}")


def _function_cells(function: Values) -> list[str]:
    cells = (
        function["address"],
        f"{function['kind']} [{function['class'][:4]}]",
        f"[{function['vendor']}:{function['device']}]",
        function["driver"] or "-",
        ", ".join((*(["GPU"] if function["gpu"] else []), *function["adds"])),
        f"{function['maker']} {function['model']}".strip(),
    )
    return [clean(cell) for cell in cells]


def _group_heading(group: Values) -> str:
    heading = f"IOMMU group {group['group']}"
    if not group["gpus"]:
        return heading
    heading += f": GPU {' and GPU '.join(group['gpus'])}"
    if group["alone"]:
        return f"{heading} alone"
    others = [each["address"] for each in group["functions"] if not each["gpu"] and _counts(each)]
    return f"{heading}, shared with {', '.join(others)}" if others else heading


def _status_lines(gpu: Values) -> Iterable[tuple[str, str]]:
    yield "GPU", f"{gpu['Address']} {gpu['Name']}".rstrip()
    yield "model", gpu["Model"] or gpu["Vendor"]
    yield "state", f"{state_words(gpu)} since {moment(gpu['StateSince'])}"
    for number, sentence in enumerate(gpu["Reason"].splitlines()):
        yield "" if number else "reason", sentence
    if gpu["State"] == "failed":
        yield "to do", what_to_do(gpu)
    for number, (address, kind, driver) in enumerate(gpu["Functions"]):
        yield "" if number else "functions", f"{address} {kind} on {driver or 'no driver'}"
    yield "host driver", gpu["HostDriver"] or "-"
    if gpu["TrialEnds"]:
        yield "trial ends", f"{moment(gpu['TrialEnds'])}; to keep it on vfio: gpuswitchctl to-vfio {gpu['Address']}"
    if gpu["StaysOut"]:
        yield (
            "stays out",
            "tried again by to-host, when a user of it is gone, when its driver is loaded anew, at a start",
        )
    if gpu["Adds"]:
        yield "with", ", ".join(gpu["Adds"])
    yield "IOMMU groups", " ".join(map(str, gpu["IommuGroups"])) or "-"
    yield "managed", "yes" if gpu["Managed"] else "no"
    if any(gpu["Owner"]):
        name, uuid = gpu["Owner"]
        yield "owner", f"{name} ({uuid})" if name and uuid else name or uuid
    if gpu["Switch"]:
        yield "last switch" if gpu["Switch"]["result"] else "switch", _switch_words(gpu["Switch"])


def what_to_do(gpu: Values) -> str:
    """About a GPU that is `failed`."""
    return f"put right what is named here, then: gpuswitchctl recover {gpu['Address']}"


def state_words(gpu: Values) -> str:
    """`host-nvidia`, `host-none`: what people call `host`; every other state by its own word."""
    return f"host-{gpu['Driver'] or 'none'}" if gpu["State"] == "host" else str(gpu["State"])


def _switch_words(switch: Values) -> str:
    words = f"{switch['id']} to {switch['target']}: "
    if not switch["result"]:
        return f"{words}at step {switch['index']} of {switch['count']}, {switch['title']}"
    words += f"{switch['result']} at {moment(switch['finished'])}"
    words += f" after {duration(switch['finished'] - switch['started'])}"
    return f"{words}: {'; '.join(switch['reason'].splitlines())}" if switch["reason"] else words
