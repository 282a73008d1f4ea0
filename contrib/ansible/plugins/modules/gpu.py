#!/usr/bin/python
# Copyright: gpuswitch contributors
# SPDX-License-Identifier: Apache-2.0
"""Moves GPUs of a host by its gpuswitchctl."""

DOCUMENTATION = r"""
module: gpu
short_description: Move GPUs between their host drivers and vfio-pci
version_added: 0.1.0
author: gpuswitch contributors (!UNKNOWN)
description:
  - Asks C(gpuswitchd) of the host to bring GPUs to a state, and waits for the end. Several GPUs move at the same time.
  - The service looks, decides and answers for everything; a GPU that is there already is left alone, and nothing has changed.
  - A refusal changes nothing, and has all that is in the way in RV(blockers).
  - Everything goes by C(gpuswitchctl --json), whose form has a version.
requirements:
  - gpuswitch on the host, as the role P(gpuswitch.gpuswitch.host#role) installs it.
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
    details: The service makes its plan, and refuses what it would refuse. Of O(state=recovered) it has none; what refuses the way home is told.
  diff_mode:
    description: Will return details on what has changed, or possibly needs changing in check_mode, when in diff mode.
    support: full
    details: The driver of each function.
options:
  state:
    description:
      - V(vfio) is on vfio-pci, where a virtual machine may have it.
      - V(host) is on its host drivers, with all that was stopped for it started again.
      - V(recovered) is in a known-good state again, if it was V(failed) or V(unknown); it is left alone if it is in one.
    type: str
    required: true
    choices: [vfio, host, recovered]
  gpu:
    description:
      - Which GPUs; each by its PCI address (V(0000:01:00.0), V(01:00.0)), its name in the configuration of the host, or its model, or a part
        of that which only one GPU of the host has. They are tried in this order.
      - V(all) are those that the configuration of the host has a table for.
      - May be left out where a host has one GPU.
    type: list
    elements: str
  busy:
    description:
      - What becomes of programs that have a GPU open; by default, what the configuration of the host says.
      - V(terminate) and V(kill) need an administrator where the configuration does not allow them.
    type: str
    choices: [refuse, wait, terminate, kill]
  wait:
    description: Seconds to wait for programs that have a GPU open; by itself, the same as O(busy=wait).
    type: int
  stop_units:
    description: Units to stop first. They are started again when the GPU is back.
    type: list
    elements: str
  timeout:
    description:
      - Seconds after which the module stops watching, and fails. The switch goes on, and the next run joins it.
      - By default it watches until the end; each step has a deadline of its own in the service.
    type: int
  executable:
    description: The command, by its path or its name.
    type: str
    default: gpuswitchctl
seealso:
  - module: gpuswitch.gpuswitch.gpu_info
"""

EXAMPLES = r"""
- name: Give the GPUs of the configuration to virtual machines
  gpuswitch.gpuswitch.gpu:
    state: vfio
    gpu: all

- name: Take one card back, and give programs ten minutes
  gpuswitch.gpuswitch.gpu:
    state: host
    gpu: RTX 3070
    wait: 600

- name: Say what would be in the way
  gpuswitch.gpuswitch.gpu:
    state: vfio
    gpu: "01:00.0"
  check_mode: true
  diff: true

- name: Try once more what has failed
  gpuswitch.gpuswitch.gpu:
    state: recovered
    gpu: all
"""

RETURN = r"""
gpus:
  description: The GPUs as they are now, as C(gpuswitchctl list --json) has them.
  returned: when they were found
  type: list
  elements: dict
  sample: [{"address": "0000:01:00.0", "name": "rtx3070", "state": "vfio", "driver": "vfio-pci"}]
results:
  description: How each switch ended, as C(gpuswitchctl to-vfio --json) has it.
  returned: when switches were asked for
  type: list
  elements: dict
plans:
  description: The steps of each switch, as C(gpuswitchctl plan --json) has them.
  returned: in check mode
  type: list
  elements: dict
failures:
  description: Of each GPU that is not where it was asked to be, C(gpu), C(name), C(kind) (one word) and C(text).
  returned: when the GPUs were found
  type: list
  elements: dict
blockers:
  description: All that is in the way, each with its C(gpu), its C(kind) and a sentence that says what to do, C(text).
  returned: when the GPUs were found
  type: list
  elements: dict
wedged:
  description: Addresses of the GPUs whose kernel has not returned. Nothing is written to them before it does; often only a reboot helps.
  returned: when the GPUs were found
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuswitch.gpuswitch.plugins.module_utils.gpuswitchctl import (
    TARGETS,
    CtlError,
    Move,
    command_of,
)

OF_HOLDERS = ("busy", "wait", "stop_units")


def options_of(params):
    """Words for the verb."""
    words = []
    for name, option in (("busy", "--busy"), ("wait", "--wait")):
        if params[name] is not None:
            words += [option, str(params[name])]
    for unit in params["stop_units"] or ():
        words += ["--stop-unit", unit]
    return words


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "required": True, "choices": list(TARGETS)},
            "gpu": {"type": "list", "elements": "str"},
            "busy": {"type": "str", "choices": ["refuse", "wait", "terminate", "kill"]},
            "wait": {"type": "int"},
            "stop_units": {"type": "list", "elements": "str"},
            "timeout": {"type": "int"},
            "executable": {"type": "str", "default": "gpuswitchctl"},
        },
        supports_check_mode=True,
    )
    params = module.params
    for name in ("wait", "timeout"):
        if params[name] is not None and params[name] < 0:
            module.fail_json(msg=f"{name} takes seconds, not {params[name]}")
    if params["state"] == "recovered" and (unused := [name for name in OF_HOLDERS if params[name] is not None]):
        module.fail_json(msg="a recovery ends no program and stops no unit: leave out {0}".format(", ".join(unused)))
    move = Move(command_of(module), params["state"], options_of(params))
    try:
        move.look(params["gpu"] or [])
        if module.check_mode:
            move.plan()
        else:
            move.run(timeout=params["timeout"])
    except CtlError as error:
        module.fail_json(msg=str(error))
    if move.failures:
        module.fail_json(msg=move.sentence(), **move.as_dict())
    module.exit_json(**move.as_dict())


if __name__ == "__main__":
    main()
