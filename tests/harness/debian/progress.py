"""What a build says, on the terminal of a run of pytest."""

from __future__ import annotations

import sys

import pytest

from tests.harness.debian.cache import Say


def on_stderr(line: str) -> None:
    """A line at once, of a program that is no run of pytest."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def progress(config: pytest.Config) -> Say:
    """Shows a line at once, whatever is captured. A worker of pytest-xdist has no terminal, and says nothing."""
    capture = config.pluginmanager.getplugin("capturemanager")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:
        return lambda _line: None
    assert capture is not None  # pytest's own plugin, always there

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return say
