# Copyright: gpuswitch contributors
# SPDX-License-Identifier: Apache-2.0
"""What `gpuswitchctl --json` prints, read, and GPUs picked by what people call them: docs/json.md of gpuswitch has the forms.

Only the standard library: it runs with whatever Python Ansible has on a host, and inside Ansible itself.
"""

from __future__ import annotations

import json
import re

READS_VERSION = 1
"""Of the JSON. The next one comes when a program that reads this one could go wrong."""

TARGETS = {"vfio": "to-vfio", "host": "to-host", "recovered": "recover"}
"""What a GPU may be asked to be, and the verb for that."""

ENVIRONMENT = {"LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
"""So that what it says is in one language, whoever's locale Ansible brings along."""

_ADDRESS = re.compile(r"(?:(?:pci_)?([0-9a-f]{4,8})[:_])?([0-9a-f]{2})[:_]([0-9a-f]{2})[._]([0-7])", re.IGNORECASE)


class CtlError(Exception):
    """One sentence for a person."""


class ForeignVersionError(CtlError):
    """The host's gpuswitchctl is of a release that this collection was not made for."""


def read(status, out, err, what):
    """The objects that a command printed, in order.

    `what` is the command in words. Raises CtlError where it is not the JSON that we know; an error that it printed is an object.
    """
    objects, rest, decoder = [], out.strip(), json.JSONDecoder()
    while rest:
        try:
            told, end = decoder.raw_decode(rest)
        except ValueError:
            raise CtlError(_no_json(status, rest, err, what)) from None
        if not isinstance(told, dict) or "version" not in told:
            raise CtlError(_no_json(status, rest, err, what))
        if told["version"] != READS_VERSION:
            raise ForeignVersionError(
                f"cannot read what {what} prints: its JSON has version {told['version']}, and this collection reads version "
                f"{READS_VERSION}; install the collection that belongs to the gpuswitch of this host"
            )
        objects.append(told)
        rest = rest[end:].lstrip()
    if not objects:
        raise CtlError(_no_json(status, "", err, what))
    return objects


def _no_json(status, out, err, what):
    last = (err.strip() or out.strip() or "nothing").splitlines()[-1]
    return f"{what} ended with status {status} and printed no JSON that this collection knows: {last}"


def called(gpu):
    """`rtx3070 (0000:01:00.0)`, or the address alone."""
    return "{0} ({1})".format(gpu["name"], gpu["address"]) if gpu["name"] else gpu["address"]


def select(gpus, words):
    """Those of the GPUs of a host that these words name, each once: addresses, names, models, or `all`; without words, the only one.

    `all` are those that the host's configuration has a table for. Raises CtlError.
    """
    if not words:
        if len(gpus) == 1:
            return list(gpus)
        if not gpus:
            raise CtlError("this host has no GPU")
        raise CtlError(f"this host has {len(gpus)} GPUs: say which, by `gpu`: {_listed(gpus)}")
    chosen = []
    for word in words:
        chosen += [gpu for gpu in _named(gpus, word) if gpu not in chosen]
    return chosen


def _named(gpus, word):
    if word == "all":
        managed = [gpu for gpu in gpus if gpu["managed"]]
        if not managed:
            raise CtlError(
                f"`all` is no GPU of this host: none has a [[gpu]] table in its configuration; this host has {_listed(gpus)}"
            )
        return managed
    if match := _ADDRESS.fullmatch(word):
        domain, bus, slot, number = match.groups()
        address = ("{0}:{1}:{2}.{3}".format((domain or "0000").zfill(4), bus, slot, number)).lower()
        found = [gpu for gpu in gpus if address in [gpu["address"]] + [each["address"] for each in gpu["functions"]]]
    else:
        found = [gpu for gpu in gpus if gpu["name"] == word] or _of_model(gpus, word)
    if not found:
        raise CtlError(f"{word!r} is no GPU of this host: this host has {_listed(gpus)}")
    if len(found) > 1:
        raise CtlError(
            f"the model {word!r} is that of {len(found)} GPUs of this host; name one by its address: {_listed(found)}"
        )
    return found


def _of_model(gpus, word):
    """Whole, or else a part of it, whatever the case."""
    wanted = word.casefold()
    return [gpu for gpu in gpus if gpu["model"].casefold() == wanted] or [
        gpu for gpu in gpus if wanted and wanted in gpu["model"].casefold()
    ]


def _listed(gpus):
    return ", ".join("{0}, {1}".format(called(gpu), gpu["model"]) for gpu in gpus) or "none"


def drivers(gpu):
    """The driver of each function, by address; "" for none."""
    return {function["address"]: function["driver"] for function in gpu["functions"]}


def drivers_after(gpu, steps):
    """The same as it will be after the steps of a plan."""
    after = drivers(gpu)
    for step in steps:
        after.update(step.get("drivers", {}))
    return after


def command_of(module):
    """The command of the host that a module runs on. Fails the module where there is none."""
    program = module.get_bin_path(module.params["executable"])
    if program is None:
        module.fail_json(
            msg=f"cannot find {module.params['executable']} on this host: install gpuswitch there (the role "
            "gpuswitch.gpuswitch.host does), or give its path as `executable`"
        )
    return Ctl(lambda words: module.run_command(words, environ_update=ENVIRONMENT), program)


class Ctl:
    """The command of a host. `run` takes a list of words, and gives exit status, standard output and standard error."""

    def __init__(self, run, program="gpuswitchctl"):
        self._run = run
        self._program = program

    def ask(self, *words):
        """The exit status, and all objects that it printed. Raises CtlError where they cannot be read."""
        status, out, err = self._run([self._program, *words, "--json"])
        return status, read(status, out, err, f"gpuswitchctl {words[0]}")

    def one(self, *words):
        """The one object that it printed. Raises CtlError with what it said, where that is an error."""
        _status, objects = self.ask(*words)
        for told in objects:
            if told.get("event") == "error":
                raise CtlError("gpuswitchctl {0}: {1}".format(words[0], told["error"]["text"]))
        return objects[0]

    def gpus(self):
        """Every GPU of the host."""
        return self.one("list")["gpus"]

    def release(self):
        return self.one("--version")["release"]


class Failure:
    """Why one GPU is not as it was asked to be."""

    def __init__(self, gpu, name, kind, text, blockers=()):
        self.gpu, self.name, self.kind, self.text, self.blockers = gpu, name, kind, text, list(blockers)

    @classmethod
    def of_error(cls, told):
        return cls(told["gpu"], told["name"], told["error"]["kind"], told["error"]["text"], told["blockers"])

    @classmethod
    def of_result(cls, told):
        return cls(told["gpu"], told["name"], told["error_kind"] or told["result"], told["reason"] or told["result"])

    def as_dict(self):
        return {"gpu": self.gpu, "name": self.name, "kind": self.kind, "text": self.text}

    def sentence(self):
        if not self.gpu:
            return self.text
        return "{0}: {1}".format(called({"address": self.gpu, "name": self.name}), self.text)


class Move:
    """GPUs are brought to a state, or it is looked at what that would do.

    `options` are words for the verb: `--busy`, `terminate`. After `look`, and then `plan` or `run`, there are `before` and `after`
    (records of the GPUs; `after` is None of what was only planned), `results`, `plans`, `failures`.
    """

    def __init__(self, ctl, state, options=()):
        self._ctl = ctl
        self._state = state
        self._options = list(options)
        self.before, self.after = [], None
        self.results, self.plans, self.failures = [], [], []

    def look(self, words):
        """Pick the GPUs. Raises CtlError."""
        self.before = select(self._ctl.gpus(), words)

    def plan(self):
        """Have the service say what it would do. Raises CtlError."""
        for gpu in self.before:
            # a recovery has no plan: it is nothing to a GPU in a known-good state, else it is refused by what refuses the way home
            if self._state == "recovered" and gpu["state"] in ("host", "vfio") and not gpu["stays_out"]:
                continue
            target = "vfio" if self._state == "vfio" else "host"
            _status, objects = self._ctl.ask("plan", gpu["address"], target, *self._options)
            for told in objects:
                if told.get("event") == "error":
                    self.failures.append(Failure.of_error(told))
                else:
                    self.plans += told["plans"]

    def run(self, timeout=None):
        """Do it, and look again; watch for so many seconds. Raises CtlError."""
        addresses = [gpu["address"] for gpu in self.before]
        watch = [] if timeout is None else ["--timeout", str(timeout)]
        status, objects = self._ctl.ask(TARGETS[self._state], *addresses, *self._options, *watch)
        for told in objects:
            if told.get("event") == "error":
                self.failures.append(Failure.of_error(told))
            elif told.get("event") == "result":
                self.results.append(told)
                if told["result"] != "done":
                    self.failures.append(Failure.of_result(told))
        try:
            now = {gpu["address"]: gpu for gpu in self._ctl.gpus()}
        except CtlError:
            if not self.failures:
                raise
            now = {}  # what went wrong before says more
        # one that has left the bus is told as it was
        self.after = [now.get(gpu["address"], gpu) for gpu in self.before]
        if status != 0 and not self.failures:
            self.failures += [
                Failure(gpu["address"], gpu["name"], gpu["state"], gpu["reason"] or "it is {0}".format(gpu["state"]))
                for gpu in self.after
                if gpu["state"] != self._state
            ]

    @property
    def changed(self):
        """Whether a GPU is elsewhere than before, or would be."""
        if self.after is None:
            return any(plan["steps"] for plan in self.plans)
        moved = any(drivers(old) != drivers(new) for old, new in zip(self.before, self.after))
        return moved or any(result["changed"] for result in self.results)

    @property
    def diff(self):
        """Drivers before and after, by GPU and function."""
        if self.after is None:
            steps = {plan["gpu"]: plan["steps"] for plan in self.plans}
            after = {called(gpu): drivers_after(gpu, steps.get(gpu["address"], [])) for gpu in self.before}
        else:
            after = {called(gpu): drivers(gpu) for gpu in self.after}
        return {"before": {called(gpu): drivers(gpu) for gpu in self.before}, "after": after}

    @property
    def blockers(self):
        """All that is in the way, each with its GPU."""
        return [
            {"gpu": failure.gpu, "name": failure.name, **each} for failure in self.failures for each in failure.blockers
        ]

    def as_dict(self):
        """What the module returns."""
        return {
            "changed": self.changed,
            "diff": self.diff,
            "gpus": self.before if self.after is None else self.after,
            "results": self.results,
            "plans": self.plans,
            "failures": [failure.as_dict() for failure in self.failures],
            "blockers": self.blockers,
            "wedged": [failure.gpu for failure in self.failures if failure.kind == "wedged"],
        }

    def sentence(self):
        """Why it failed; "" where it did not."""
        return "; ".join(failure.sentence() for failure in self.failures)
