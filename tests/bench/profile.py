"""Where the time of one switch goes: each step, and what lies between two of them, as a client of the service sees it.

A machine in memory does what it is asked at once: all that is left is ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from jeepney import HeaderFields, MatchRule, message_bus, new_method_call

from tests.bench import here
from tests.bench.builds import DEVELOPED
from tests.bench.here import GPU, SWITCHES, Service
from tests.bench.table import Row, text


class Part(NamedTuple):
    """A stretch of a switch. `before`: the seconds until it begins, since the last one; `seconds` it takes itself."""

    title: str
    before: float
    seconds: float


def rows(method: str) -> Iterator[Row]:
    """Of the second switch there: what is loaded and started once is there by then."""
    with here.serving(DEVELOPED) as service:
        for each in SWITCHES:
            here.switch(service.connection, each)
        if method != SWITCHES[0]:
            here.switch(service.connection, SWITCHES[0])
        parts = list(_parts(service, method))
    for part in parts:
        yield Row(part.title, text(part.before), text(part.seconds))
    yield Row("all", text(sum(part.before for part in parts)), text(sum(part.seconds for part in parts)))


def _parts(service: Service, method: str) -> Iterator[Part]:
    connection = service.connection
    rule = MatchRule(type="signal", interface=GPU.interface, path=GPU.object_path)
    connection.send_and_get_reply(message_bus.AddMatch(rule))
    with connection.filter(rule) as heard:
        begun = time.perf_counter()
        connection.send_and_get_reply(new_method_call(GPU, method, "a{sv}", ({},)), timeout=60)
        yield Part("from the call to its answer: look, guards, plan", 0.0, time.perf_counter() - begun)
        last = 0.0
        while True:
            message = connection.recv_until_filtered(heard, timeout=60)
            match message.header.fields[HeaderFields.member]:
                case "StepChanged":
                    _switch, _index, _count, _kind, title, status, seconds = message.body
                    if status == "done":
                        now = time.perf_counter() - begun
                        yield Part(title, max(now - seconds - last, 0.0) if last else 0.0, seconds)
                        last = now
                case "SwitchFinished":
                    yield Part("from the last step to the end", time.perf_counter() - begun - last, 0.0)
                    return
