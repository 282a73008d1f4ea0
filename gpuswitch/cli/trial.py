"""`trial`: to vfio, and home by itself after a while. The service sees to that; here it is counted down."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gpuswitch.cli.client import CtlError, Gpu, Service, StepChange
from gpuswitch.cli.output import as_json_line, clean, line, on_terminal, problem
from gpuswitch.cli.steps import display
from gpuswitch.cli.switch import EXIT_INTERRUPTED, finish, options_of
from gpuswitch.errors import Failed, Wedged

LONGEST_SECONDS = 86400
_HOME, _KEEP = "h", "k"
_ASKS_FOR = {_HOME: "host", _KEEP: "vfio"}


def trial(service: Service, args: Namespace) -> int:
    """To vfio, and then home by itself; on a terminal until that is over, or kept."""
    gpu = service.gpu(args.gpu)
    address = str(gpu.properties()["Address"])
    args.target = "vfio"
    try:
        switch = gpu.trial(args.seconds, options_of(args))
        outcome = _followed(gpu, switch, args)
    except KeyboardInterrupt:
        raise CtlError(
            f"interrupted; the trial, once begun, goes on: {args.seconds:g} s after {address} came to vfio, it goes "
            f"home by itself; to keep it there: gpuswitchctl to-vfio {address}",
            EXIT_INTERRUPTED,
        ) from None
    finish(outcome, gpu, address, args, purpose=f"try {address} on vfio", remark="not all went well")
    now = gpu.properties()
    if args.json:
        as_json_line({"event": "trial", "gpu": address, "trial_ends": now["TrialEnds"]})
        return 0
    if now["TrialEnds"] and not (on_terminal(sys.stdout) and sys.stdin.isatty()):
        line(_by_itself(address, now["TrialEnds"]))
        return 0
    return _ended(_counted_down(gpu, now), gpu, args)


def _by_itself(address: str, ends: float) -> str:
    moment = time.strftime("%H:%M:%S", time.localtime(ends))
    return f"{address} goes home by itself at {moment}; to keep it on vfio: gpuswitchctl to-vfio {address}"


def _followed(gpu: Gpu, switch: str, args: Namespace) -> Mapping[str, Any]:
    """Show its steps; its record once it is over."""
    outcome: Mapping[str, Any] = {}
    with display(switch, as_json=args.json) as shown:
        for event in gpu.follow(switch, None):
            if isinstance(event, StepChange):
                shown.step(event)
            else:
                outcome = event
    return outcome


def _counted_down(gpu: Gpu, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """Until it is on its way home, or not to go there by itself any more: what the service says of it then."""
    address = str(now["Address"])
    try:
        gpu.watch()
        while _counts(now):
            with _single_keys() as descriptor:
                key, now = _until_a_key(gpu, now, descriptor)
            if key:
                _ask(gpu, key, address)
                now = gpu.properties()
    except KeyboardInterrupt:
        raise CtlError(f"interrupted; {_by_itself(address, now['TrialEnds'])}", EXIT_INTERRUPTED) from None
    except CtlError as error:
        # The promise is on disk: whatever has become of the service, the next run of it keeps that.
        raise CtlError(f"{error}; once it runs, {_by_itself(address, now['TrialEnds'])}", error.exit_code) from None
    return now


def _until_a_key(gpu: Gpu, now: Mapping[str, Any], descriptor: int) -> tuple[str, Mapping[str, Any]]:
    """Show how long is left, until one of the two keys is pressed, or ("") nothing is to be counted any more."""
    told = ""
    while _counts(now):
        if now["Reason"] not in {"", told}:
            told = now["Reason"]
            _in_place("")
            problem(told)
        left = now["TrialEnds"] - time.time()
        _in_place(_words(math.ceil(left)))
        # From then on, nothing changes but by a key, or by what the service tells.
        seconds = left - math.ceil(left) + 1 if left > 0 else None
        if gpu.pause(seconds, descriptor) and (key := _typed(descriptor)) in _ASKS_FOR:
            return key, now
        now = gpu.properties()
    return "", now


def _counts(now: Mapping[str, Any]) -> bool:
    return bool(now["State"] == "vfio" and now["TrialEnds"])


def _ask(gpu: Gpu, key: str, address: str) -> None:
    """What that comes to is seen by where the GPU is; what refuses it stands in nobody's way."""
    try:
        gpu.move(_ASKS_FOR[key], {})
    except CtlError as error:
        problem(f"cannot {f'bring {address} home' if key == _HOME else f'keep {address}'} now: {error}")


def _ended(now: Mapping[str, Any], gpu: Gpu, args: Namespace) -> int:
    """Say how the trial ended."""
    address, switch = str(now["Address"]), now["Switch"]
    if switch and switch["target"] == "host":
        args.target = "host"
        outcome = _followed(gpu, switch["id"], args)
        return finish(outcome, gpu, address, args, purpose=f"bring {address} home", remark="not all went well")
    if now["State"] != "vfio" or now["StaysOut"]:
        code = Wedged.exit_code if now["State"] == "wedged" else Failed.exit_code
        raise CtlError(f"cannot bring {address} home: it is {now['State']}: {now['Reason']}", code)
    if any(now["Owner"]):
        line(f"{address} stays on vfio: the virtual machine {now['Owner'][0] or now['Owner'][1]} has it")
    else:
        line(f"{address} stays on vfio: gpuswitchctl to-host {address} brings it home")
    return 0


# The terminal ---------------------------------------------------------------------------------------------------------


def _words(seconds: int) -> str:
    import shutil  # noqa: PLC0415 -- for a countdown alone

    when = f"home in {seconds} s" if seconds > 0 else "home when possible"
    long, short = f"{when}; press h for back now, k to keep it", f"{when} (h now, k keep)"
    return long if len(long) < shutil.get_terminal_size().columns else short


def _in_place(text: str) -> None:
    """On the line where the cursor is; nothing further down."""
    sys.stdout.write(f"\r{clean(text)}\x1b[K")
    sys.stdout.flush()


def _typed(descriptor: int) -> str:
    """One key; where there is no terminal any more, as ^C."""
    import os  # noqa: PLC0415 -- for a countdown alone

    try:
        if typed := os.read(descriptor, 1):
            return typed.decode(errors="replace").lower()
    except OSError:  # EIO: the terminal has gone
        pass
    raise KeyboardInterrupt


@contextmanager
def _single_keys() -> Iterator[int]:
    """Keys come one by one, unseen, from this descriptor; whatever happens, the terminal is as it was afterwards."""
    import signal  # noqa: PLC0415 -- for a countdown alone
    import termios  # noqa: PLC0415 -- as above
    import tty  # noqa: PLC0415 -- as above

    def ended(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    handlers = {number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)
        yield descriptor
    finally:
        _in_place("")
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
