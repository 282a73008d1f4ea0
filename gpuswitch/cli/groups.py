"""The verb that shows which functions can be given away together: `groups`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from gpuswitch.cli.client import Service
from gpuswitch.cli.layout import Fit, aligned, fitting, model_in_brief, remark
from gpuswitch.cli.output import as_json, clean, in_colour, line, width, write
from gpuswitch.cli.translate import _, added_word, marks, state_word

Values = Mapping[str, Any]

_CELLS = marks("address", "kind", "PCI ids", "driver", "remarks", "model")
"""They have no headings; so they are called where there is no room for them."""
_INDENT = "  "


def groups(service: Service, args: Namespace) -> int:
    found = grouped(service.groups())
    if args.json:
        as_json({"groups": found})
    elif found:
        _print_groups(found)
    else:
        line(_("there are no IOMMU groups: the IOMMU is off"))
    return 0


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
        **{key: value for key, value in function.items() if key not in {"group", "vendor", "device"}},
        "class": f"{function['class']:06x}",
        "vendor_id": f"{function['vendor']:04x}",
        "device_id": f"{function['device']:04x}",
    }


def _print_groups(groups: Iterable[Values]) -> None:
    groups = list(groups)
    rows = [_function_cells(function) for group in groups for function in group["functions"]]
    columns = width(sys.stdout)
    room = max(columns - len(_INDENT), 1) if columns else 0
    # What a maker calls it comes last, and goes first.
    narrow = ("model", "remarks", "PCI ids", "driver", "kind")
    fit = fitting(_CELLS, rows, room, elastic=("model",), left_out=narrow, brief={"model": model_in_brief}) or Fit(
        [row[:1] for row in rows], [*narrow]
    )
    lines = iter(aligned(fit.rows))
    for group in groups:
        line(_group_heading(group))
        for _function in group["functions"]:
            write(f"{_INDENT}{next(lines)}")
    if fit.left_out:
        named = ", ".join(map(_, fit.left_out))
        text = _("no room for {cells} of each function: shown on a wider terminal, and by --json", cells=named)
        for each in remark(text, columns, colour=in_colour(sys.stdout)):
            write(each)


def _function_cells(function: Values) -> list[str]:
    shown = (
        function["address"],
        f"{state_word(function['kind'])} [{function['class'][:4]}]",
        f"[{function['vendor_id']}:{function['device_id']}]",
        function["driver"] or "-",
        ", ".join((*(["GPU"] if function["gpu"] else []), *map(added_word, function["adds"]))),
        f"{function['maker']} {function['model']}".strip(),
    )
    return [clean(cell) for cell in shown]


def _group_heading(group: Values) -> str:
    number, gpus = group["group"], _(" and GPU ").join(group["gpus"])
    if not gpus:
        return _("IOMMU group {group}", group=number)
    if group["alone"]:
        return _("IOMMU group {group}: GPU {gpus} alone", group=number, gpus=gpus)
    others = [each["address"] for each in group["functions"] if not each["gpu"] and _counts(each)]
    if others:
        others_named = ", ".join(others)
        return _("IOMMU group {group}: GPU {gpus}, shared with {others}", group=number, gpus=gpus, others=others_named)
    return _("IOMMU group {group}: GPU {gpus}", group=number, gpus=gpus)
