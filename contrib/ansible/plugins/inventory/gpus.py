# Copyright: gpuswitch contributors
# SPDX-License-Identifier: Apache-2.0
"""Groups hosts by what their gpuswitchctl says."""

DOCUMENTATION = r"""
name: gpus
short_description: Group hosts by the state, the model and the owner of their GPUs
version_added: 0.1.0
author: gpuswitch contributors (!UNKNOWN)
description:
  - Asks the hosts of inventories that come before it, all at once, by C(ssh HOST gpuswitchctl list --json).
    Its file ends in C(gpuswitch.yml) or C(gpuswitch.yaml).
  - Groups are C(gpu_state_vfio), C(gpu_model_geforce_rtx_3070), C(gpu_owner_win11), with a host for each GPU that is so.
    C(gpu_owned) and C(gpu_not_owned) have the hosts of which a GPU has, or none has, an owner.
  - A host has its GPUs in the variable C(gpuswitch_gpus), as C(gpuswitchctl list --json) prints them.
  - A host that ssh does not reach is in the group C(gpuswitch_unreachable), and one where gpuswitch does not answer in C(gpuswitch_unavailable).
    The variable C(gpuswitch_reason) says why, and so does a warning. Neither is an error.
  - ssh is told what ansible.cfg, the environment and variables (C(ansible_host), C(ansible_user) ...) say of Ansible's own connections by ssh, but
    for passwords. Variables count that stand in the inventories before it, and in C(group_vars) and C(host_vars) beside them.
    Templates in variables are not resolved. With C(ansible_connection) C(local) the command is run here.
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: The name of this plugin.
    type: str
    required: true
    choices: [gpuswitch.gpuswitch.gpus]
  group:
    description: The group whose hosts are asked.
    type: str
    default: all
  executable:
    description: The command on the hosts.
    type: str
    default: gpuswitchctl
  timeout:
    description: Seconds that a host has to let ssh in, and once more to answer.
    type: int
    default: 10
  at_once:
    description: How many hosts are asked at the same time.
    type: int
    default: 20
"""

EXAMPLES = r"""
# lab.gpuswitch.yml, used as: ansible-inventory -i hosts.yml -i lab.gpuswitch.yml --graph
plugin: gpuswitch.gpuswitch.gpus
group: gpu_hosts
keyed_groups:
  - prefix: gpus
    key: gpuswitch_gpus | default([]) | length
"""

import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

from ansible import constants
from ansible.errors import AnsibleParserError
from ansible.inventory.helpers import get_group_vars
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable
from ansible.plugins.loader import connection_loader
from ansible.utils.vars import combine_vars
from ansible.vars.plugins import get_vars_from_inventory_sources
from ansible_collections.gpuswitch.gpuswitch.plugins.module_utils.gpuswitchctl import Ctl, CtlError

UNREACHABLE = "gpuswitch_unreachable"
UNAVAILABLE = "gpuswitch_unavailable"
_NOT_LET_IN = 255
"""ssh(1): an error occurred."""


class UnreachableError(CtlError):
    """The host was not asked."""


def ssh_settings(host, variables):
    """Ansible's own settings of ssh for a host, by the names that its connection plugin has for them."""
    connection_loader.get("ssh", class_only=True)  # which has the configuration know them
    names = (
        "host",
        "port",
        "remote_user",
        "private_key_file",
        "ssh_args",
        "ssh_common_args",
        "ssh_extra_args",
        "host_key_checking",
        "ssh_executable",
    )
    known = {"inventory_hostname": host, **variables}
    return {
        name: constants.config.get_config_value(name, plugin_type="connection", plugin_name="ssh", variables=known)
        for name in names
    }


def ssh_command(settings, timeout):
    """The words in front of a command, for these settings. Raises CtlError."""
    words = [settings["ssh_executable"] or "ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={timeout}"]
    # ssh takes what it is told first. A master that stays would keep our pipe open; one that is there already is used.
    words += ["-o", "ControlMaster=no", *shlex.split(settings["ssh_args"] or "")]
    if not settings["host_key_checking"]:
        words += ["-o", "StrictHostKeyChecking=no"]
    for option, name in (("-p", "port"), ("-l", "remote_user"), ("-i", "private_key_file")):
        words += [option, str(settings[name])] if settings[name] else []
    for name in ("ssh_common_args", "ssh_extra_args"):
        words += shlex.split(settings[name] or "")
    return [*words, "--", str(settings["host"])]


def words_before(host, variables, timeout):
    """The words in front of a command for that host; none where it is this one. Raises CtlError."""
    connection = variables.get("ansible_connection", "ssh")
    if connection == "local":
        return []
    if connection not in ("ssh", "smart", "ansible.builtin.ssh"):
        raise CtlError(f"it is reached by the connection {connection}, and the inventory asks by ssh or local only")
    return ssh_command(ssh_settings(host, variables), timeout)


def ask(before, executable, timeout):
    """The GPUs of a host that a command is run on with these words before it. Raises CtlError."""

    def run(words):
        try:
            done = subprocess.run(
                [*before, *(map(shlex.quote, words) if before else words)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                # to be let in, and to answer
                timeout=2 * timeout,
            )
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"no answer within {2 * timeout} s") from None
        except OSError as error:
            raise CtlError(f"cannot run {(before or words)[0]}: {error.strerror}") from None
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        if before and done.returncode == _NOT_LET_IN:
            raise UnreachableError((err.strip() or "ssh ended with status 255").splitlines()[-1])
        return done.returncode, out, err

    return Ctl(run, executable).gpus()


def word_of(text):
    """A part of a group's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "none"


def model_word(model):
    """`geforce_rtx_3070` of `NVIDIA Corporation GA104 [GeForce RTX 3070]`: the name that people know stands in the last brackets."""
    known = re.findall(r"\[([^\[\]]+)\]", model)
    return word_of(known[-1] if known else model)


def groups_of(gpus):
    """The groups of a host with these GPUs, in order."""
    names = ["gpu_owned" if any(gpu["owner"] for gpu in gpus) else "gpu_not_owned"] if gpus else []
    for gpu in gpus:
        names += ["gpu_state_{0}".format(gpu["state"]), "gpu_model_{0}".format(model_word(gpu["model"]))]
        if gpu["owner"]:
            names.append("gpu_owner_{0}".format(word_of(gpu["owner"]["name"] or gpu["owner"]["uuid"])))
    return sorted(set(names))


class InventoryModule(BaseInventoryPlugin, Constructable):
    NAME = "gpuswitch.gpuswitch.gpus"

    def verify_file(self, path):
        return super().verify_file(path) and path.endswith(("gpuswitch.yml", "gpuswitch.yaml"))

    def parse(self, inventory, loader, path, cache=True):
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        group = self.get_option("group")
        if group not in inventory.groups:
            raise AnsibleParserError(f"{path}: there is no group {group!r} in the inventories before it")
        for option in ("timeout", "at_once"):
            if self.get_option(option) < 1:
                raise AnsibleParserError(f"{path}: {option} takes a number from 1 on, not {self.get_option(option)}")
        hosts = [
            inventory.get_host(name) for name in sorted({host.name for host in inventory.groups[group].get_hosts()})
        ]
        # Ansible's loader of plugins is for one thread.
        questions = [self._question(host) for host in hosts]
        with ThreadPoolExecutor(self.get_option("at_once")) as pool:
            for host, (gpus, problem) in zip(hosts, pool.map(self._answer, questions)):
                self._add(host.name, gpus, problem)

    def _question(self, host):
        """The words before a command for this host, or what keeps it from being asked."""
        try:
            return words_before(host.name, self._variables(host), self.get_option("timeout"))
        except CtlError as error:
            return error

    def _variables(self, host):
        """Those of a host, with those of group_vars and host_vars beside the inventories (as Ansible's own plugin `constructed` has them)."""
        sources, groups = self.inventory.processed_sources, host.get_groups()
        variables = get_group_vars(groups)
        for more in (
            get_vars_from_inventory_sources(self.loader, sources, groups, "all"),
            host.get_vars(),
            get_vars_from_inventory_sources(self.loader, sources, [host], "all"),
        ):
            variables = combine_vars(variables, more)
        return variables

    def _answer(self, question):
        """The GPUs of a host, or None; and what went wrong."""
        if isinstance(question, CtlError):
            return None, question
        try:
            return ask(question, self.get_option("executable"), self.get_option("timeout")), None
        except CtlError as error:
            return None, error

    def _add(self, host, gpus, problem):
        if problem is not None:
            names = [UNREACHABLE if isinstance(problem, UnreachableError) else UNAVAILABLE]
            self.inventory.set_variable(host, "gpuswitch_reason", str(problem))
            self.display.warning(f"gpuswitch on {host}: {problem}")
        else:
            names = groups_of(gpus)
            self.inventory.set_variable(host, "gpuswitch_gpus", gpus)
        for name in names:
            self.inventory.add_child(self.inventory.add_group(name), host)
        variables = self._variables(self.inventory.get_host(host))
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, host, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, host, strict=strict)
