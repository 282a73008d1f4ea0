#!/usr/bin/python
# Copyright: gpuswitch contributors
# SPDX-License-Identifier: Apache-2.0
"""Tells of the GPUs of a host by its gpuswitchctl."""

DOCUMENTATION = r"""
module: gpu_info
short_description: Tell which GPUs a host has, where they are and who has them
version_added: 0.1.0
author: gpuswitch contributors (!UNKNOWN)
description:
  - Asks C(gpuswitchd) of the host, by C(gpuswitchctl --json). Needs no privileges, but for programs of other users in RV(holders).
requirements:
  - gpuswitch on the host, as the role P(gpuswitch.gpuswitch.host#role) installs it.
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
options:
  gpu:
    description:
      - Which GPUs, as O(gpuswitch.gpuswitch.gpu#module:gpu) names them. By default all of the host.
    type: list
    elements: str
  holders:
    description: Whether to look for the programs that have them open, too.
    type: bool
    default: false
  executable:
    description: The command, by its path or its name.
    type: str
    default: gpuswitchctl
seealso:
  - module: gpuswitch.gpuswitch.gpu
"""

EXAMPLES = r"""
- name: Look at the GPUs
  gpuswitch.gpuswitch.gpu_info:
  register: here

- name: Show who has them
  ansible.builtin.debug:
    msg: "{{ here.gpus | rejectattr('owner', 'none') | map(attribute='owner.name') }}"
"""

RETURN = r"""
gpus:
  description: The GPUs, in the order of their addresses, as C(gpuswitchctl list --json) has them.
  returned: success
  type: list
  elements: dict
  sample: [{"address": "0000:01:00.0", "name": "rtx3070", "state": "vfio", "driver": "vfio-pci", "owner": {"name": "win11"}}]
holders:
  description: The programs that have one of them open, as C(gpuswitchctl holders --json) has them.
  returned: with O(holders=true)
  type: list
  elements: dict
warnings_of_config:
  description: What the configuration of the host says that is about none of its GPUs, a sentence each.
  returned: success
  type: list
  elements: str
release:
  description: The release of gpuswitchctl.
  returned: success
  type: str
  sample: 0.1.0
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuswitch.gpuswitch.plugins.module_utils.gpuswitchctl import CtlError, command_of, select


def look(ctl, words, holders):
    """What the module returns. Raises CtlError."""
    listed = ctl.one("list")
    gpus = select(listed["gpus"], words) if words else listed["gpus"]
    told = {"changed": False, "gpus": gpus, "warnings_of_config": listed["warnings"], "release": ctl.release()}
    if holders:
        told["holders"] = ctl.one("holders", *[gpu["address"] for gpu in gpus])["holders"] if gpus else []
    return told


def main():
    module = AnsibleModule(
        argument_spec={
            "gpu": {"type": "list", "elements": "str"},
            "holders": {"type": "bool", "default": False},
            "executable": {"type": "str", "default": "gpuswitchctl"},
        },
        supports_check_mode=True,
    )
    try:
        told = look(command_of(module), module.params["gpu"] or [], module.params["holders"])
    except CtlError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**told)


if __name__ == "__main__":
    main()
