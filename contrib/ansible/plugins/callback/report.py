# Copyright: gpuswitch contributors
# SPDX-License-Identifier: Apache-2.0
"""Says at the end what became of the GPUs of each host."""

DOCUMENTATION = r"""
name: report
type: aggregate
short_description: Say at the end of a playbook what became of the GPUs of each host
version_added: 0.1.0
author: gpuswitch contributors (!UNKNOWN)
description:
  - A line for each host of the plays that have the module P(gpuswitch.gpuswitch.gpu#module); what went wrong is said in the words of the host.
  - Hosts that no task reached since the playbook stopped before are told as such.
requirements:
  - to be named in C(callbacks_enabled) of ansible.cfg, or in C(ANSIBLE_CALLBACKS_ENABLED)
"""

from ansible.plugins.callback import CallbackBase

MODULES = ("gpu", "gpuswitch.gpuswitch.gpu")
NOT_BEGUN = "not begun"


class Host:
    """What became of one."""

    def __init__(self):
        self.moved, self.planned, self.reached, self.problem = [], [], False, ""
        self._wedged = False

    def add(self, told):
        """A result of the module."""
        plans = told.get("plans", ())
        if plans:
            self.planned += [f"{plan['name'] or plan['gpu']} to {plan['target']}" for plan in plans if plan["steps"]]
            return
        before, after = (told.get("diff", {}).get(when, {}) for when in ("before", "after"))
        for gpu in told.get("gpus", ()):
            name = "{0} ({1})".format(gpu["name"], gpu["address"]) if gpu["name"] else gpu["address"]
            # one that came to no known-good state has a problem, which is told
            if gpu["state"] in ("host", "vfio") and before.get(name) != after.get(name):
                self.moved.append("{0} to {1}".format(gpu["name"] or gpu["address"], gpu["state"]))

    def fail(self, results):
        """Results of a task that failed: one, or one for each turn of its loop. What is wedged outlasts all that fails because of it."""
        # that of a task itself comes without the word (TaskResult.clean_copy)
        failed = [told for told in results if told.get("failed")] or results
        wedged = any(told.get("wedged") for told in failed)
        if self._wedged and not wedged:
            return
        kinds = [failure["kind"] for told in failed for failure in told.get("failures", ())]
        refused = any(told.get("blockers") for told in failed)
        word = "wedged" if wedged else "refused" if refused else kinds[0] if kinds else "failed"
        said = "; ".join(dict.fromkeys(str(told.get("msg") or "no reason was given") for told in failed))
        self.problem, self._wedged = f"{word}: {said}", wedged

    def line(self):
        if self.problem:
            return self.problem + ("; before that: {0}".format(", ".join(self.moved)) if self.moved else "")
        if self.moved:
            return "moved: {0}".format(", ".join(self.moved))
        if self.planned:
            return "would move: {0}".format(", ".join(self.planned))
        return "as it was" if self.reached else NOT_BEGUN


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "gpuswitch.gpuswitch.report"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self):
        super().__init__()
        self._hosts = {}

    def _host(self, name):
        return self._hosts.setdefault(name, Host())

    def v2_playbook_on_play_start(self, play):
        tasks = [task for block in play.compile() for task in tasks_of(block)]
        if any(task.action in MODULES for task in tasks):
            # the variable of that name, which tasks have, too
            for name in play.get_variable_manager().get_vars(play=play).get("ansible_play_hosts_all", ()):
                self._host(name)

    def v2_runner_on_ok(self, result):
        self._tell(result)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._tell(result)
        if self._is_shown(result) and not ignore_errors:
            self._host(result._host.name).fail(results_of(result))

    def v2_runner_on_unreachable(self, result):
        if result._host.name in self._hosts:
            said = str(result._result.get("msg", "")).strip() or "no reason was given"
            self._host(result._host.name).problem = f"unreachable: {said.splitlines()[-1]}"

    def v2_playbook_on_stats(self, stats):
        if not self._hosts:
            return
        self._display.banner("GPUS")
        width = max(map(len, self._hosts))
        for name in sorted(self._hosts):
            self._display.display(f"{name.ljust(width)} : {self._hosts[name].line()}")

    def _is_shown(self, result):
        return result._host.name in self._hosts

    def _tell(self, result):
        if not self._is_shown(result):
            return
        host = self._host(result._host.name)
        host.reached = True
        if result._task.action in MODULES:
            for each in results_of(result):
                host.add(each)


def results_of(result):
    """That of a task, or of each turn of its loop."""
    told = result._result
    # the module has results of its own
    return told.get("results") or [told] if result._task.loop else [told]


def tasks_of(block):
    """Those of a block, of what it rescues and always does, and of blocks in it."""
    for part in (block.block, block.rescue, block.always):
        for each in part:
            if hasattr(each, "rescue"):
                yield from tasks_of(each)
            else:
                yield each
