"""`python -m tests.fuzz.inside TARGET ...`: one target under atheris, with libFuzzer's options; does not return."""

from __future__ import annotations

import logging
import sys

import atheris

# What is imported here is watched: our readers, and what they are made of.
with atheris.instrument_imports(include=["gpuswitch", "dbus_next", "tomllib", "xml.etree", "prometheus_client"]):
    from tests.fuzz.targets import TARGETS

program, target, *options = sys.argv
logging.disable()
atheris.Setup([program, *options], TARGETS[target])
atheris.Fuzz()
