"""`trial`: to vfio, and home by itself after a while. The service sees to that; here it is counted down."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gpuswitch.cli.asking import is_to_ask
from gpuswitch.cli.client import Gpu, Service
from gpuswitch.cli.failures import EXIT_INTERRUPTED, CtlError
from gpuswitch.cli.keys import pressed, single_keys
from gpuswitch.cli.output import as_json_line, clean, clock, in_foreground, line, on_terminal, problem, rfc3339
from gpuswitch.cli.parser import terminal_columns
from gpuswitch.cli.records import naming
from gpuswitch.cli.switch import Switches, options_of
from gpuswitch.cli.translate import _, recognized, state_word
from gpuswitch.cli.ways_out import ways_out, with_options
from gpuswitch.cli.what_ends import ask_before_a_desktop_ends
from gpuswitch.errors import EXIT_UNREACHABLE, Failed, Wedged

_HOME, _KEEP = "h", "k"
_ASKS_FOR = {_HOME: "host", _KEEP: "vfio"}


def trial(service: Service, args: Namespace) -> int:
    """To vfio, and then home by itself; on a terminal until that is over, or kept."""
    gpu, options = service.gpu(args.gpu), options_of(args)
    if is_to_ask(args):
        ask_before_a_desktop_ends(service, [gpu], "vfio", options)
    command = f"gpuswitchctl trial {{}} --seconds {args.seconds:g}"
    try:
        status = Switches(
            service,
            args,
            begin=lambda gpu: gpu.trial(args.seconds, options),
            purpose=_("try {} on vfio"),
            again=with_options(command, options),
            ways_out=lambda gpu: ways_out([gpu], "vfio", options, command.format(gpu.word)),
            blockers=lambda gpu: gpu.blockers("vfio", options),
        ).run([gpu])
    except CtlError as error:
        if error.exit_code == EXIT_INTERRUPTED:
            raise _goes_on(gpu, args.seconds) from None
        raise
    if status:
        return status
    now = gpu.look()
    if args.json:
        as_json_line({"event": "trial", **naming(gpu), "trial_ends": rfc3339(now["TrialEnds"])})
        return 0
    counted = on_terminal(sys.stdout) and sys.stdin.isatty() and in_foreground(sys.stdout)
    if now["TrialEnds"] and not counted:
        line(_by_itself(gpu, now["TrialEnds"]))
        return 0
    before = now["Switch"].get("id")
    return _ended(_counted_down(service, gpu, now), service, gpu, args, before=before)


def _goes_on(gpu: Gpu, seconds: float) -> CtlError:
    text = _(
        "interrupted; the trial, once begun, goes on: {seconds} s after {gpu} came to vfio, it goes home by itself; to "
        "keep it there: {command}",
        seconds=f"{seconds:g}",
        gpu=gpu.title,
        command=f"gpuswitchctl to-vfio {gpu.word}",
    )
    return CtlError.interrupted(text)


def _by_itself(gpu: Gpu, ends: float) -> str:
    return _(
        "{gpu} goes home by itself at {time}; to keep it on vfio: {command}",
        gpu=gpu.title,
        time=clock(ends),
        command=f"gpuswitchctl to-vfio {gpu.word}",
    )


def _counted_down(service: Service, gpu: Gpu, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """Until it is on its way home, or not to go there by itself any more: what the service says of it then."""
    try:
        while _counts(now):
            with single_keys() as descriptor:
                try:
                    key, now = _until_a_key(service, gpu, now, descriptor)
                finally:
                    _in_place("")
            if key:
                _ask(service, gpu, key)
                now = gpu.look()
    except KeyboardInterrupt:
        text = _("interrupted; {what}", what=_by_itself(gpu, now["TrialEnds"]))
        raise CtlError.interrupted(text) from None
    except CtlError as error:
        if error.exit_code != EXIT_UNREACHABLE:
            raise
        # The promise is on disk: whatever has become of the service, the next run of it keeps that.
        text = _("{error}; once it runs, {what}", error=str(error), what=_by_itself(gpu, now["TrialEnds"]))
        raise CtlError(text, error.exit_code, name=error.name) from None
    return now


def _until_a_key(service: Service, gpu: Gpu, now: Mapping[str, Any], descriptor: int) -> tuple[str, Mapping[str, Any]]:
    """Show how long is left, until one of the two keys is pressed, or ("") nothing is to be counted any more."""
    told = ""
    while _counts(now):
        if now["Reason"] not in {"", told}:
            told = now["Reason"]
            _in_place("")
            problem(recognized(told))
        left = now["TrialEnds"] - time.time()
        _in_place(_words(math.ceil(left)))
        # From then on, nothing changes but by a key, or by what the service tells.
        seconds = left - math.ceil(left) + 1 if left > 0 else None
        if service.pause(seconds, descriptor) and (key := pressed(descriptor)) in _ASKS_FOR:
            return key, now
        now = gpu.look()
    return "", now


def _counts(now: Mapping[str, Any]) -> bool:
    return bool(now["State"] == "vfio" and now["TrialEnds"])


def _ask(service: Service, gpu: Gpu, key: str) -> None:
    """What that comes to is seen by where the GPU is; what refuses it stands in nobody's way."""
    try:
        service.ask_allowed(gpu.move(_ASKS_FOR[key], {}))
    except CtlError as error:
        if key == _HOME:
            problem(_("cannot bring {gpu} home now: {why}", gpu=gpu.title, why=recognized(str(error))))
        else:
            problem(_("cannot keep {gpu} now: {why}", gpu=gpu.title, why=recognized(str(error))))


def _ended(now: Mapping[str, Any], service: Service, gpu: Gpu, args: Namespace, *, before: str | None) -> int:
    """Say how the trial ended; `before` is the switch that was the last one when it was begun to count."""
    switch = now["Switch"]
    if switch and switch["target"] == "host" and switch["id"] != before:
        args.target = "host"
        Switches(
            service,
            args,
            begin=lambda gpu: gpu.move("host", {}),
            purpose=_("bring {} home"),
            again="gpuswitchctl to-host {}",
            blockers=lambda gpu: gpu.blockers("host", {}),
        ).to_the_end([(gpu, switch["id"])])
        return 0
    if now["State"] != "vfio" or now["StaysOut"]:
        kind = Wedged if now["State"] == "wedged" else Failed
        what = _(
            "cannot bring {gpu} home: it is {state}: {why}",
            gpu=gpu.title,
            state=state_word(now["State"]),
            why=recognized(now["Reason"]),
        )
        raise CtlError.of(kind, what)
    if any(now["Owner"]):
        owner = now["Owner"][0] or now["Owner"][1]
        line(_("{gpu} stays on vfio: it belongs to {owner}", gpu=gpu.title, owner=owner))
    else:
        home = f"gpuswitchctl to-host {gpu.word}"
        line(_("{gpu} stays on vfio: {command} brings it home", gpu=gpu.title, command=home))
    return 0


# The terminal ---------------------------------------------------------------------------------------------------------


def _words(seconds: int) -> str:
    when = _("home in {seconds} s", seconds=seconds) if seconds > 0 else _("home when possible")
    long = _("{when}; press h for back now, k to keep it", when=when)
    return long if len(long) < terminal_columns(sys.stdout) else _("{when} (h now, k keep)", when=when)


def _in_place(text: str) -> None:
    """On the line where the cursor is; nothing further down. One that has hung up is seen where keys are waited for."""
    with suppress(OSError):
        sys.stdout.write(f"\r{clean(text)}\x1b[K")
        sys.stdout.flush()
